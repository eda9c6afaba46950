"""Matrices in slots, of which each row of a batch takes one: the A or B of a bank of adapters.

A scan over layers slices each layer's leaves out of their stacks. XLA for TPUs may copy such a slice, all slots of the
layer, before it gathers from it. A scan that provides the index of the layer instead gathers from the slots of all layers,
which are (layers K) matrices in one row, and nothing is copied.

Training takes the matrices of a micro-batch's rows out of all layers at once, before the scan (`RowMatrices`): they are read
in three passes, and their gradient is one of the rows and not of the slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

__all__ = ["IndexedSlots", "RowMatrices", "SlotMatrices"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotMatrices:
    """The matrices of K slots, `[K, in, out]`; those of a stack of layers are `[layers, K, in, out]`.

    Attributes:
        values: the array.
    """

    values: Array

    def of_rows(self, ids: Array) -> Array:
        """Return the matrix of each row, `[rows, in, out]`, for the slots int32 `[rows]`; others are read as the nearest."""
        return self.values.at[ids].get(mode="clip")

    def of_row(self, id: Array) -> Array:
        """Return one row's matrix, `[in, out]`, for the slot, int32 scalar: one slice, where `of_rows` is a gather."""
        return jax.lax.dynamic_index_in_dim(self.values, jnp.clip(id, 0, self.values.shape[0] - 1), keepdims=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexedSlots:
    """The slots of one layer, not sliced out of those of all layers.

    Attributes:
        stack: `[layers, K, in, out]`.
        index: the layer, int32 scalar.
    """

    stack: SlotMatrices
    index: Array

    def of_rows(self, ids: Array) -> Array:
        """See `SlotMatrices.of_rows`."""
        values = self.stack.values
        slots = values.shape[1]
        flat = values.reshape(-1, *values.shape[2:])
        return flat.at[self.index * slots + jnp.clip(ids, 0, slots - 1)].get(mode="clip")

    def of_row(self, id: Array) -> Array:
        """See `SlotMatrices.of_row`."""
        values = self.stack.values
        start = (self.index, jnp.clip(id, 0, values.shape[1] - 1), 0, 0)
        return jax.lax.dynamic_slice(values, start, (1, 1, *values.shape[2:]))[0, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowMatrices:
    """The matrix of each row, `[rows, in, out]`, taken out of the slots before; of a stack of layers `[layers, rows, …]`.

    Attributes:
        values: the array.
    """

    values: Array

    def of_rows(self, ids: Array) -> Array:
        """Return the matrices; the ids are 0, 1, 2, …, or these twice where a row is a pair of sequences."""
        return self.values if ids.shape[0] == self.values.shape[0] else self.values.at[ids].get(mode="clip")

    def of_row(self, id: Array) -> Array:
        """See `SlotMatrices.of_row`."""
        return jax.lax.dynamic_index_in_dim(self.values, jnp.clip(id, 0, self.values.shape[0] - 1), keepdims=False)
