"""Sharding over several devices: the batch and the frozen weights are split over one mesh axis (FSDP).

    batch                     [b, t]              split along b
    stacks                    [layers, in, out]   split along in if the devices divide it, else along out, else replicated
    other weights             [..., out]          split along out if the devices divide it, else replicated
    adapter, optimizer state                      replicated, because they are small

A stack is split along in and not along out because gathered parts of rows are contiguous in memory. Columns would have to be
interleaved: XLA for GPUs gathers only along the outermost axis of memory and would store a transposed copy of all packed
weights.

Each layer gathers its own weights inside the scan, as packed bytes. `gather` requests this explicitly, because XLA would
otherwise gather activations or dequantised floats. The mesh is the one of JAX's context (`jax.set_mesh`); without a mesh,
every function here returns its input unchanged.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"
M = TypeVar("M", bound=nnx.Module)


def data_mesh() -> Mesh | None:
    """Return a mesh of all devices, or None if there is only one device."""
    devices = jax.devices()
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None


def mesh_context(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Return a context in which the mesh is JAX's current one; without a mesh nothing changes."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def abstract_module(make: Callable[..., M], *arguments: Any) -> M:
    """Return the module that `make(*arguments)` returns, with shapes in place of arrays and without shardings.

    In the context of a mesh `nnx.eval_shape` replaces the whole value of a variable by the shape of one array, also where
    that value is a quantised matrix. The mesh is therefore left for the time of this function.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return nnx.eval_shape(make, *arguments)


def frozen_sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> NamedSharding | None:
    """Return the sharding of a frozen leaf of this shape, or None (the default device) without a mesh."""
    if mesh is None:
        return None
    axis = split_axis(shape, mesh.size)
    return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, AXIS))


class ReplicatedVariable(nnx.Variable):
    """A frozen variable of an adapter; like the adapter, it is replicated on all devices."""


def frozen_shapes(mesh: Mesh | None, frozen: Any) -> Any:
    """Return the frozen part of a model as `ShapeDtypeStruct`s with the shardings that training uses."""

    def shapes_of(variable: Any) -> Any:
        def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
            sharding = frozen_sharding(mesh, leaf.shape)
            if sharding is not None and isinstance(variable, ReplicatedVariable):
                sharding = NamedSharding(sharding.mesh, P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape_of, variable)

    return jax.tree.map(shapes_of, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def split_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """Return the axis along which a frozen leaf is split over so many devices, or None if the leaf is replicated."""
    axes = range(max(len(shape) - 2, 1), len(shape))
    return next((axis for axis in axes if shape[axis] % devices == 0), None)


def put_on_mesh(mesh: Mesh | None, tree: Any, spec: P) -> Any:
    """Return the tree with every leaf put on the mesh with the partition spec `spec`."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, spec))


def gather(tree: Any) -> Any:
    """Return the tree with every leaf replicated on the devices of the context's mesh; for use in a traced function."""
    if devices_of_context() == 1:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, P()), tree)


def devices_of_context() -> int:
    """Return the number of devices of the context's mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def over_rows(function: Callable[..., Array], frozen: Any, *rows: Array, spread: P | None = None) -> Array:
    """Return function(frozen, *rows), computed by each device for its own rows.

    Args:
        function: its result is an array with a leading axis of rows.
        frozen: pytree that all rows use.
        rows: arrays with a leading axis of rows.
        spread: partition spec of the leaves of `frozen`; None: each device gets all of `frozen`.
    """
    if devices_of_context() == 1:
        return function(frozen, *rows)
    specs = (spread or P(), *[P(AXIS)] * len(rows))
    return jax.shard_map(function, in_specs=specs, out_specs=P(AXIS), check_vma=False)(frozen, *rows)


def shard_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of arrays with a leading batch axis so that each device runs it on its own rows.

    XLA cannot partition kernels such as splash attention by itself.
    """
    if devices_of_context() == 1:
        return function
    return jax.shard_map(function, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
