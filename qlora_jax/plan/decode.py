"""What one decode step needs: `serve.generate`'s own step through the model's `decode`, compiled without the device.

The cache is donated, as while generating. Bytes a token: what the compiled step reads and writes of the device's memory,
over the rows of the batch. The adapter stays beside the base, as it is while it serves.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.models import DecoderConfig
from qlora_jax.nn.parallel import frozen_shapes
from qlora_jax.plan.compile import Program, compile_program, place, versions
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.recipe import Recipe, abstract_model, tree_bytes, weight_bytes
from qlora_jax.plan.topology import context, machine_mesh
from qlora_jax.serve.generate import decode_step
from qlora_jax.train.step import split


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """One decode step on each device of a machine, in bytes."""

    machine: Machine
    packed_weights: int
    dense_weights: int
    adapter: int
    cache: int
    rows: int
    program: Program
    versions: dict[str, str]


def compile_decode_step(recipe: Recipe, machine: Machine, *, capacity: int) -> DecodePlan:
    """Compiles the step that makes one token a row; see `compile_train_step` for what it raises.

    Args:
        capacity: tokens that the cache holds a row; `recipe.batch_size` rows on each device.

    Raises:
        ValueError: an encoder-decoder.
    """
    if not isinstance(recipe.config, DecoderConfig):
        raise ValueError(f"decode: expected a decoder-only model, found {type(recipe.config).__name__}")
    mesh = machine_mesh(machine)
    model = abstract_model(dataclasses.replace(recipe, objective="sft"), machine.device.platform)
    graphdef, adapter, frozen = split(model)
    adapter, frozen = place(adapter, mesh, P()), frozen_shapes(mesh, frozen)
    rows = recipe.batch_size * machine.count
    cache = place(jax.eval_shape(lambda: model.init_cache(rows, capacity)), mesh, P())
    token = place(jax.ShapeDtypeStruct((rows,), jnp.int32), mesh, P())
    positions = place(jax.ShapeDtypeStruct((rows, 1), jnp.int32), mesh, P())
    state = nnx.merge_state(adapter, frozen)

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
    """The step with its graph, to be traced like any jitted function."""

    graphdef: nnx.GraphDef

    def trace(self, *arguments: object) -> jax.stages.Traced:
        return decode_step.trace(self.graphdef, *arguments)
