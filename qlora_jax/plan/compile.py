"""What a training step needs, from the real compiler, without the device.

    1. the model, the adapter and the optimizer's state are built abstractly: shapes and dtypes, no memory (`plan.recipe`)
    2. each gets a sharding over the mesh of a described machine (`plan.topology`), as the job places it, and its kind of
       memory: frozen weights and the batch by rows over the devices, adapter and state whole on each
    3. `train.step.jit_train_step`, the function that training runs, is lowered and compiled for that machine
    4. XLA's buffer assignment says what the compiled program needs on each device:

           peak = arguments + temporaries + outputs - (outputs that lie in donated arguments)

    5. the traced program says its operations (`plan.flops`), the compiled one the bytes it moves (`plan.hlo`)

The peak is that of the program's buffers. A run needs a little more: the CUDA context, the libraries' workspaces, and what
the allocator loses to fragments. GEMMs are compiled without autotuning, which needs the hardware, and so without the
workspaces that the fastest of them may take.
"""

import dataclasses
import importlib.metadata
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.parallel import AXIS, frozen_shapes
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.flops import count_flops
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.recipe import AbstractStep, Recipe, abstract_step, tree_bytes, weight_bytes
from qlora_jax.plan.topology import CompilerRefuses, context, machine_mesh
from qlora_jax.train.offload import HOST, HostOffload, memory_kinds
from qlora_jax.train.step import jit_train_step

# Autotuning runs kernels on the device, and there is none.
COMPILER_OPTIONS = {"cuda": {"xla_gpu_autotune_level": "0"}, "tpu": {}}


class DoesNotFit(ValueError):
    """The compiler itself refuses a program that needs more memory than the device has."""

    def __init__(self, message: str, needed: int | None) -> None:
        super().__init__(message)
        self.needed = needed  # bytes, where the compiler says


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled program needs on each device, in bytes of device memory but for the fields that say host.

    Attributes:
        arguments, outputs, aliased, temporaries: `aliased` outputs lie in donated arguments.
        flops: of matrix products, by each device, in one run.
        traffic: bytes of device memory that one run reads and writes at least.
        compile_seconds: of lowering and compiling.
        text: the optimised program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    host_arguments: int
    host_temporaries: int
    flops: float
    traffic: int
    compile_seconds: float
    text: str = dataclasses.field(repr=False, default="")

    @property
    def peak(self) -> int:
        """Device bytes while it runs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def host_peak(self) -> int:
        """Host bytes while it runs; its outputs lie in the donated arguments."""
        return self.host_arguments + self.host_temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """One training step on each device of a machine, in bytes.

    Attributes:
        packed_weights: 4-bit matrices with their scales.
        dense_weights: the frozen rest: embeddings, norms, output head, and dense linear layers.
        adapter, host_adapter: the trainable parameters, where they live.
        optimizer, host_optimizer: the optimizer's state, where it lives.
        versions: of jax, jaxlib and the compiler's package.
    """

    machine: Machine
    packed_weights: int
    dense_weights: int
    adapter: int
    host_adapter: int
    optimizer: int
    host_optimizer: int
    program: Program
    versions: dict[str, str]

    @property
    def peak(self) -> int:
        return self.program.peak


def compile_train_step(recipe: Recipe, machine: Machine) -> Plan:
    """Compiles one training step for a machine that need not be attached.

    Raises:
        CompilerMissing: the machine's compiler is not installed.
        CompilerRefuses: it cannot compile for that machine.
        DoesNotFit: it refuses, since the memory is too small (libtpu does; for GPUs the plan just says so).
        ValueError: LoRA targets that match nothing.
    """
    mesh = machine_mesh(machine)
    step = placed_step(abstract_step(recipe, machine.device.platform, machine.count), mesh)
    run = jit_train_step(step.graphdef, step.tx, step.loss, step.state, unit=step.unit)
    with context(mesh):
        program = compile_program(run, (step.state, step.frozen, step.batch), machine)
    packed, dense = weight_bytes(step.frozen)
    adapter, optimizer = tree_bytes(step.state.adapter), tree_bytes(step.state.opt_state)
    return Plan(
        machine=machine,
        packed_weights=packed,
        dense_weights=dense,
        adapter=0 if recipe.host_adapter else adapter,
        host_adapter=adapter if recipe.host_adapter else 0,
        optimizer=0 if recipe.host_optimizer else optimizer,
        host_optimizer=optimizer if recipe.host_optimizer else 0,
        program=program,
        versions=versions(machine),
    )


def placed_step(step: AbstractStep, mesh: Mesh) -> AbstractStep:
    """The step with everything where the job puts it."""
    state = place(step.state, mesh, P())
    if isinstance(step.tx, HostOffload):
        opt_state, kinds = step.state.opt_state, memory_kinds(step.state.opt_state)
        opt_state = jax.tree.map(lambda leaf, kind: place(leaf, mesh, P(), kind), opt_state, kinds)
        state = dataclasses.replace(state, opt_state=opt_state)
        if step.tx.adapter:
            state = dataclasses.replace(state, adapter=place(step.state.adapter, mesh, P(), HOST))
    return dataclasses.replace(
        step, state=state, frozen=frozen_shapes(mesh, step.frozen), batch=place(step.batch, mesh, P(None, AXIS))
    )


def place(tree: Any, mesh: Mesh, spec: P, memory_kind: str | None = None) -> Any:
    # NamedSharding keeps the kind of memory ahead of time; SingleDeviceSharding drops it.
    sharding = NamedSharding(mesh, spec, memory_kind=memory_kind)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_program(function: Any, arguments: tuple[Any, ...], machine: Machine) -> Program:
    """Lowers and compiles a jitted function of placed shapes; see `compile_train_step` for what it raises."""
    platform = machine.device.platform
    start = time.perf_counter()
    traced = function.trace(*arguments)
    try:
        compiled = traced.lower(lowering_platforms=(platform,)).compile(COMPILER_OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, machine) from error
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        host_arguments=memory.host_argument_size_in_bytes,
        host_temporaries=memory.host_temp_size_in_bytes,
        flops=count_flops(traced.jaxpr, platform=platform) / machine.count,
        traffic=parse_program(text).traffic(),
        compile_seconds=seconds,
        text=text,
    )


def _explained(error: Exception, machine: Machine) -> Exception:
    text = str(error)
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    if "RESOURCE_EXHAUSTED" in text:
        # The whole program, or its temporaries alone, which is what libtpu says where these do not fit by themselves.
        used = re.search(r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([GM])\b", text)
        needed = None if used is None else int(float(used[1]) * {"G": 2**30, "M": 2**20}[used[2]])
        return DoesNotFit(f"{machine.name}: does not fit: {line}", needed)
    return CompilerRefuses(f"{machine.name}: the compiler refuses: {line}")


def versions(machine: Machine) -> dict[str, str]:
    """Of jax, jaxlib and the compiler of that machine."""
    packages = {"cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}[machine.device.platform]
    found: dict[str, str] = {}
    for package in ("jax", "jaxlib", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
