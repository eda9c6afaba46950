"""Where the arguments of a step are: on which devices, and in which memory."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from qlora_jax.nn.parallel import adapter_shardings, frozen_shapes, rows_spec
from qlora_jax.train.offload import HOST, HostOffload, memory_kinds
from qlora_jax.train.spec import Step

__all__ = ["place_step"]


def place_step(step: Step, mesh: Mesh | None) -> Step:
    """Return a step of shapes with the sharding that training gives each of them.

    Frozen weights, the rows of the batch and the state are spread over the devices as `nn.parallel` describes, and what the
    optimizer moves to the host is in pinned host memory.

    Args:
        step: the step, with shapes as its arguments.
        mesh: the devices, which need not be attached; None: the default device.
    """

    def place(tree: Any, shardings: Any, memory_kinds: Any = None) -> Any:
        def shape_of(leaf: Any, sharding: Any, memory_kind: str | None = None) -> jax.ShapeDtypeStruct:
            # NamedSharding keeps the kind of memory when a program is compiled for other devices; SingleDeviceSharding drops
            # it, so that it is made with it.
            if mesh is None:
                sharding = SingleDeviceSharding(jax.devices()[0], memory_kind=memory_kind)
            elif memory_kind is not None:
                sharding = sharding.with_memory_kind(memory_kind)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree.map(shape_of, tree, shardings, *([] if memory_kinds is None else [memory_kinds]))

    where = step.state if mesh is None else adapter_shardings(mesh, step.state.adapter, step.state)
    state = place(step.state, where)
    if isinstance(step.tx, HostOffload):
        opt_state = place(step.state.opt_state, where.opt_state, memory_kinds(step.state.opt_state))
        state = dataclasses.replace(state, opt_state=opt_state)
        if step.tx.adapter:
            on_host = jax.tree.map(lambda _: HOST, step.state.adapter)
            state = dataclasses.replace(state, adapter=place(step.state.adapter, where.adapter, on_host))
    if mesh is None:
        return dataclasses.replace(step, state=state, frozen=frozen_shapes(None, step.frozen))
    rows = NamedSharding(mesh, rows_spec(1))
    batch = place(step.batch, jax.tree.map(lambda _: rows, step.batch))
    return dataclasses.replace(step, state=state, frozen=frozen_shapes(mesh, step.frozen), batch=batch)
