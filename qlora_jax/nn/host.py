"""Arrays that stay in host memory, come to the device where they are read, and whose gradients go back.

    forward    a copy on the device                       inside the scan over layers: of one layer
    backward   the copy again; its gradient to the host   as soon as it is made

A stack of layers in host memory is cut by `jax.lax.scan` like any other, so that the device never holds more of it, or of
its gradient, than the layer at hand.

JAX knows where an array of a traced function lies only if the function itself put it there, and the gradient of a function
has the type of its argument. So the gradient is taken with respect to a stand-in, which is the array put to the host by
name: its value is never read, and the compiler drops it.
"""

import dataclasses
from types import EllipsisType
from typing import Any

import jax
from jax import Array, memory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostArray:
    """An array in host memory, as the value of an `nnx.Variable`: `variable[...]` is its copy on the device.

    Attributes:
        array: what is read; a constant to differentiation.
        stand_in: what differentiation is with respect to: the array put to the host by name, never read.
    """

    array: Array
    stand_in: Array

    def __getitem__(self, index: EllipsisType) -> Array:
        copy: Any = _fetch(self.array, self.stand_in)
        return copy


def to_host(tree: Any) -> Any:
    """The leaves in host memory, in a traced function."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory.Space.Host), tree)


def to_device(tree: Any) -> Any:
    """The leaves in device memory, in a traced function; those that are there already are not copied."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, memory.Space.Device), tree)


def fetched(tree: Any) -> Any:
    """The tree with copies on the device in place of `HostArray`s, in a traced function: for what reads them in a loop, so
    that each comes to the device, and its gradient goes back, once."""

    def fetch(leaf: Any) -> Any:
        return leaf[...] if isinstance(leaf, HostArray) else leaf

    return jax.tree.map(fetch, tree, is_leaf=lambda leaf: isinstance(leaf, HostArray))


def brought_to_device(tree: Any) -> Any:
    """Copies on the device of leaves that lie in host memory; to be called outside of a traced function."""

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
