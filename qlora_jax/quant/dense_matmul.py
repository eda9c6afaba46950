"""Products of two dense arrays, in a form that is fast on each platform; sums are in float32 everywhere.

GPUs and TPUs are fast with any form. XLA's CPU backend reaches the speed of the machine only under these conditions:

    - with bfloat16 operands, the result must be float32 (else XLA multiplies in float32, at half the speed)
    - with bfloat16 operands, there must be more than one row (else XLA converts the whole second operand: 25 times slower)
    - the summed axis must be the last axis of the first operand (else up to five times slower)

Therefore, on a CPU the product is computed in float32 and rounded afterwards; a single row is padded with a row of zeros;
and if the summed axis of the first operand is not its last, the smaller of the two operands is made the first one and
transposed. In bfloat16, a transposed operand is also padded with a row of zeros. Otherwise XLA fuses the transposition into
the product (in spite of an optimization barrier), has no such product in bfloat16, and converts both operands to float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.quant.targets import by_platform


def einsum(equation: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """Return `jnp.einsum` of two matrices, or of two stacks of matrices.

    Only reverse-mode differentiation is supported. The differentiation rule is a custom one because JAX's own rule for a
    choice among platforms would save the residuals of every platform.

    Args:
        equation: e.g. "nk,km->nm"; every axis must be in two or in all of the three arrays.
        a: the first operand.
        b: the second operand.
        dtype: dtype of the result; None: that of a.
    """
    result: Any = _einsum(equation, a, b, jnp.dtype(a.dtype if dtype is None else dtype))
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    plain = partial(jnp.einsum, equation, preferred_element_type=dtype)
    return by_platform(a, b, cpu=partial(_on_cpu, equation, dtype=dtype), default=plain)


def _einsum_forward(equation: str, a: Array, b: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, a, b, dtype), (a, b)


def _einsum_backward(equation: str, _: Any, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = residuals
    axes_a, axes_b, axes_result = _axes(equation)
    gradient = gradient.astype(a.dtype)
    da = einsum(f"{axes_result},{axes_b}->{axes_a}", gradient, b, a.dtype)
    return da, einsum(f"{axes_result},{axes_a}->{axes_b}", gradient, a, b.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def _axes(equation: str) -> tuple[str, str, str]:
    """Return the axes of a, of b and of the result."""
    operands, _, axes_result = equation.partition("->")
    axes_a, _, axes_b = operands.partition(",")
    return axes_a, axes_b, axes_result


def _on_cpu(equation: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    """Return the einsum in the form that XLA's CPU backend is fast at; see the module's docstring."""
    axes_a, axes_b, axes_result = _axes(equation)
    summed = next(axis for axis in axes_a if axis in axes_b and axis not in axes_result)
    if axes_a[-1] == summed:
        one_row = a.shape[-2] == 1 and a.dtype == jnp.bfloat16 and axes_a[-2] == axes_result[-2]
        if one_row:
            a = jnp.concatenate([a, jnp.zeros_like(a)], axis=-2)
        result = jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(dtype)
        return result[..., :1, :] if one_row else result
    if a.size > b.size:
        transposed = f"{axes_b},{axes_a}->{axes_result[:-2]}{axes_result[-1]}{axes_result[-2]}"
        return jax.lax.optimization_barrier(_on_cpu(transposed, b, a, dtype)).swapaxes(-1, -2)
    transposed = f"{axes_a[:-2]}{axes_a[-1]}{axes_a[-2]},{axes_b}->{axes_result}"
    a = a.swapaxes(-1, -2)
    if a.dtype != jnp.bfloat16:
        return _on_cpu(transposed, jax.lax.optimization_barrier(a), b, dtype)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, 1), (0, 0)])
    padded = axes_result.index(axes_a[-1])
    return jax.lax.slice_in_dim(_on_cpu(transposed, a, b, dtype), 0, -1, axis=padded - len(axes_result))


@jax.custom_vjp
def dense_matmul(x: Array, w: Array) -> Array:
    """Return x `[n, k]` times a dense w `[k, m]`, computed in the dtype of x: `[n, m]`.

    The gradient of w is summed and returned in the dtype of w.
    """
    return einsum("nk,km->nm", x, w.astype(x.dtype))


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return dense_matmul(x, w), (x, w)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = residuals
    return einsum("nm,km->nk", dy, w.astype(dy.dtype)), einsum("nk,nm->km", x, dy, w.dtype)


dense_matmul.defvjp(_forward, _backward)
