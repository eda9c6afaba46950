"""NEFTune (Jain et al. 2023): noise on the embeddings while training, uniform in ±alpha / sqrt(L d).

d is the number of features, and L the number of tokens of a row: without padding if `segment_ids` are given, else the length
of the row, as in TRL.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def neftune_noise(
    x: Float[Array, "b t d"], segment_ids: Int[Array, "b t"] | None, alpha: float, key: Array
) -> Float[Array, "b t d"]:
    """Return NEFTune's noise for embedded tokens, float32 in the shape of x.

    Args:
        x: `[b, t, d]`, the embedded tokens.
        segment_ids: int32 `[b, t]`, 0 for padding; None: no padding.
        alpha: strength of the noise.
        key: random key.
    """
    _, length, features = x.shape
    tokens = jnp.full((1,), length) if segment_ids is None else jnp.maximum((segment_ids > 0).sum(1), 1)
    bound = alpha / jnp.sqrt(tokens.astype(jnp.float32) * features)
    return bound[:, None, None] * jax.random.uniform(key, x.shape, jnp.float32, -1.0, 1.0)
