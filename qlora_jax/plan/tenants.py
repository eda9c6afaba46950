"""The memory of one step of many tenants: the programs of `train.tenants`, compiled without the device.

    begin        the gradients of zeros
    accumulate   one micro-batch; the state of the slots is in memory beside it
    update       the slots of the round in place; the base is in memory beside it
    put, get     a tenant's state on its way from and to pinned host memory, where tenants take turns in the slots

Tenants that take turns need device memory for the slots alone, and host memory for the state of every tenant.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.errors import UnsupportedError
from qlora_jax.models import DecoderConfig, ModelSpec
from qlora_jax.nn.parallel import frozen_shapes
from qlora_jax.peft.bank import Bank
from qlora_jax.plan.compile import Program, compile_program, place, versions
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.topology import context, machine_mesh
from qlora_jax.plan.tree_bytes import tree_bytes, weight_bytes
from qlora_jax.train.offload import HOST
from qlora_jax.train.spec import StepSpec
from qlora_jax.train.tenant_slots import get_slot, init_tenants, put_slot, split_tenants
from qlora_jax.train.tenants import tenant_programs

__all__ = ["TenantsPlan", "compile_tenants_step", "compile_turn"]


@dataclasses.dataclass(frozen=True)
class TenantsPlan:
    """The memory of a step of many tenants on a device, in bytes.

    Attributes:
        machine: the machine.
        tenants, slots: how many tenants there are, and how many of them are on the device at the same time.
        packed_weights, dense_weights: the frozen weights; see `compile.Plan`.
        adapter: A and B of all slots, slot 0 for the bare base among them, with their scalings.
        optimizer: the moments and settings of all slots.
        host: the states of the tenants that take turns in the slots.
        micro_batches: how many micro-batches a step of all tenants has.
        begin, accumulate, update: the compiled programs.
        versions: the versions of jax, jaxlib and the compiler's package.
    """

    machine: Machine
    tenants: int
    slots: int
    packed_weights: int
    dense_weights: int
    adapter: int
    optimizer: int
    host: int
    micro_batches: int
    begin: Program
    accumulate: Program
    update: Program
    versions: dict[str, str]

    @property
    def peak(self) -> int:
        """The bytes of device memory while the step runs, in its largest program with what lies beside it."""
        base, state = self.packed_weights + self.dense_weights, self.adapter + self.optimizer
        # XLA drops the arguments that a program does not read: all of `begin`'s, and the optimizer's state in `accumulate`.
        return max(self.begin.peak + base + state, self.accumulate.peak + self.optimizer, self.update.peak + base)

    @property
    def rounds(self) -> int:
        """How often the slots are filled for one step of every tenant."""
        return -(-self.tenants // self.slots)

    @property
    def flops(self) -> float:
        """The floating-point operations of one step of every tenant."""
        return self._sum([program.flops for program in self._programs])

    @property
    def traffic(self) -> float:
        """The bytes of device memory that one step of every tenant reads and writes at least."""
        return self._sum([program.traffic for program in self._programs])

    @property
    def compile_seconds(self) -> float:
        """The time of lowering and compiling all programs."""
        return sum(program.compile_seconds for program in self._programs)

    @property
    def _programs(self) -> tuple[Program, Program, Program]:
        return self.begin, self.accumulate, self.update

    def _sum(self, values: Any) -> float:
        begin, accumulate, update = values
        return self.rounds * (begin + update) + self.micro_batches * accumulate


def compile_tenants_step(
    spec: StepSpec[ModelSpec], machine: Machine, *, tenants: int, rank: int, slots: int | None = None
) -> TenantsPlan:
    """Compile one step of many tenants with a row each for a machine; see `compile_train_step` for the errors.

    Args:
        spec: the step; its batch size is the rows of a micro-batch, and its method says which modules adapters may target.
        machine: one device, which need not be attached.
        tenants: how many tenants there are.
        rank: the largest rank of an adapter.
        slots: how many of them are on the device at the same time; None: all. With fewer, the others' states are in pinned
            host memory.

    Raises:
        UnsupportedError: several devices, or an encoder-decoder.
    """
    if machine.count > 1 or not isinstance(spec.model.config, DecoderConfig):
        found = f"{machine.count} devices" if machine.count > 1 else type(spec.model.config).__name__
        raise UnsupportedError(f"tenants: expected a decoder-only model on one device, found {found}")
    held, mesh = min(slots or tenants, tenants), machine_mesh(machine)
    graphdef, state, frozen = _abstract(spec, machine, mesh, held, rank)
    ids = place(jax.ShapeDtypeStruct((held,), jnp.int32), mesh, P())
    programs = tenant_programs(graphdef, spec.model.dtype)
    sums = place(jax.eval_shape(programs.begin, state, ids), mesh, P())
    rows = min(spec.batch.batch_size, held)
    batch = place(_rows(spec, rows), mesh, P())
    with context(mesh):
        update = compile_program(programs.update, (state, ids, sums), machine)
        begin = compile_program(programs.begin, (state, ids), machine)
        arguments = (ids, state, sums, frozen, batch)
        accumulate = compile_program(programs.accumulate["sft"], arguments, machine)
    packed, dense = weight_bytes(frozen)
    return TenantsPlan(
        machine=machine,
        tenants=tenants,
        slots=held,
        packed_weights=packed,
        dense_weights=dense,
        adapter=tree_bytes((state.adapter, state.scale)),
        optimizer=tree_bytes((state.mu, state.nu, state.count, state.settings)),
        host=tenants * tree_bytes(jax.eval_shape(get_slot, state, 0)) if held < tenants else 0,
        micro_batches=-(-tenants // held) * -(-held // rows),
        begin=begin,
        accumulate=accumulate,
        update=update,
        versions=versions(machine),
    )


def compile_turn(spec: StepSpec[ModelSpec], machine: Machine, *, slots: int, rank: int) -> tuple[Program, Program, int]:
    """Return (the update of all slots, the program that puts a tenant from host memory into a slot, a tenant's bytes there).

    Both programs are compiled. XLA for GPUs reports no bytes of arguments in host memory; those returned are of the shapes.
    See `compile_tenants_step` for the arguments.
    """
    mesh = machine_mesh(machine)
    graphdef, state, _ = _abstract(spec, machine, mesh, slots, rank)
    ids, programs = place(jax.ShapeDtypeStruct((slots,), jnp.int32), mesh, P()), tenant_programs(graphdef)
    sums = place(jax.eval_shape(programs.begin, state, ids), mesh, P())
    own = place(jax.eval_shape(get_slot, state, 0), mesh, P())
    host = NamedSharding(mesh, P(), memory_kind=HOST)
    adapter, mu, nu = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), (own.adapter, own.mu, own.nu)
    )
    slot = place(jax.ShapeDtypeStruct((), jnp.int32), mesh, P())
    with context(mesh):
        update = compile_program(programs.update, (state, ids, sums), machine)
        away = dataclasses.replace(own, adapter=adapter, mu=mu, nu=nu)
        return update, compile_program(put_slot, (state, slot, away), machine), tree_bytes((adapter, mu, nu))


def _abstract(spec: StepSpec[ModelSpec], machine: Machine, mesh: Mesh, slots: int, rank: int) -> tuple[Any, Any, Any]:
    """Return (graphdef, state, frozen) of a bank with so many slots beside slot 0, as shapes on the device."""
    targets = getattr(spec.model.method, "target_modules", None)
    bank = Bank(slots + 1, rank) if targets is None else Bank(slots + 1, rank, target_modules=targets)
    model = dataclasses.replace(spec.model, method=bank)
    graphdef, adapter, scale, frozen = split_tenants(model.abstract(machine.device.target))
    state = place(jax.eval_shape(init_tenants, adapter, scale), mesh, P())
    return graphdef, state, frozen_shapes(mesh, frozen)


def _rows(spec: StepSpec[ModelSpec], rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a micro-batch of so many rows, with what tenants add to it."""
    shape, arrays = (rows, spec.batch.length), spec.objective.arrays
    batch = {array.name: jax.ShapeDtypeStruct(shape, jnp.dtype(array.dtype)) for array in arrays}
    own = {"adapter_ids": jnp.int32, "share": jnp.float32}
    return batch | {name: jax.ShapeDtypeStruct((rows,), jnp.dtype(dtype)) for name, dtype in own.items()}
