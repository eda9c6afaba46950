"""The kinds of attention of a decoder in its scan over layers.

If layers differ in their attention (window, position embedding), the scanned program contains every kind, and the index of a
layer's kind selects one at run time.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int

from qlora_jax.models.config import DecoderConfig


def layer_kinds(config: DecoderConfig) -> Int[Array, " layers"] | None:
    """Return the index of each layer's kind of attention, int32, or None if all layers have the same kind."""
    return None if len(config.kinds) == 1 else jnp.asarray(np.asarray(config.layer_kinds, np.int32))


def rotations_of(
    config: DecoderConfig, positions: Int[Array, "b t"]
) -> tuple[Float32[Array, "kinds b t r"], Float32[Array, "kinds b t r"]]:
    """Return (cosine, sine) of the positions for each kind of attention; (1, 0) for a kind without position embedding."""
    ropes = [kind.rope for kind in config.kinds]
    some = next(rope for rope in ropes if rope is not None)
    shape = (*positions.shape, some.head_dim // 2)
    rotations = [(jnp.ones(shape), jnp.zeros(shape)) if rope is None else rope(positions) for rope in ropes]
    cosines, sines = zip(*rotations, strict=True)
    return jnp.stack(cosines), jnp.stack(sines)


def of_kind(rotations: tuple[Array, Array], kind: Array | None) -> tuple[Array, Array]:
    """Return the (cosine, sine) of one kind, `[b, t, r]` each; None: the only kind."""
    cosine, sine = rotations
    return (cosine[0], sine[0]) if kind is None else (cosine[kind], sine[kind])
