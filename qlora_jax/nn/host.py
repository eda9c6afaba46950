"""Arrays in host memory that are copied to the device where they are read, and whose gradients are copied back.

    forward    copy to the device                                inside the scan over layers: one layer at a time
    backward   copy again; copy the gradient to the host         as soon as the gradient is computed

`jax.lax.scan` slices a stack of layers in host memory like any other array. So the device never holds more of the stack, or
of its gradient, than one layer.

In a traced function, JAX knows an array's memory space only if the function itself moved the array, and a gradient has the
type of the argument. Therefore the gradient is taken with respect to a second array, which the function moves to the host
explicitly. The value of this second array is never read, and the compiler removes it.
"""

import dataclasses
from types import EllipsisType
from typing import Any

import jax
from jax import Array, memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostArray:
    """An array in host memory, as the value of an `nnx.Variable`: `variable[...]` returns a copy on the device.

    Attributes:
        array: the array that is read; a constant in the gradient.
        stand_in: the array that the gradient is taken with respect to, explicitly moved to the host and never read.
    """

    array: Array
    stand_in: Array

    def __getitem__(self, index: EllipsisType) -> Array:
        copy: Any = _fetch(self.array, self.stand_in)
        return copy


def to_host(tree: Any) -> Any:
    """Return the tree with its leaves in host memory; for use in a traced function."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    """Return the tree with its leaves in device memory, copied only if needed; for use in a traced function."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory.Space.Device), tree)


def fetch_to_device(tree: Any) -> Any:
    """Return the tree with each `HostArray` replaced by a copy on the device; for use in a traced function.

    If a loop reads the arrays, this copies each of them, and its gradient, once instead of in every iteration.
    """

    def fetch(leaf: Any) -> Any:
        return leaf[...] if isinstance(leaf, HostArray) else leaf

    return jax.tree.map(fetch, tree, is_leaf=lambda leaf: isinstance(leaf, HostArray))


def copy_to_device(tree: Any) -> Any:
    """Return the tree with leaves in host memory replaced by copies on the device; for use outside of traced functions."""

    def bring(leaf: Array) -> Array:
        kind = leaf.sharding.memory_kind
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if kind == "pinned_host" else leaf

    return jax.tree.map(bring, tree)


@jax.custom_vjp
def _fetch(array: Array, stand_in: Array) -> Array:
    return to_device(array)


def _forward(array: Array, stand_in: Array) -> tuple[Array, None]:
    return to_device(array), None


def _backward(_: None, gradient: Array) -> tuple[None, Array]:
    return None, to_host(gradient)


_fetch.defvjp(_forward, _backward)
