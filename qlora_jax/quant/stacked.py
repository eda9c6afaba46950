"""One matrix of a stack, represented by the stack and the index of the matrix.

A scan over layers slices each layer's leaves out of their stacks. XLA fuses such a slice into its own operations, but before
a kernel the slice is a copy of the packed bytes (read, write, read again). If a scan provides the index of the layer
instead, a kernel can read the matrix directly from the stack.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from qlora_jax.quant.mixed import MixedStack, MixedTensor
from qlora_jax.quant.slots import IndexedSlots, SlotMatrices
from qlora_jax.quant.tensor import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedTensor:
    """The matrix with a given index in a stack.

    Attributes:
        stack: `[layers, in, out]`.
        index: int32 scalar.
    """

    stack: QuantizedTensor
    index: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    def matrix(self) -> QuantizedTensor:
        """Return the matrix, sliced out of the stack."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, keepdims=False), self.stack)


def index_in_stack(layers: Any, *, packed: bool = True, slots: bool = False) -> tuple[Any, Callable[[Any, Array], Any]]:
    """Return (scanned, layer_of) for a scan over stacked layers that does not slice their 4-bit matrices.

    `jax.lax.scan` runs over `scanned`. In its body, layer_of(slice of scanned, index of the layer) returns a tree like one
    layer, in which each 4-bit matrix is a `StackedTensor`, and each matrix of a `MixedStack` a `MixedTensor`.

    Args:
        packed: whether stacks that are 4-bit as a whole are indexed too; otherwise the scan slices them.
        slots: whether the slots of adapters (`SlotMatrices`) are indexed too. Their gradient would then be as large as the
            slots of all layers, in each layer.
    """

    def is_kept(leaf: Any) -> bool:
        return (
            isinstance(leaf, MixedStack)
            or (packed and isinstance(leaf, QuantizedTensor))
            or (slots and isinstance(leaf, SlotMatrices))
        )

    def indexed(leaf: Any, index: Array) -> Any:
        if isinstance(leaf, SlotMatrices):
            return IndexedSlots(leaf, index)
        return MixedTensor(leaf, index) if isinstance(leaf, MixedStack) else StackedTensor(leaf, index)

    leaves, tree = jax.tree.flatten(layers, is_leaf=is_kept)
    scanned = [None if is_kept(leaf) else leaf for leaf in leaves]

    def layer_of(parts: Any, index: Array) -> Any:
        pairs = zip(leaves, parts, strict=True)
        return tree.unflatten([indexed(leaf, index) if is_kept(leaf) else part for leaf, part in pairs])

    return scanned, layer_of
