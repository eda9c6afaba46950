"""Several devices: rows of the batch and rows of the frozen weights are spread over one mesh axis (FSDP).

    batch            [b, t]              b over the devices
    stacks           [layers, in, out]   in over the devices, where it divides; else out; else whole on each
    other weights    [..., out]          out over the devices, where it divides; else whole on each
    adapter, state                       whole on each: they are small

Parts of rows lie one after another in the gathered matrix. Columns would have to be put between each other: XLA for GPUs
gathers along the outermost axis of memory alone, and would keep a transposed copy of all packed weights beside them.

Each layer gathers its own weights inside the scan, as the packed bytes that they are: `gather` says so, since XLA left alone
would gather activations or dequantised floats instead. The mesh is JAX's own context (`jax.set_mesh`); without one, every
function here leaves its input as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"


def data_mesh() -> Mesh | None:
    """A mesh of all devices, or None where there is one device only."""
    devices = jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None


def frozen_sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a frozen leaf of that shape lies; None: on the default device."""
    if mesh is None:
        return None
    axis = split_axis(shape, mesh.size)
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, AXIS))


class Whole(nnx.Variable):
    """A frozen variable that belongs to an adapter, and lies whole on each device as it does."""


def frozen_shapes(mesh: Mesh | None, frozen: Any) -> Any:
    """The frozen part of a model as shapes that say where the job puts each leaf."""

    def placed(variable: Any) -> Any:
        def place_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = frozen_sharding(mesh, leaf.shape)
            if sharding is not None and isinstance(variable, Whole):
                sharding = NamedSharding(sharding.mesh, P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(place_leaf, variable)

    return jax.tree.map(placed, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def split_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """The axis along which a frozen leaf is spread over so many devices; None: it is whole on each."""
    axes = range(max(len(shape) - 2, 1), len(shape))
    return next((axis for axis in axes if shape[axis] % devices == 0), None)


def place(mesh: Mesh | None, tree: Any, spec: P) -> Any:
    """The leaves of a tree spread over the mesh as `spec` says."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))


def gather(tree: Any) -> Any:
    """Whole leaves on every device of the context's mesh, in a traced function."""
    if devices_of_context() == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def devices_of_context() -> int:
    """Devices of the context's mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def over_rows(function: Callable[..., Array], frozen: Any, *rows: Array, spread: P | None = None) -> Array:
    """function(frozen, *rows), an array with a leading axis of rows, with each device on its own rows.

    Args:
        spread: how the leaves of `frozen` are cut for them; None: each device gets all of it.
    """
    if devices_of_context() == 1:
        return function(frozen, *rows)
    specs = (spread or P(), *[P(AXIS)] * len(rows))
    return jax.shard_map(function, in_specs=specs, out_specs=P(AXIS), check_vma=False)(frozen, *rows)


def by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays with a leading batch axis, run by each device on its own rows (for opaque kernels)."""
    if devices_of_context() == 1:
        return function
    return jax.shard_map(function, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
