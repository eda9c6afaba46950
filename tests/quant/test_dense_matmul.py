"""Products in the form that the CPU is fast at: their values, and that they have that form."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback

from qlora_jax.quant.dense_matmul import dense_matmul, einsum
from qlora_jax.quant.targets import tracing_for

FORMS = ["nk,km->nm", "nm,km->nk", "nk,nr->kr", "ntd,nsd->nts", "nts,nsd->ntd", "nts,ntd->nsd"]
ALSO = [*FORMS, "nk,nm->mk", "nk,km->mn"]  # whose results lie turned
SIZES = {"n": 3, "k": 24, "m": 40, "r": 2, "t": 10, "s": 7, "d": 5}


def operands(equation: str, dtype: Any) -> list[jax.Array]:
    generator = np.random.default_rng(0)
    shapes = [[SIZES[axis] for axis in operand] for operand in equation.split("->")[0].split(",")]
    return [jnp.asarray(generator.standard_normal(shape, np.float32), dtype) for shape in shapes]


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("result", [None, jnp.float32])
@pytest.mark.parametrize("equation", ALSO)
def test_values_are_those_of_einsum_in_float64(equation: str, result: Any, dtype: Any) -> None:
    a, b = operands(equation, dtype)
    found = jax.jit(lambda a, b: einsum(equation, a, b, result))(a, b)
    exact = np.einsum(equation, np.asarray(a, np.float64), np.asarray(b, np.float64))
    assert found.dtype == (result or dtype)
    tolerance = 1e-6 if found.dtype == jnp.float32 else 2**-8  # one rounding to bfloat16, sums in float32
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=tolerance, atol=1e-6 * np.abs(exact).max() * 4)


@pytest.mark.optimised
@pytest.mark.parametrize("equation", ["nk,km->nm", "nk,km->mn"])
def test_one_row_in_bfloat16(equation: str) -> None:
    a, b = operands(equation, jnp.bfloat16)
    found = einsum(equation, a[:1], b, jnp.float32)
    expected = np.einsum(equation, np.asarray(a[:1], np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("equation", ALSO)
def test_gradients_are_those_of_einsum(equation: str, dtype: Any) -> None:
    a, b = operands(equation, dtype)
    y, gradients = value_and_pullback(lambda a, b: einsum(equation, a, b), (a, b), jnp.cos)
    _, expected = value_and_pullback(lambda a, b: jnp.einsum(equation, a, b), (a, b), lambda _: jnp.cos(y))
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 0.05
        found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("equation", FORMS)
def test_on_a_cpu_sums_run_over_the_last_axis_into_float32(equation: str) -> None:
    a, b = operands(equation, jnp.bfloat16)
    text = jax.jit(lambda a, b: einsum(equation, a, b)).trace(a, b).lower(lowering_platforms=("cpu",)).as_text()
    (dot,) = (line for line in text.splitlines() if "dot_general" in line)
    summed = int(re.findall(r"contracting_dims = \[(\d)\]", dot)[0])
    assert summed == a.ndim - 1
    assert re.search(r"-> tensor<[\dx]+xf32>", dot)
    with tracing_for("every"):
        elsewhere = jax.jit(lambda a, b: einsum(equation, a, b)).trace(a, b).lower(lowering_platforms=("tpu",)).as_text()
    assert elsewhere.count("dot_general") == 1
    assert "optimization_barrier" not in elsewhere


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_a_dense_product(dtype: Any) -> None:
    x, w, dy = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in enumerate([(9, 24), (24, 4), (9, 4)]))
    x, dy = (np.asarray(jnp.asarray(array, dtype), np.float64) for array in (x, dy))
    w = w.astype(np.float32)
    y, pull_back = jax.vjp(dense_matmul, jnp.asarray(x, dtype), jnp.asarray(w))
    dx, dw = pull_back(jnp.asarray(dy, dtype))
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, jnp.float32)
    rounded = np.asarray(jnp.asarray(w, dtype), np.float64)
    tolerance = {"rtol": 1e-6, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-5}
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ rounded, **tolerance)
    np.testing.assert_allclose(np.asarray(dx, np.float64), dy @ rounded.T, **tolerance)
    np.testing.assert_allclose(np.asarray(dw, np.float64), x.T @ dy, rtol=1e-5, atol=1e-5)  # never rounded to bfloat16
