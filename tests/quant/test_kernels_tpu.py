"""The TPU kernels in interpret mode, against float64 products with the matrix that the codes stand for."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from kernel_checks import LIMITS, of_dtypes, random, relative_error

from qlora_jax.quant import StackedTensor, dequantize, kernels, matmul, quantize, with_implementation
from qlora_jax.quant.kernels.tpu_scales import spread_absmax
from qlora_jax.quant.targets import tracing_for

# 1792 rows have 28 scales a column: groups of 256 of them begin within columns.
PRODUCTS = [
    (256, 128, "nf4", 64, True, 1),
    (1792, 384, "nf4", 64, True, 3),
    (512, 256, "fp4", 128, False, 17),
    (768, 128, "int4", 128, True, 64),
    (512, 640, "nf4", 64, False, 200),
    (576, 128, "nf4", 64, True, 3),  # the lower half begins in the middle of a block
    (256, 128, "fp4-e3m0", 64, True, 2),
    (256, 128, "nf3", 64, True, 2),
]


@pytest.mark.parametrize(("rows", "columns", "data_type", "block_size", "double", "count", "dtype"), of_dtypes(PRODUCTS))
def test_product_and_gradient(
    rows: int, columns: int, data_type: Any, block_size: int, double: bool, count: int, dtype: str
) -> None:
    q = with_implementation(quantize(random(rows, columns), data_type, block_size, double), "pallas")
    dense = np.asarray(dequantize(q, jnp.float32), np.float64)
    x, dy = (jnp.asarray(random(count, size, seed=1), dtype) for size in (rows, columns))
    y, (dx,) = value_and_pullback(matmul, (x,), lambda _: dy, q)
    assert (y.dtype, y.shape) == (dtype, (count, columns))
    assert relative_error(y, np.asarray(x, np.float64) @ dense) < LIMITS[dtype]
    assert relative_error(dx, np.asarray(dy, np.float64) @ dense.T) < LIMITS[dtype]


def test_a_matrix_is_read_where_it_lies_in_its_stack() -> None:
    q = with_implementation(quantize(random(3, 256, 128)), "pallas")
    x = random(2, 256, seed=1)

    def run(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, matmul(x, StackedTensor(q, index))

    _, found = jax.jit(lambda x: jax.lax.scan(run, x, jnp.arange(3)))(x)
    expected = np.asarray(x, np.float64) @ np.asarray(dequantize(q), np.float64)
    assert relative_error(found, expected) < LIMITS["float32"]


@pytest.mark.parametrize(("rows", "columns"), [(28, 24), (64, 8), (224, 40), (448, 16), (172, 64), (2, 300)])
def test_each_column_gets_the_absmax_of_the_groups_it_touches(rows: int, columns: int) -> None:
    groups = -(-rows * columns // 256)
    absmax = random(groups)
    spread = np.asarray(spread_absmax(jnp.asarray(absmax), rows, columns))
    for column in range(columns):
        first, last = column * rows // 256, (column * rows + rows - 1) // 256
        np.testing.assert_array_equal(spread[: last - first + 1, column], absmax[first : last + 1])


@pytest.mark.parametrize(
    ("shape", "block_size", "dtype", "reason"),
    [
        ((100, 128), 64, "float32", "the flat layout"),
        ((4224, 128), 64, "float32", r"\[4224, 128\]: expected at most 4096 rows or a multiple of 256"),
        ((256, 96), 64, "float32", r"\[256, 96\]: expected a multiple of 128 columns"),
        ((256, 128), 256, "float32", "blocks of 256: expected 64 or 128"),
        ((256, 128), 64, "float16", "x in float16: expected float32 or bfloat16"),
    ],
)
def test_what_no_kernel_takes_falls_back_or_is_refused(shape: Any, block_size: int, dtype: str, reason: str) -> None:
    q, x = quantize(random(*shape), "nf4", block_size), jnp.asarray(random(2, shape[0], seed=1), dtype)
    np.testing.assert_array_equal(matmul(x, q), matmul(x, q, implementation="xla"))
    with pytest.raises(ValueError, match=f"implementation 'pallas': no kernel takes .*{reason}"):
        matmul(x, q, implementation="pallas")


@pytest.mark.parametrize(
    ("rows", "block_size", "count", "implementation", "called"),
    [
        (256, 64, 64, "auto", ["matmul_4bit"]),
        (256, 64, 65, "auto", ["dequantize_4bit"]),
        (256, 64, 2, "xla", []),
        (256, 64, 65, "xla", []),
        (256, 64, 200, "pallas", ["matmul_4bit"]),
        (256, 256, 2, "auto", ["dequantize_4bit"]),  # the kernel of few rows does not take such blocks
        (4224, 64, 2, "auto", ["dequantize_4bit"]),  # that of GPUs takes this matrix, and that of TPUs does not
    ],
)
def test_the_kernel_is_lowered_by_the_number_of_rows_on_a_tpu(
    rows: int, block_size: int, count: int, implementation: Any, called: list[str]
) -> None:
    quantized = partial(quantize, block_size=block_size)
    q = jax.eval_shape(quantized, jax.ShapeDtypeStruct((rows, 128), jnp.float32))
    x = jax.ShapeDtypeStruct((count, rows), jnp.bfloat16)
    with tracing_for("every"):
        traced = jax.jit(lambda x, q: matmul(x, q, implementation=implementation)).trace(x, q)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("custom_call @tpu_custom_call") == len(called)
    assert re.findall(r'kernel_name = "(\w+)"', text) == called
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_a_kernel_that_does_not_compile_is_told_once_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> jax.Array:
        raise NotImplementedError("no such instruction\nand more")

    monkeypatch.setattr(kernels.tpu, "matmul", refuses)
    monkeypatch.setattr(kernels, "dequantizer", lambda *_: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q, x = quantize(random(256, 128)), random(2, 256, seed=1)
    with pytest.warns(UserWarning, match="does not compile here, XLA does its work: no such instruction"):
        found = matmul(x, q)
    np.testing.assert_array_equal(found, matmul(x, q, implementation="xla"))
