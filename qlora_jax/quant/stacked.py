"""One matrix of a stack, named by its number and not cut out.

A scan over layers cuts each layer's leaves out of their stacks. For XLA's own operations the cut is fused away; for a kernel
it is a copy of the packed bytes (read, written, read again). Where a scan carries the number of the layer instead, a kernel
reads the matrix where it lies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from qlora_jax.quant.tensor import QuantizedTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedTensor:
    """Matrix `index` of a stack.

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
        """The matrix, cut out of the stack."""
        return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.index, keepdims=False), self.stack)


def keep_stacked(layers: Any) -> tuple[Any, Callable[[Any, Array], Any]]:
    """What of stacked layers is to be scanned over, and how a layer is made of its share and its number.

    `jax.lax.scan` runs over the first result; in its body, the second gives a tree like a layer of `layers`, in which each
    matrix in 4 bits is a `StackedTensor`.
    """
    leaves, tree = jax.tree.flatten(layers, is_leaf=_is_packed)
    scanned = [None if _is_packed(leaf) else leaf for leaf in leaves]

    def layer_of(parts: Any, index: Array) -> Any:
        whole = zip(leaves, parts, strict=True)
        return tree.unflatten([StackedTensor(leaf, index) if _is_packed(leaf) else part for leaf, part in whole])

    return scanned, layer_of


def _is_packed(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)
