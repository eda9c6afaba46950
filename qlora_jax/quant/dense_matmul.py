"""Products of two arrays of activations, in the form that each platform is fast at; sums are in float32 everywhere.

A GPU and a TPU take any form. XLA's CPU backend is at the speed of the machine only

    for operands in bfloat16, where the result is asked for in float32 (else it multiplies in float32: half the speed)
    where there is more than one row of them (else it converts all of the second operand first: 25 times slower)
    where the axis that is summed over is the last of the first operand (else up to five times slower)

so there the result is rounded afterwards, one row gets a second one of zeros, and a first operand that lies otherwise is
turned first: the smaller of the two. In bfloat16 it gets one more row of zeros, too: XLA takes a turned operand back into
the product, barrier or not, finds no such product in bfloat16, and converts both operands to float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def einsum(equation: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """`jnp.einsum` of two matrices, or of two stacks of them, in `dtype` (that of a if None).

    Every axis is in two of the three arrays, or in all. Only reverse mode differentiates it: of a choice among platforms,
    JAX itself would keep what each of them needs.
    """
    result: Any = _einsum(equation, a, b, jnp.dtype(a.dtype if dtype is None else dtype))
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, a: Array, b: Array, dtype: Any) -> Array:
    plain = partial(jnp.einsum, equation, preferred_element_type=dtype)
    return jax.lax.platform_dependent(a, b, cpu=partial(_on_cpu, equation, dtype=dtype), default=plain)


def _einsum_forward(equation: str, a: Array, b: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return _einsum(equation, a, b, dtype), (a, b)


def _einsum_backward(equation: str, _: Any, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    a, b = kept
    operands, _, of_result = equation.partition("->")
    of_a, _, of_b = operands.partition(",")
    gradient = gradient.astype(a.dtype)
    of_a_gradient = einsum(f"{of_result},{of_b}->{of_a}", gradient, b, a.dtype)
    return of_a_gradient, einsum(f"{of_result},{of_a}->{of_b}", gradient, a, b.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def _on_cpu(equation: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    operands, _, of_result = equation.partition("->")
    of_a, _, of_b = operands.partition(",")
    summed = next(axis for axis in of_a if axis in of_b and axis not in of_result)
    if of_a[-1] == summed:
        one_row = a.shape[-2] == 1 and a.dtype == jnp.bfloat16 and of_a[-2] == of_result[-2]
        if one_row:
            a = jnp.concatenate([a, jnp.zeros_like(a)], axis=-2)
        result = jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(dtype)
        return result[..., :1, :] if one_row else result
    if a.size > b.size:
        turned = f"{of_b},{of_a}->{of_result[:-2]}{of_result[-1]}{of_result[-2]}"
        return jax.lax.optimization_barrier(_on_cpu(turned, b, a, dtype)).swapaxes(-1, -2)
    turned = f"{of_a[:-2]}{of_a[-1]}{of_a[-2]},{of_b}->{of_result}"
    a = a.swapaxes(-1, -2)
    if a.dtype != jnp.bfloat16:
        return _on_cpu(turned, jax.lax.optimization_barrier(a), b, dtype)
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, 1), (0, 0)])
    own = of_result.index(of_a[-1])
    return jax.lax.slice_in_dim(_on_cpu(turned, a, b, dtype), 0, -1, axis=own - len(of_result))


@jax.custom_vjp
def dense_matmul(x: Array, w: Array) -> Array:
    """x `[n, k]` times a dense w `[k, m]` of any dtype, computed and returned in the dtype of x; the gradient of w is summed
    and returned in the dtype of w."""
    return einsum("nk,km->nm", x, w.astype(x.dtype))


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return dense_matmul(x, w), (x, w)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    return einsum("nm,km->nk", dy, w.astype(dy.dtype)), einsum("nk,nm->km", x, dy, w.dtype)


dense_matmul.defvjp(_forward, _backward)
