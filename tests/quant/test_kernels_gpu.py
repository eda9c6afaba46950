"""The GPU kernel in interpret mode against float64 products; its PTX run by NumPy; what Triton is handed."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from kernel_checks import LIMITS, of_dtypes, random, relative_error

from qlora_jax.quant import DATA_TYPES, StackedTensor, dequantize, kernels, matmul, quantize
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.kernels import gpu
from qlora_jax.quant.kernels.lookup_ptx import lookup_ptx, tables
from qlora_jax.quant.targets import tracing_for

# 1792 rows have 28 scales a column: groups of 256 of them begin within columns. They go in 2 parts, of 7 blocks each.
PRODUCTS = [
    (1792, 256, "nf4", 64, True, 3),
    (512, 256, "fp4", 128, False, 17),
    (768, 128, "int4", 128, True, 64),
    (640, 128, "nf4", 64, False, 100),
    (576, 128, "nf4", 64, True, 3),  # the lower half begins in the middle of a block
    (256, 128, "fp4-e3m0", 64, True, 2),
    (256, 128, "nf3", 64, True, 2),
]


@pytest.mark.parametrize(("rows", "columns", "data_type", "block_size", "double", "count", "dtype"), of_dtypes(PRODUCTS))
def test_product(rows: int, columns: int, data_type: Any, block_size: int, double: bool, count: int, dtype: str) -> None:
    q = quantize(random(rows, columns), data_type, block_size, double)
    x = jnp.asarray(random(count, rows, seed=1), dtype)
    y = jax.jit(lambda x, q: gpu.matmul(x, q, interpret=True))(x, q)
    assert (y.dtype, y.shape) == (dtype, (count, columns))
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(q, jnp.float32), np.float64)
    assert relative_error(y, expected) < LIMITS[dtype]


def test_a_matrix_is_read_where_it_lies_in_its_stack() -> None:
    q, x = quantize(random(3, 256, 128)), random(2, 256, seed=1)

    def run(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, gpu.matmul(x, q, index, interpret=True)

    _, found = jax.jit(lambda x: jax.lax.scan(run, x, jnp.arange(3)))(x)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert relative_error(found, expected) < LIMITS["float32"]


@pytest.mark.parametrize("data_type", DATA_TYPES)
def test_the_ptx_looks_every_byte_up(data_type: Any) -> None:
    packed, exact = np.arange(256, dtype=np.uint8), codebook(data_type)
    for dtype, count in (("bfloat16", 1), ("float32", 3)):
        found = np.zeros((256, 2), np.float32)
        parts = tables(data_type, dtype)
        assert len(parts) == count
        for table in reversed(parts):
            words = run_ptx(lookup_ptx(table), packed.view("<u4"))
            pairs = np.stack(words, axis=1).reshape(-1)  # one word a byte
            by_nibble = np.stack(run_ptx(lookup_ptx(table, by_nibble=True), packed.view("<u4")), axis=1).astype(np.uint32)
            halves = by_nibble.view(np.uint16).reshape(-1, 2, 4)  # the values of four high nibbles, then of four low ones
            np.testing.assert_array_equal(
                halves.transpose(0, 2, 1).reshape(-1, 2), np.stack([pairs >> 16, pairs & 65535], 1)
            )
            found += np.stack([pairs >> 16 << 16, pairs << 16], axis=1).astype(np.uint32).view(np.float32)
        expected = np.stack([exact[packed >> 4], exact[packed & 15]], axis=1)
        np.testing.assert_array_equal(found, expected.astype(dtype).astype(np.float32))


def run_ptx(program: str, source: np.ndarray) -> list[np.ndarray]:
    """$0 … $3 of a program whose $4 is `source`, by the PTX manual's words for its instructions."""
    registers: dict[str, Any] = {"$4": source.astype(np.uint64)}

    def value(operand: str) -> Any:
        return registers[operand] if operand in registers else np.full_like(registers["$4"], int(operand, 0))

    for name, operands in re.findall(r"^(\w+)\.\w+ (.*);$", program, re.MULTILINE):
        to, *rest = operands.split(", ")
        a, b, *c = (value(operand) for operand in rest)
        match name:
            case "and":
                registers[to] = a & b
            case "shr":
                registers[to] = a >> b
            case "add":
                registers[to] = (a + b) & 0xFFFFFFFF
            case "prmt":
                registers[to] = permute(a, b, c[0])
            case _:
                raise AssertionError(f"no such instruction: {name}")
    return [registers[f"${number}"] for number in range(4)]


def permute(a: Any, b: Any, selectors: Any) -> Any:
    """prmt.b32: byte i is that of (b, a) which nibble i of the selectors names; its top bit would ask for the sign."""
    both, result = b << np.uint64(32) | a, np.zeros_like(a)
    for place in range(4):
        selector = selectors >> np.uint64(4 * place) & np.uint64(15)
        assert (selector < 8).all()
        result |= (both >> (np.uint64(8) * selector) & np.uint64(255)) << np.uint64(8 * place)
    return result


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "reason"),
    [
        ((100, 128), 64, "float32", "the flat layout"),
        ((192, 64), 64, "float32", r"a matrix \[192, 64\]: expected multiples of 64 and 128"),
        ((256, 128), 128, "float16", "x in float16: expected float32 or bfloat16"),
        ((512, 128), 128, "float32", "x in float32 with blocks of 128: expected 64"),
        ((512, 128), 256, "float32", "blocks of 256: expected 64 or 128"),
        ((2**20, 5 * 2**10), 64, "float32", r"a stack of 2.5 GiB: expected at most 2 or more than 4"),
    ],
)
def test_what_the_kernel_does_not_take(shape: Any, block_size: int, dtype: str, reason: str) -> None:
    q = jax.eval_shape(lambda w: quantize(w, "nf4", block_size), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert re.search(reason, gpu.unsupported_reason(q, dtype) or "")


def lowered(function: Any, *arguments: Any) -> str:
    """The program for an H100, which need not be there; JAX 0.12 calls the backend deprecated."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        with tracing_for("every"):
            traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("count", "implementation", "called"), [(64, "auto", 1), (65, "auto", 0), (2, "xla", 0), (200, "pallas", 1)]
)
def test_the_kernel_is_lowered_for_few_rows_on_a_gpu(count: int, implementation: Any, called: int) -> None:
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((2, 256, 128), jnp.float32))
    x, index = jax.ShapeDtypeStruct((count, 256), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.int32)

    def product(x: jax.Array, q: Any, index: jax.Array) -> jax.Array:
        return matmul(x, StackedTensor(q, index), implementation=implementation)

    text = lowered(product, x, q, index)
    assert text.count("gpu.triton") == called
    if called:  # the whole stack, not a layer that was cut out of it
        assert "tensor<2x128x128xui8>" in re.findall(r"gpu\.triton.*", text)[0]


def test_the_gradient_on_a_gpu_is_that_of_xla() -> None:
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((256, 128), jnp.float32))
    x = jax.ShapeDtypeStruct((2, 256), jnp.bfloat16)
    text = lowered(lambda x, q: jax.grad(lambda x: matmul(x, q, implementation="pallas").astype("float32").sum())(x), x, q)
    assert text.count("gpu.triton") <= 1  # the product's, if it is not dropped
    assert "dot_general" in text


def test_matrices_that_only_the_gpu_takes_are_xlas_elsewhere() -> None:
    q, x = quantize(random(4224, 128)), random(2, 4224, seed=1)
    assert kernels.exists(q, x.dtype)
    assert "a multiple of 256" in (kernels.unsupported_reason(q, x.dtype) or "")
    np.testing.assert_array_equal(matmul(x, q), matmul(x, q, implementation="xla"))
