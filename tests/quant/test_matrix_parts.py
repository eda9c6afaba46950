"""Matrices packed in parts: the same values, and each part alone is a matrix of its own rows. About 2 CPU seconds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import UnsupportedError
from qlora_jax.quant import QuantizedTensor, can_split_rows, dequantize, matmul, quantize, with_parts

ROWS, COLUMNS, PARTS = 256, 16, 4


def matrices(stack: tuple[int, ...] = ()) -> QuantizedTensor:
    return quantize(jnp.asarray(np.random.default_rng(0).standard_normal((*stack, ROWS, COLUMNS), np.float32)))


@pytest.mark.parametrize("stack", [(), (2,)])
def test_the_values_are_those_of_one_part(stack: tuple[int, ...]) -> None:
    whole = matrices(stack)
    parts = with_parts(whole, PARTS)
    assert (parts.parts, parts.shape) == (PARTS, whole.shape)
    np.testing.assert_array_equal(dequantize(parts), dequantize(whole))
    np.testing.assert_array_equal(with_parts(parts, 1).codes, whole.codes)
    np.testing.assert_array_equal(with_parts(parts, 2).codes, with_parts(whole, 2).codes)


def test_contiguous_bytes_are_contiguous_rows() -> None:
    """Each part of the bytes, with its part of the scales, is the matrix of these rows alone."""
    whole = quantize(jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, COLUMNS), np.float32)), "nf4", 64, False)
    codes, scales = (np.split(np.asarray(x), PARTS) for x in (with_parts(whole, PARTS).codes, whole.scales))
    expected = np.split(np.asarray(dequantize(whole)), PARTS)
    for part in range(PARTS):
        own = dataclasses.replace(whole, codes=jnp.asarray(codes[part]), scales=jnp.asarray(scales[part]))
        np.testing.assert_array_equal(dequantize(own), expected[part])


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [3, 100])  # few rows and many are multiplied in different ways on a CPU
def test_products_and_gradients(rows: int) -> None:
    whole, x = matrices(), jnp.asarray(np.random.default_rng(2).standard_normal((rows, ROWS), np.float32))
    dense = np.asarray(dequantize(whole), np.float64)

    def run(x: jax.Array) -> jax.Array:
        return matmul(x, with_parts(whole, PARTS))

    y, pull_back = jax.vjp(run, x)
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ dense, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pull_back(y)[0], np.asarray(y, np.float64) @ dense.T, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_split() -> None:
    assert can_split_rows(matrices(), 4)
    assert not can_split_rows(matrices(), 8)  # 32 rows would split a block of 64
    with pytest.raises(ValueError, match="multiples of 8 x 64, found 256"):
        with_parts(matrices(), 8)
    flat = quantize(jnp.ones((100, 8)))
    assert not can_split_rows(flat, 2)
    with pytest.raises(UnsupportedError, match="split over a tensor axis"):
        matmul(jnp.ones((2, ROWS)), with_parts(matrices(), 2), implementation="pallas")
