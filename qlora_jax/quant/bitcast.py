"""Numbers in bfloat16 moved as the integers of their bits.

XLA's CPU backend has no moves of bfloat16. What cuts, gathers or writes such numbers becomes the same of float32, with
conversions around it, of whole tables and of the values of all layers where it can. Integers are only copied.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array


def via_bitcast(move: Callable[[Array], Array], x: Array) -> Array:
    """`move(x)`, where `move` only copies numbers; in bfloat16 a constant to differentiation."""
    if x.dtype != jnp.bfloat16:
        return move(x)
    return jax.lax.bitcast_convert_type(move(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)
