"""Quantised tensors against a plain NumPy reference, under JAX's transformations, and as the TPU's compiler
sees them."""

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import tiered
from virtual_devices import virtual_devices

from qlora_jax.quant import BLOCK_SIZES, DATA_TYPES, QuantizedTensor, code_bits, codebook, dequantize, dynamic_map, quantize
from qlora_jax.quant import tensor as tensor_module
from qlora_jax.quant.targets import Target, tracing_for
from qlora_jax.quant.tensor import block_scales, unpack

ROOT = Path(__file__).resolve().parents[2]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference(w: np.ndarray, data_type: Any, block_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes in the order of the blocks, absmax by block, values `[in, out]`), one block after the other."""
    table = codebook(data_type).astype(np.float64)
    order = np.argsort(table, kind="stable")[: 15 if data_type == "int4" else 16]
    flat = w.T.reshape(-1)
    codes, absmax, values = np.empty(flat.size, np.uint8), [], np.empty_like(flat)
    for start in range(0, flat.size, block_size):
        block = flat[start : start + block_size]
        largest = np.abs(block).max()
        divisor = largest if largest > 0 else np.float32(1)
        whole = block.size == block_size
        scaled = block * (np.float32(1) / divisor) if whole else block / divisor
        distance = np.abs(scaled[:, None].astype(np.float64) - table[order][None])
        code = order[distance.argmin(1)]  # the first of two that are as near is the lower
        codes[start : start + block_size] = code
        absmax.append(largest)
        values[start : start + block_size] = codebook(data_type)[code] * largest
    return codes, np.asarray(absmax, np.float32), values.reshape(w.shape[::-1]).T


def in_block_order(q: QuantizedTensor) -> tuple[np.ndarray, np.ndarray]:
    """(codes, float32 scales) in the order of the blocks."""
    codes, scales = np.asarray(unpack(q)), np.asarray(block_scales(q))
    size = int(np.prod(q.shape))
    return (codes, scales) if q.flat_shape is None else (codes.reshape(-1)[:size], scales)


def close(found: Any, expected: Any) -> None:
    """Equal but for the last bit of a scale: code * absmax + offset is one rounding where a compiler fuses
    it, or two."""
    np.testing.assert_allclose(found, expected, rtol=1e-6)


SHAPES = [(128, 32), (64, 1), (192, 5), (1, 1), (7, 13), (97, 101), (100, 64), (31, 1)]


@pytest.mark.parametrize(
    ("data_type", "shape"),
    tiered(
        [(data_type, shape) for data_type in DATA_TYPES for shape in SHAPES],
        quick=[*(("nf4", shape) for shape in SHAPES), *((name, shape) for name in DATA_TYPES for shape in SHAPES[4:6])],
    ),
    ids=str,
)
def test_equals_the_reference(data_type: Any, shape: tuple[int, int]) -> None:
    w = random(*shape)
    check_reference(w, data_type, 64)


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_codes_beyond_the_table_are_never_written(data_type: Any) -> None:
    q = quantize(random(320, 8), data_type)
    written = np.unique(unpack(q))
    expected = 15 if data_type == "int4" else 2 ** code_bits(data_type)
    assert (written.size, written.max()) == (expected, expected - 1)


@pytest.mark.optimised
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_equals_the_reference_at_every_block_size(block_size: int) -> None:
    check_reference(random(4096, 3), "nf4", block_size)
    check_reference(random(523, 3), "nf4", block_size)


def check_reference(w: np.ndarray, data_type: Any, block_size: int) -> None:
    q = quantize(w, data_type, block_size, False)
    codes, absmax, values = reference(w, data_type, block_size)
    found_codes, found_absmax = in_block_order(q)
    if q.flat_shape is None:
        found_codes, found_absmax = found_codes.T.reshape(-1), found_absmax.T.reshape(-1)
    assert q.shape == w.shape
    np.testing.assert_array_equal(found_absmax, absmax)
    # Zero has two codes in FP4.
    np.testing.assert_array_equal(codebook(data_type)[found_codes], codebook(data_type)[codes])
    np.testing.assert_array_equal(dequantize(q), values)


@pytest.mark.optimised
@pytest.mark.parametrize("count", [1, 9216, pytest.param(8_208_384, marks=pytest.mark.integration)])
def test_the_offset_of_the_scales_is_their_exact_sum_by_their_count(count: int) -> None:
    """As many as a whole table of 128,256 rows has, too, whose float32 sum alone would lose seven digits."""
    mean = jax.jit(tensor_module._mean)
    for seed in range(4):
        scales = np.abs(np.random.default_rng(seed).standard_normal(count, np.float32))
        assert mean(scales) == np.float32(math.fsum(scales)) / np.float32(count)


@pytest.mark.optimised
@pytest.mark.parametrize("shape", [(4096, 40), (97, 101), (1, 1)], ids=str)
def test_double_quantisation_rounds_scales_to_the_nearest_of_the_map(shape: tuple[int, int]) -> None:
    w = random(*shape) * np.exp(random(1, shape[1], seed=1))
    exact, double = quantize(w, "nf4", 64, False), quantize(w, "nf4", 64, True)
    np.testing.assert_array_equal(unpack(exact), unpack(double))
    scales = np.asarray(block_scales(exact)).T.reshape(-1).astype(np.float64)
    found = np.asarray(block_scales(double)).T.reshape(-1).astype(np.float64)
    offset = scales.mean()
    assert double.scale_offset == pytest.approx(offset, rel=1e-6)
    for start in range(0, scales.size, 256):
        centred = scales[start : start + 256] - offset
        largest = max(np.abs(centred).max(), 1e-30)
        nearest = np.abs(centred[:, None] / largest - dynamic_map().astype(np.float64)).min(1)
        error = np.abs(found[start : start + 256] - scales[start : start + 256]) / largest
        # Half a bin of the 65536 that bitsandbytes looks up, and float32's rounding of the scale itself.
        assert np.all(error <= nearest + 3.3e-5 + 1e-6 * np.abs(scales[start : start + 256]) / largest)


@pytest.mark.parametrize(("data_type", "error"), [("nf4", 0.0728), ("fp4", 0.0965)])
@pytest.mark.parametrize("double", [False, True])
def test_error_on_normal_weights(data_type: Any, error: float, double: bool) -> None:
    w = random(1024, 1024)
    assert np.abs(dequantize(quantize(w, data_type, 64, double)) - w).mean() == pytest.approx(error, rel=0.02)


def test_bits_per_parameter() -> None:
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16))
    assert q.bits_per_parameter <= 4.13
    plain = jax.eval_shape(partial(quantize, double_quantization=False), jax.ShapeDtypeStruct((4096, 4096), "float32"))
    assert plain.bits_per_parameter == 4.5
    assert q.double_quantized
    assert not plain.double_quantized


@pytest.mark.parametrize("rows", [64, 37])
def test_blocks_of_zeros_stay_zero(rows: int) -> None:
    w = np.zeros((rows, 8), np.float32)
    np.testing.assert_array_equal(dequantize(quantize(w, double_quantization=False)), w)
    np.testing.assert_array_equal(dequantize(quantize(w)), w)
    w[:, 4] = 1.0
    assert np.isfinite(dequantize(quantize(w))).all()


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(dtype: Any) -> None:
    w = jnp.asarray(random(64, 8), dtype)
    q = quantize(w)
    assert dequantize(q).dtype == dtype
    assert dequantize(quantize(w, dtype=jnp.bfloat16)).dtype == jnp.bfloat16
    assert block_scales(q).dtype == jnp.float32
    np.testing.assert_array_equal(dequantize(q), dequantize(q, jnp.float32).astype(dtype))
    # The scales are those of the values as given, whatever type they came in.
    same = quantize(w.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(same), jax.tree.leaves(q))


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [128, 50])
@pytest.mark.parametrize("double", [False, True])
def test_stacks_are_matrices_side_by_side(rows: int, double: bool) -> None:
    w = random(2, 3, rows, 10)
    stacked = quantize(w, double_quantization=double)
    assert stacked.shape == w.shape
    assert stacked.ndim == 4
    dense = dequantize(stacked)
    mapped = jax.vmap(jax.vmap(partial(quantize, double_quantization=double)))(w)
    jax.tree.map(close, mapped, stacked)
    close(jax.vmap(dequantize)(stacked), dense)
    close(jax.jit(dequantize)(stacked), dense)
    for i, j in np.ndindex(2, 3):
        one = quantize(w[i, j], double_quantization=double)
        close(dequantize(one), dense[i, j])
        # XLA divides a stack of sums, for the mean of the scales, by way of a reciprocal; the codes are
        # equal.
        jax.tree.map(close, jax.tree.map(lambda x, i=i, j=j: x[i, j], stacked), one)


@pytest.mark.parametrize("rows", [128, 50])
def test_scan_and_eval_shape(rows: int) -> None:
    w = random(3, rows, 10)
    stacked = quantize(w)
    _, dense = jax.lax.scan(lambda carry, q: (carry, dequantize(q)), 0, stacked)
    close(dense, dequantize(stacked))
    abstract = jax.eval_shape(quantize, jax.ShapeDtypeStruct(w.shape, w.dtype))
    assert jax.tree.structure(abstract) == jax.tree.structure(stacked)
    assert abstract.shape == w.shape
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f"{a}"), abstract, stacked)
    assert jax.eval_shape(dequantize, abstract).shape == w.shape


@pytest.mark.integration
def test_sharded_over_eight_devices() -> None:
    """Codes and scales of the column layout, split by columns or by rows; in a process with eight CPU
    devices."""
    code = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qlora_jax.quant import dequantize, matmul, quantize
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
w = np.random.default_rng(0).standard_normal((2, 256, 64), np.float32)
x = np.random.default_rng(1).standard_normal((5, 256), np.float32)
plain = quantize(w)
expected = dequantize(plain)
for spec in (P(None, None, "a"), P(None, "a", None), P(None, "b", "a"), P("b", None, "a")):
    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, spec if leaf.ndim == 3 else P()))
    sharded = jax.tree.map(place, plain)
    dense = jax.jit(dequantize, out_shardings=NamedSharding(mesh, spec))(sharded)
    np.testing.assert_allclose(dense, expected, rtol=1e-6)
    from_sharded = quantize(jax.device_put(w, NamedSharding(mesh, spec)))
    jax.tree.map(np.testing.assert_array_equal, from_sharded, plain)
    y = jax.jit(lambda x, q: matmul(x, jax.tree.map(lambda leaf: leaf[0], q)))(x, sharded)
    np.testing.assert_allclose(y, x @ expected[0], rtol=1e-4, atol=1e-4)
print("equal")
"""
    environment = virtual_devices(8) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal"]


@pytest.fixture
def on_tpu() -> Iterator[None]:
    """Runs the forms that TPUs get on whatever there is."""
    with tracing_for("tpu"):
        yield


@pytest.mark.parametrize("data_type", DATA_TYPES)
@pytest.mark.usefixtures("on_tpu")
def test_the_tree_of_selects_is_the_table(data_type: Any) -> None:
    codes = jnp.arange(16, dtype=jnp.uint8).reshape(4, 4)
    np.testing.assert_array_equal(tensor_module._lookup(codes, data_type).reshape(-1), codebook(data_type))


def test_all_ways_dequantise_to_the_same() -> None:
    q = quantize(random(256, 40))
    found = {}
    platforms: tuple[Target, ...] = ("cpu", "cuda", "tpu")
    for platform in platforms:
        with tracing_for(platform):
            found[platform] = np.asarray(dequantize(q))
    np.testing.assert_array_equal(found["cpu"], found["cuda"])
    np.testing.assert_allclose(found["tpu"], found["cuda"], atol=1e-6)  # its scales are a closed form


@pytest.mark.parametrize("rows", [128, 100])
def test_gathers_of_scales_on_cpu_of_codes_too_on_gpu_and_none_on_tpu(rows: int) -> None:
    with tracing_for("every"):
        traced = jax.jit(dequantize).trace(jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, rows, 8), "float32")))
    gathers = {
        platform: len(
            re.findall(r"stablehlo\.\"?(?:dynamic_)?gather", traced.lower(lowering_platforms=(platform,)).as_text())
        )
        for platform in ("cpu", "cuda", "tpu")
    }
    assert gathers["tpu"] == 0
    assert 0 < gathers["cpu"] < gathers["cuda"]


def test_unusable_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected a matrix \[\.\.\., in, out\], found shape \(3,\)"):
        quantize(np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="unknown data type 'nf5'"):
        quantize(np.zeros((2, 2), np.float32), "nf5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown block size 100"):
        quantize(np.zeros((2, 2), np.float32), block_size=100)
