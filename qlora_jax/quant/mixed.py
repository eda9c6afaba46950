"""A stack of matrices of which some are stored in 4 bits and the others dense.

Checkpoints that are quantised already often leave a few layers dense, because these suffer most from 4 bits. A stack of such
layers has two parts, each of which is a stack of its own:

    packed [a, in, out] in 4 bits      dense [b, in, out]      places: for each of the a + b layers, where it is

A scan over layers cannot slice the two parts together. `index_in_stack` therefore takes a `MixedStack` out of the scanned
tree, and gives each layer a `MixedTensor`: the whole stack and the index of the layer. A product (`matmul`) chooses its part
at run time; its gradient with respect to x does the same, and saves no matrix.
"""

import dataclasses
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlora_jax.quant.tensor import QuantizedTensor

__all__ = ["MixedStack", "MixedTensor", "mixed_stack"]


@partial(jax.tree_util.register_dataclass, data_fields=("packed", "dense"), meta_fields=("places",))
@dataclasses.dataclass(frozen=True)
class MixedStack:
    """A stack of matrices `[layers, in, out]`.

    Attributes:
        packed: `[a, in, out]`, in 4 bits.
        dense: `[b, in, out]`.
        places: for each layer its index in `packed`, or -1 minus its index in `dense`.
    """

    packed: QuantizedTensor
    dense: Array
    places: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.places), *self.dense.shape[1:])

    @property
    def ndim(self) -> int:
        return 3

    @property
    def dtype(self) -> Any:
        return self.dense.dtype

    def matrix(self, layer: int) -> Array | QuantizedTensor:
        """Return the matrix of a layer, as it is stored."""
        place = self.places[layer]
        return self.dense[-1 - place] if place < 0 else jax.tree.map(lambda leaf: leaf[place], self.packed)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedTensor:
    """The matrix with a given index in a stack.

    Attributes:
        stack: `[layers, in, out]`.
        index: int32 scalar.
    """

    stack: MixedStack
    index: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return 2

    def place(self) -> Array:
        """Return the int32 index of the matrix in `packed`, or -1 minus its index in `dense`."""
        return jnp.asarray(np.asarray(self.stack.places, np.int32))[self.index]

    def parts(self) -> tuple[Array, QuantizedTensor, Array]:
        """Return (whether the matrix is in 4 bits, a matrix of `packed`, one of `dense`); one of the two is the matrix."""
        place = self.place()

        def take(leaf: Array, at: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(leaf, jnp.maximum(at, 0), keepdims=False)

        packed = jax.tree.map(lambda leaf: take(leaf, place), self.stack.packed)
        return place >= 0, packed, take(self.stack.dense, -1 - place)


def mixed_stack(packed: QuantizedTensor, dense: Collection[int]) -> MixedStack:
    """Return a stack like `packed` `[layers, in, out]` whose layers with these numbers are dense zeros, to be filled."""
    layers = packed.shape[0]
    places: list[int] = []
    for layer in range(layers):
        before = sum(place < 0 for place in places)
        places.append(-1 - before if layer in dense else len(places) - before)
    kept = np.asarray([layer for layer in range(layers) if layer not in dense])
    zeros = jnp.zeros((layers - len(kept), *packed.shape[1:]), packed.dtype)
    return MixedStack(jax.tree.map(lambda leaf: leaf[kept], packed), zeros, tuple(places))
