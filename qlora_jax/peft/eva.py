"""EVA (Paischer et al. 2024): A starts as the main directions of the layer's inputs on the training data, B at zero.

    X                              inputs [tokens, in] of a linear layer, less their mean
    X = U S V'                     A = V_r [in, r]: the r directions of the largest variance

The inputs of all layers of a batch would not fit, so the singular vectors are kept up to date batch by batch (Ross et al.
2008, as in incremental principal components), with the mean m and the number n of tokens so far:

    M = [ sqrt(S) V' as it stands;   X_b - mean_b;   sqrt(n n_b / (n + n_b)) (m - mean_b) ]
    S V' = the r largest of M, by subspace iteration        (PEFT computes them by torch.svd_lowrank)

`InputWatch` is an adapter that changes nothing of what its layer computes. What it holds of the above is a variable like one
that trains, and its "gradient" is its next value: the backward pass, which sees x, hands it out. So the model's own scan
over layers collects the statistics of all layers, each where it is, and none of it knows. Tokens on which the loss does not
depend (padding) have a gradient of zero, and do not count.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.nn import Linear
from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.method import Method

_MORE = 8  # directions beyond r that the subspace iteration carries
_ITERATIONS = 3
_CONVERGED = 0.99  # cosine between the same direction before and after a batch


@dataclasses.dataclass(frozen=True)
class EVA(Method):
    """Watches the inputs of the layers that a LoRA adapts; what `models` take for a method of fine-tuning."""

    lora: LoRA

    def targets(self, layers: Mapping[str, Sequence[str]]) -> "dict[str, Watching]":
        """See `method.Method`."""
        ranks = {key: [self.lora.rank_of(name) for name in layers[key]] for key in self.lora.targets(layers)}
        return {key: Watching(max(of_layers)) for key, of_layers in ranks.items()}


@dataclasses.dataclass(frozen=True)
class Watching:
    """Makes the watch of a layer, for so many directions."""

    rank: int

    def make(self, in_features: int, out_features: int, *, layer: int | Array = 0, rngs: nnx.Rngs) -> "InputWatch":
        """The watch of one layer."""
        if self.rank > in_features:
            raise ValueError(f"init_lora_weights eva: expected a rank of at most {in_features}, found {self.rank}")
        return InputWatch(in_features, self.rank)


class InputWatch(nnx.Module):
    """The watch of a layer.

    Attributes:
        directions: float32 `[r, in]`, S V'.
        mean: float32 `[in]`.
        count: float32 scalar, tokens so far.
        least_cosine: float32 scalar, the least cosine between a direction before the last batch and after it.
    """

    def __init__(self, in_features: int, rank: int) -> None:
        self.directions = nnx.LoRAParam(jnp.zeros((rank, in_features), jnp.float32))
        self.mean = nnx.LoRAParam(jnp.zeros((in_features,), jnp.float32))
        self.count = nnx.LoRAParam(jnp.zeros((), jnp.float32))
        self.least_cosine = nnx.LoRAParam(jnp.zeros((), jnp.float32))

    def __call__(self, x: Array, linear: Linear, key: Array | None) -> Array:
        kept = (self.directions[...], self.mean[...], self.count[...], self.least_cosine[...])
        watched: Any = _watched(linear.base(x), x, kept)
        return watched


def converged(watches: Any) -> bool:
    """Whether the last batch has left the directions of all layers as they were."""
    return all(bool((leaf > _CONVERGED).all()) for leaf in _named(watches, "least_cosine"))


def tokens_seen(watches: Any) -> int:
    """Of the layer that has seen fewest."""
    return int(min(leaf.min() for leaf in _named(watches, "count")))


def unit_directions(directions: Array) -> Array:
    """Directions `[..., r, in]` of length 1; zeros stay zeros."""
    length = jnp.linalg.norm(directions, axis=-1, keepdims=True)
    return directions / jnp.where(length > 0, length, 1)


def _named(watches: Any, name: str) -> list[Array]:
    leaves = jax.tree_util.tree_leaves_with_path(watches)
    return [leaf for path, leaf in leaves if name in jax.tree_util.keystr(path, simple=True, separator=".").split(".")]


@jax.custom_vjp
def _watched(y: Array, x: Array, kept: tuple[Array, ...]) -> Array:
    return y


def _forward(y: Array, x: Array, kept: tuple[Array, ...]) -> tuple[Array, Any]:
    return y, (x, kept)


def _backward(saved: Any, dy: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    x, kept = saved
    counts = (dy != 0).any(-1).reshape(-1)
    updated = update(kept, x.reshape(-1, x.shape[-1]).astype(jnp.float32), counts)
    return dy, jnp.zeros_like(x), updated


_watched.defvjp(_forward, _backward)


def update(kept: tuple[Array, ...], x: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
    """(directions, mean, count, least cosine) with one batch more.

    Args:
        kept: the same before it.
        x: float32 `[tokens, in]`; counts: bool `[tokens]`.
    """
    directions, mean, count, _ = kept
    weight = counts.astype(jnp.float32)[:, None]
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
    """S V' `[rank, in]` of the largest singular values of rows `[n, in]`, each direction with its largest entry positive."""
    width = min(rank + _MORE, *rows.shape)
    q = jax.random.normal(jax.random.key(0), (rows.shape[1], width))
    for _ in range(_ITERATIONS):
        q, _ = jnp.linalg.qr(rows.T @ jnp.linalg.qr(rows @ q)[0])
    _, s, vt = jnp.linalg.svd(rows @ q, full_matrices=False)
    found = s[:rank, None] * (vt[:rank] @ q.T)
    found = jnp.pad(found, ((0, rank - found.shape[0]), (0, 0)))
    largest = jnp.take_along_axis(found, jnp.abs(found).argmax(1)[:, None], 1)
    return jnp.where(largest < 0, -found, found)
