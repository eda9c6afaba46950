"""Measures how far two models are apart, by their logits on the same tokens."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.models import T5, Model

__all__ = ["Drift", "logit_drift", "sample_logits"]


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far the logits of two models are apart.

    Attributes:
        max, mean: the largest and the mean absolute difference.
        same_token: the share of positions at which both models give the same token the highest logit.
        positions: the number of positions that were compared.
    """

    max: float
    mean: float
    same_token: float
    positions: int


def sample_logits(model: Model, batches: Sequence[Array | np.ndarray]) -> list[np.ndarray]:
    """Return float32 logits `[b, t, vocabulary]` of int32 token batches `[b, t]`.

    They are on the host, so that the model can be dropped before the second one is loaded. An encoder-decoder reads the
    first half of each row, and its logits are those of the second half.
    """
    graph, state = nnx.split(model)

    def run_model(state: Any, tokens: Array) -> Array:
        merged = nnx.merge(graph, state)
        if not isinstance(merged, T5):
            return merged(tokens).astype(jnp.float32)
        sources, targets = jnp.split(tokens, [(tokens.shape[1] + 1) // 2], axis=1)
        start = jnp.full((tokens.shape[0], 1), merged.config.decoder_start_token_id, tokens.dtype)
        return merged(sources, jnp.concatenate([start, targets[:, :-1]], axis=1)).astype(jnp.float32)

    run = jax.jit(run_model)
    return [np.asarray(run(state, jnp.asarray(tokens))) for tokens in batches]


def logit_drift(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Drift:
    """Return the differences between two results of `sample_logits` on the same tokens."""
    differences = [np.abs(a - b) for a, b in zip(before, after, strict=True)]
    same = [(a.argmax(-1) == b.argmax(-1)).sum() for a, b in zip(before, after, strict=True)]
    positions = sum(math.prod(a.shape[:-1]) for a in before)
    return Drift(
        max=float(max(difference.max() for difference in differences)),
        mean=float(sum(difference.sum(dtype=np.float64) for difference in differences) / sum(a.size for a in before)),
        same_token=float(sum(same) / positions),
        positions=positions,
    )
