"""Copying operations (slice, gather, update) on bfloat16 arrays, carried out on the integers with the same bits.

XLA's CPU backend does not support these operations for bfloat16. It converts the operand to float32 and back, often a whole
embedding or the values of all layers. Integers are copied without conversion.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def via_bitcast(move: Callable[[Array], Array], x: Array) -> Array:
    """Return move(x) for a function that only copies elements; in bfloat16, no gradient flows through it.

    Args:
        move: the function, e.g. a slice or a gather.
        x: array of any dtype.
    """
    if x.dtype != jnp.bfloat16:
        return move(x)
    return jax.lax.bitcast_convert_type(move(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)
