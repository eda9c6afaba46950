"""Products of two arrays of activations, in the form that each platform is fast at; sums are in float32 everywhere.

A GPU and a TPU take any form. XLA's CPU backend is at the speed of the machine only

    for operands in bfloat16, where the result is asked for in float32 (else it multiplies in float32: half the speed)
    where the axis that is summed over is the last of the first operand (else up to five times slower)

so there the result is rounded afterwards, and a first operand that lies otherwise is turned first: the smaller of the two.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def product(equation: str, a: Array, b: Array, dtype: DTypeLike | None = None) -> Array:
    """`jnp.einsum` of two matrices, or of two stacks of them, in `dtype` (that of a if None). Not to be differentiated on
    its own: the choice among platforms would keep operands of both ways."""
    dtype = jnp.dtype(a.dtype if dtype is None else dtype)
    plain = partial(jnp.einsum, equation, preferred_element_type=dtype)
    return jax.lax.platform_dependent(a, b, cpu=partial(_on_cpu, equation, dtype=dtype), default=plain)


def _on_cpu(equation: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    operands, _, of_result = equation.partition("->")
    of_a, _, of_b = operands.partition(",")
    summed = next(axis for axis in of_a if axis in of_b and axis not in of_result)
    if of_a[-1] == summed:
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32).astype(dtype)
    if a.size > b.size:
        turned = f"{of_b},{of_a}->{of_result[:-2]}{of_result[-1]}{of_result[-2]}"
        return jax.lax.optimization_barrier(_on_cpu(turned, b, a, dtype)).swapaxes(-1, -2)
    turned = f"{of_a[:-2]}{of_a[-1]}{of_a[-2]},{of_b}->{of_result}"
    return _on_cpu(turned, jax.lax.optimization_barrier(a.swapaxes(-1, -2)), b, dtype)


@jax.custom_vjp
def dense_product(x: Array, w: Array) -> Array:
    """x `[n, k]` times a dense w `[k, m]` of any dtype, computed and returned in the dtype of x; the gradient of w is summed
    and returned in the dtype of w."""
    return product("nk,km->nm", x, w.astype(x.dtype))


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return dense_product(x, w), (x, w)


def _backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    return product("nm,km->nk", dy, w.astype(dy.dtype)), product("nk,nm->km", x, dy, w.dtype)


dense_product.defvjp(_forward, _backward)
