"""Sharding over several devices: where the batch, the frozen weights and the adapter are on the mesh (`nn.mesh`).

    batch                     [b, t]              split along b over `data` and `fsdp`
    frozen weights                                split over `fsdp`, and over `tensor` by their roles (`nn.roles`)
    adapter, optimizer state                      split over `tensor` by their roles; else replicated, because they are small

A stack is split over `fsdp` along in and not along out because gathered parts of rows are contiguous in memory. Columns
would have to be interleaved: XLA for GPUs gathers only along the outermost axis of memory and would store a transposed copy
of all packed weights.

Each layer gathers its own weights inside the scan, as packed bytes. `gather` requests this explicitly, because XLA would
otherwise gather activations or dequantised floats. The mesh is the one of JAX's context (`jax.set_mesh`); without a mesh,
every function here returns its input unchanged.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.hosts import put
from qlora_jax.nn.mesh import FSDP, ROWS, TENSOR, devices_of_context, row_shards, tensor_shards
from qlora_jax.nn.roles import adapter_spec, frozen_specs, layer_specs, map_variables, names_of, with_layout

M = TypeVar("M", bound=nnx.Module)
HEAD_AXES = (FSDP, TENSOR)  # the axes over which the loss splits the rows of the output head


def abstract_module(make: Callable[..., M], *arguments: Any) -> M:
    """Return the module that `make(*arguments)` returns, with shapes in place of arrays and without shardings.

    In the context of a mesh `nnx.eval_shape` replaces the whole value of a variable by the shape of one array, also where
    that value is a quantised matrix. The mesh is therefore left for the time of this function.
    """
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        return nnx.eval_shape(make, *arguments)


class ReplicatedVariable(nnx.Variable):
    """A frozen variable of an adapter; it is replicated on all devices."""


def frozen_shardings(mesh: Mesh | None, names: tuple[str, ...], value: Any) -> Any:
    """Return the shardings of a frozen value, a tree like `value`; None (the default device) for each leaf without a mesh.

    Args:
        mesh: the devices.
        names: the names on the path of the parameter, which give its role; () for none.
        value: an array or quantised matrix, or its shapes, with the layout that `laid_out` gives.
    """
    if mesh is None:
        return jax.tree.map(lambda leaf: None, value)
    specs = frozen_specs(names, value, mesh.shape[FSDP], mesh.shape[TENSOR])
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def frozen_sharding(mesh: Mesh | None, shape: tuple[int, ...]) -> NamedSharding | None:
    """Return the sharding of a frozen leaf that has no role, or None (the default device) without a mesh."""
    sharding: NamedSharding | None = frozen_shardings(mesh, (), jax.ShapeDtypeStruct(shape, bool))
    return sharding


def laid_out(mesh: Mesh | None, names: tuple[str, ...], value: Any) -> Any:
    """Return a value that is to be filled, or its shapes, with the layout that its matrix has on the mesh."""
    return value if mesh is None else with_layout(names, value, mesh.shape[TENSOR])


def frozen_shapes(mesh: Mesh | None, frozen: Any) -> Any:
    """Return the frozen part of a model as `ShapeDtypeStruct`s with the layouts and the shardings that training uses."""

    def shapes_of(names: tuple[str, ...], variable: Any) -> Any:
        replicated = isinstance(variable, ReplicatedVariable)
        value = laid_out(mesh, names, variable.get_value())

        def shape_of(leaf: Any, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
            if sharding is not None and replicated:
                sharding = NamedSharding(sharding.mesh, P())
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return variable.replace(jax.tree.map(shape_of, value, frozen_shardings(mesh, names, value)))

    return map_variables(shapes_of, frozen)


def adapter_shardings(mesh: Mesh, adapter: Any, state: Any = None) -> Any:
    """Return the shardings of an adapter, or those of a state of training with this adapter.

    The optimizer's state for a matrix is split like the matrix if it has its shape, and is replicated otherwise.
    """
    shapes = {names_of(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(adapter)}

    def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = names_of(path)
        like = shapes.get(names) == leaf.shape
        return NamedSharding(mesh, adapter_spec(names, leaf.shape, mesh.shape[TENSOR]) if like else P())

    return jax.tree_util.tree_map_with_path(sharding_of, adapter if state is None else state)


def put_adapter(mesh: Mesh | None, adapter: Any) -> Any:
    """Return the adapter with its leaves on the mesh."""
    return adapter if mesh is None else jax.tree.map(put, adapter, adapter_shardings(mesh, adapter))


def put_on_mesh(mesh: Mesh | None, tree: Any, spec: P) -> Any:
    """Return the tree with every leaf put on the mesh with the partition spec `spec`."""
    return tree if mesh is None else jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, spec)), tree)


def put_rows(mesh: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """Return the tree of arrays with the rows of a batch along an axis, put on the mesh."""
    return put_on_mesh(mesh, tree, rows_spec(axis))


def rows_spec(axis: int = 0) -> P:
    """Return the partition spec of an array with the rows of a batch along an axis."""
    return P(*[None] * axis, ROWS)


def gather(state: Any) -> Any:
    """Return the state of a layer with the leaves that the layer computes with on each device; for use in a traced function.

    Each device gets complete matrices or, over the axis `tensor`, the parts that the roles of the matrices give it.
    """
    if devices_of_context() == 1:
        return state

    def gathered(names: tuple[str, ...], variable: Any) -> Any:
        if not isinstance(variable, nnx.Variable):
            return jax.lax.with_sharding_constraint(variable, P())
        specs = layer_specs(names, variable.get_value(), tensor_shards())
        return variable.replace(jax.tree.map(jax.lax.with_sharding_constraint, variable.get_value(), specs))

    return map_variables(gathered, state)


def spread_rows(x: Array, axis: int = 0) -> Array:
    """Return x, whose rows of a batch along an axis are split over the devices of the context."""
    return x if devices_of_context() == 1 else jax.lax.with_sharding_constraint(x, rows_spec(axis))


def with_whole_features(x: Array) -> Array:
    """Return x `[b, ..., features]`, of which each device of a tensor axis has all features: the input of a layer.

    Otherwise XLA may split the features of the residual stream, because a stored embedding is split along them, and would
    then split the matrices along other axes than their roles say.
    """
    if devices_of_context() == 1 or tensor_shards() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(P.UNCONSTRAINED, *[None] * (x.ndim - 1)))


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
    specs = (spread or P(), *[rows_spec()] * len(rows))
    return jax.shard_map(function, in_specs=specs, out_specs=rows_spec(), check_vma=False)(frozen, *rows)


def shard_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of arrays with a leading batch axis so that each device runs it on its own rows.

    XLA cannot partition kernels such as splash attention by itself.
    """
    if devices_of_context() == 1:
        return function
    return jax.shard_map(function, in_specs=rows_spec(), out_specs=rows_spec(), check_vma=False)


def split_heads(x: Array, axis: int) -> Array:
    """Return x, whose axis of heads is split over `tensor` on the devices of the context: a cache of keys or values."""
    if devices_of_context() == 1 or tensor_shards() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(*[None] * axis, TENSOR))


def over_heads(function: Callable[..., Array], *heads: tuple[Any, int], rows: Any = None) -> Array:
    """Return `function(*arrays, rows)`, the result of attention `[b, t, heads, d]`, computed by heads over `tensor`.

    Attention acts on each head separately. XLA would not see that, because the batch and the heads are one axis there. On a
    mesh without a tensor axis the function is called as it is.

    Args:
        function: takes the arrays of `heads`, then `rows`; other arrays that it reads are whole on every device.
        heads: pairs of an array, or None, and its axis of heads. Arrays of four axes have rows along the first one.
        rows: an array with a leading axis of rows, which may be of size 1 for all rows together; or None.
    """
    arrays = [array for array, _ in heads]
    if devices_of_context() == 1 or tensor_shards() == 1:
        return function(*arrays, rows)
    batch = arrays[0].shape[0]
    own = ROWS if batch % row_shards() == 0 else None  # few rows, as in decoding: every device has all of them

    def spec_of(array: Array | None, axis: int) -> P:
        by_row = array is not None and array.ndim == 4
        return P(own if by_row else None, *[None] * (axis - 1), TENSOR) if axis else P(TENSOR)

    in_specs = (
        *(spec_of(array, axis) for array, axis in heads),
        P(own if rows is not None and len(rows) == batch else None),
    )
    return jax.shard_map(function, in_specs=in_specs, out_specs=P(own, None, TENSOR), check_vma=False)(*arrays, rows)
