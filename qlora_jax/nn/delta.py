"""The trainable difference from a frozen parameter, for parameters that train in full (PEFT's modules_to_save) or in some
rows (PEFT's trainable_token_indices).

PEFT trains a copy of the parameter. Here the trainable value is the difference from the frozen parameter, which starts at
zero. The gradients are the same, an adapter of zeros is always the base model, and a change that is too small for bfloat16
is not lost in a bfloat16 weight. (Weight decay therefore pulls towards the base and not towards zero.) Adapter files hold
the sum, as PEFT's do.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float, Float32


class Delta(nnx.LoRAParam):
    """A float32 difference from a frozen parameter; it is trained and saved with the adapter."""


def add_delta(weight: Float[Array, "*shape"], delta: Float32[Array, "*shape"] | None) -> Float[Array, "*shape"]:
    """Return weight + delta, rounded once to the dtype of the weight; without a delta, return the weight."""
    return weight if delta is None else (weight.astype(jnp.float32) + delta).astype(weight.dtype)


def value_of(weight: nnx.Param, delta: Delta | None) -> Array:
    """Return the value of a frozen parameter plus its trainable difference, if it has one."""
    return add_delta(weight[...], None if delta is None else delta[...])
