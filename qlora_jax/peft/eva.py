"""EVA (Paischer et al. 2024): A is initialized with the principal directions of the layer's inputs on the training data, B
with zeros.

    X                              inputs [tokens, in] of a linear layer, minus their mean
    X = U S V'                     A = V_r [in, r]: the r directions of the largest variance

The inputs of all layers do not fit into memory, so the singular vectors are updated batch by batch (incremental principal
component analysis, Ross et al. 2008), together with the mean m and the number n of tokens so far:

    M = [ S V' so far;   X_b - mean_b;   sqrt(n n_b / (n + n_b)) (m - mean_b) ]
    S V' = those of the r largest singular values of M, by subspace iteration     (PEFT uses torch.svd_lowrank)

`InputStatistics` is an adapter that does not change its layer's result. Its statistics are stored in trainable variables,
whose "gradients" are defined as the updated statistics: the backward pass, which reads x, computes them. In this way the
model's scan over layers collects the statistics of every layer without any change to the model. Tokens that the loss does
not depend on (padding) have a gradient of zero and do not count.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.nn import LayerContext, Linear
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.method import Method

_OVERSAMPLING = 8  # directions in addition to r in the subspace iteration
_ITERATIONS = 3
_CONVERGED = 0.99  # least cosine between a direction before a batch and the same direction after it


@dataclasses.dataclass(frozen=True)
class EVA(Method):
    """The collection of input statistics of the layers that a LoRA adapts; models take it in place of a method."""

    lora: LoRA

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, InputStatisticsSpec]":
        """See `method.Method`."""
        ranks = {path: [self.lora.rank_of(name) for name in layers[path]] for path in self.lora.targets(layers)}
        return {path: InputStatisticsSpec(max(of_layers)) for path, of_layers in ranks.items()}


@dataclasses.dataclass(frozen=True)
class InputStatisticsSpec:
    """The input statistics of a linear layer.

    Attributes:
        rank: number of directions.
    """

    rank: int

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "InputStatistics":
        """Return new, empty statistics for one layer."""
        if self.rank > in_features:
            raise OptionError(f"init_lora_weights eva: expected a rank of at most {in_features}, found {self.rank}")
        return InputStatistics(in_features, self.rank)


class InputStatistics(nnx.Module):
    """The statistics of the inputs of one linear layer.

    Attributes:
        directions: float32 `[r, in]`, S V'.
        mean: float32 `[in]`, the mean of the inputs.
        count: float32 scalar, the number of tokens so far.
        least_cosine: float32 scalar, the least cosine between a direction before the last batch and the same after it.
    """

    def __init__(self, in_features: int, rank: int) -> None:
        self.directions = nnx.LoRAParam(jnp.zeros((rank, in_features), jnp.float32))
        self.mean = nnx.LoRAParam(jnp.zeros((in_features,), jnp.float32))
        self.count = nnx.LoRAParam(jnp.zeros((), jnp.float32))
        self.least_cosine = nnx.LoRAParam(jnp.zeros((), jnp.float32))

    def __call__(self, x: Array, linear: Linear, context: LayerContext) -> Array:
        statistics = (self.directions[...], self.mean[...], self.count[...], self.least_cosine[...])
        y: Any = _with_statistics(linear.base(x), x, statistics)
        return y


def converged(statistics: Any) -> bool:
    """Return whether the last batch has changed no direction of any layer by more than the tolerance."""
    return all(bool((leaf > _CONVERGED).all()) for leaf in _named(statistics, "least_cosine"))


def tokens_seen(statistics: Any) -> int:
    """Return the number of tokens that the statistics contain, of the layer with the fewest."""
    return int(min(leaf.min() for leaf in _named(statistics, "count")))


def unit_directions(directions: Array) -> Array:
    """Return the directions `[..., r, in]`, scaled to norm 1; directions of zeros remain zero."""
    length = jnp.linalg.norm(directions, axis=-1, keepdims=True)
    return directions / jnp.where(length > 0, length, 1)


def _named(statistics: Any, name: str) -> list[Array]:
    leaves = jax.tree_util.tree_leaves_with_path(statistics)
    return [leaf for path, leaf in leaves if name in jax.tree_util.keystr(path, simple=True, separator=".").split(".")]


@jax.custom_vjp
def _with_statistics(y: Array, x: Array, statistics: tuple[Array, ...]) -> Array:
    """Return y. The gradient with respect to `statistics` is defined as the statistics updated with x."""
    return y


def _forward(y: Array, x: Array, statistics: tuple[Array, ...]) -> tuple[Array, Any]:
    return y, (x, statistics)


def _backward(residuals: Any, dy: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    x, statistics = residuals
    mask = (dy != 0).any(-1).reshape(-1)
    updated = update_statistics(statistics, x.reshape(-1, x.shape[-1]).astype(jnp.float32), mask)
    return dy, jnp.zeros_like(x), updated


_with_statistics.defvjp(_forward, _backward)


def update_statistics(statistics: tuple[Array, ...], x: Array, mask: Array) -> tuple[Array, Array, Array, Array]:
    """Return (directions, mean, count, least cosine) updated with one batch.

    Args:
        statistics: (directions, mean, count, least cosine) before the batch.
        x: float32 `[tokens, in]`, the inputs.
        mask: bool `[tokens]`, the tokens that count.
    """
    directions, mean, count, _ = statistics
    weight = mask.astype(jnp.float32)[:, None]
    new = weight.sum()
    mean_of_batch = (weight * x).sum(0) / jnp.maximum(new, 1)
    centred = weight * (x - mean_of_batch[None, :])
    total = jnp.maximum(count + new, 1)
    shift = jnp.sqrt(count * new / total) * (mean - mean_of_batch)
    rows = jnp.concatenate([directions, centred, shift[None, :]])
    found = _largest(rows, directions.shape[0])
    cosine = jnp.abs((unit_directions(found) * unit_directions(directions)).sum(1)).min()
    return found, (count * mean + new * mean_of_batch) / total, count + new, cosine


def _largest(rows: Array, rank: int) -> Array:
    """Return S V' `[rank, in]` of the largest singular values of `[n, in]`; each direction's largest entry is positive."""
    width = min(rank + _OVERSAMPLING, *rows.shape)
    q = jax.random.normal(jax.random.key(0), (rows.shape[1], width))
    for _ in range(_ITERATIONS):
        q, _ = jnp.linalg.qr(rows.T @ jnp.linalg.qr(rows @ q)[0])
    _, s, vt = jnp.linalg.svd(rows @ q, full_matrices=False)
    found = s[:rank, None] * (vt[:rank] @ q.T)
    found = jnp.pad(found, ((0, rank - found.shape[0]), (0, 0)))
    largest = jnp.take_along_axis(found, jnp.abs(found).argmax(1)[:, None], 1)
    return jnp.where(largest < 0, -found, found)
