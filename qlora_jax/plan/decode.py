"""The memory of one decode step: the step of `serve.generate`, compiled without the device.

The cache is donated, as it is in generation. The adapter is not merged into the base. The bytes for each token are those of
device memory that the compiled step reads and writes, divided by the rows of the batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.errors import UnsupportedError
from qlora_jax.models import DecoderConfig, ModelSpec
from qlora_jax.nn.mesh import TENSOR, shape_on
from qlora_jax.nn.parallel import adapter_shardings, frozen_shapes
from qlora_jax.plan.compile import Program, compile_program, place, versions
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.topology import context, machine_mesh
from qlora_jax.plan.tree_bytes import tree_bytes, weight_bytes
from qlora_jax.serve.generate import decode_step
from qlora_jax.train.spec import StepSpec
from qlora_jax.train.step import split


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The memory of one decode step on each device of a machine, in bytes; `rows` are those of all devices."""

    machine: Machine
    packed_weights: int
    dense_weights: int
    adapter: int
    cache: int
    rows: int
    program: Program
    versions: dict[str, str]


def compile_decode_step(spec: StepSpec[ModelSpec], machine: Machine, *, capacity: int) -> DecodePlan:
    """Compile the step that generates one token a row, and return its plan; see `compile_train_step` for further errors.

    Args:
        spec: describes the model; its batch size is the number of rows on each device.
        machine: the machine, which need not be attached.
        capacity: the tokens that the cache holds for each row.

    Raises:
        UnsupportedError: the model is an encoder-decoder.
    """
    if not isinstance(spec.model.config, DecoderConfig):
        raise UnsupportedError(f"decode: expected a decoder-only model, found {type(spec.model.config).__name__}")
    mesh = machine_mesh(machine, spec.mesh)
    model: Any = spec.model.abstract(machine.device.target)
    graphdef, adapter, frozen = split(model)
    adapter, frozen = place(adapter, mesh, adapter_shardings(mesh, adapter)), frozen_shapes(mesh, frozen)
    rows = spec.batch.batch_size * shape_on(spec.mesh, machine.count).row_shards
    token = place(jax.ShapeDtypeStruct((rows,), jnp.int32), mesh, P())
    positions = place(jax.ShapeDtypeStruct((rows, 1), jnp.int32), mesh, P())
    state = nnx.merge_state(adapter, frozen)
    cache: Any = jax.eval_shape(lambda state: nnx.merge(graphdef, state).init_cache(rows, capacity), state)
    cache = place(cache, mesh, P(None, None, TENSOR))

    with context(mesh):
        program = compile_program(_Bound(graphdef), (state, token, positions, cache), machine)
    packed, dense = weight_bytes(frozen)
    return DecodePlan(
        machine=machine,
        packed_weights=packed,
        dense_weights=dense,
        adapter=tree_bytes(adapter),
        cache=tree_bytes(cache),
        rows=rows,
        program=program,
        versions=versions(machine),
    )


@dataclasses.dataclass(frozen=True)
class _Bound:
    """The decode step with its graph, which can be traced like a jitted function."""

    graphdef: nnx.GraphDef

    def trace(self, *arguments: object) -> jax.stages.Traced:
        return decode_step.trace(self.graphdef, *arguments)
