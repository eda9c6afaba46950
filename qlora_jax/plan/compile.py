"""The memory of a training step from the real compiler, without the device.

    1. `train.build_step` builds the model, the adapter and the optimizer's state as shapes, without memory
    2. `train.place_step` gives each of them the sharding and the kind of memory that it has in training, over the mesh of a
       described machine (`plan.topology`), as `nn.parallel` describes
    3. the jitted step, which is the function that training runs, is lowered and compiled for that machine
    4. XLA's buffer assignment gives the memory of the compiled program on each device:

           peak = arguments + temporaries + outputs - (outputs in donated arguments)

       with the workspace that cuDNN's attention gets on a device (`plan.workspace`)
    5. the floating-point operations are counted in the traced program (`plan.flops`); the bytes that it moves, and the
       cycles that a TPU's compiler expects, in the compiled one (`plan.hlo`)

The peak is that of the program's buffers. A run needs a little more: the CUDA context, other workspaces of libraries, and
the memory that the allocator loses to fragmentation. GEMMs are compiled without autotuning, which needs the hardware, and so
without the workspaces that the fastest of them may need.
"""

import dataclasses
import importlib.metadata
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec
from qlora_jax.plan.devices import Machine
from qlora_jax.plan.flops import count_flops
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.topology import CompilerRefuses, context, machine_mesh
from qlora_jax.plan.tree_bytes import tree_bytes, weight_bytes
from qlora_jax.plan.workspace import add_workspaces, missing_workspace
from qlora_jax.train.placement import place_step
from qlora_jax.train.spec import StepSpec, build_step

# Autotuning would run kernels on the device, which is not attached.
COMPILER_OPTIONS = {"cuda": {"xla_gpu_autotune_level": "0"}, "tpu": {}}


@dataclasses.dataclass(frozen=True)
class Program:
    """The memory of one compiled program on each device, in bytes of device memory unless the name says host.

    Attributes:
        arguments, outputs, temporaries: XLA's buffer assignment.
        aliased: the outputs that are stored in donated arguments.
        host_arguments, host_temporaries: the same in host memory.
        flops: the floating-point operations of matrix products in one run, on each device.
        traffic: the bytes of device memory that one run reads and writes at least.
        compile_seconds: the time of lowering and compiling.
        text: the optimised program.
        workspace: the largest workspace of cuDNN's attention.
        added_workspace: the part of it that is not in `temporaries`, and is added to the peak.
        cycles: the cycles that a TPU's compiler expects of one run, without those of kernels that it does not know.
        unknown_kernels: how often such kernels run.
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
    workspace: int = 0
    added_workspace: int = 0
    cycles: int | None = None
    unknown_kernels: int = 0

    @property
    def peak(self) -> int:
        """The bytes of device memory while the program runs."""
        return self.arguments + self.temporaries + self.outputs - self.aliased + self.added_workspace

    @property
    def host_peak(self) -> int:
        """The bytes of host memory while the program runs; its outputs there are stored in donated arguments."""
        return self.host_arguments + self.host_temporaries


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one training step on each device of a machine, in bytes.

    Attributes:
        machine: the machine.
        packed_weights: the 4-bit matrices with their scales.
        dense_weights: the other frozen weights: embeddings, norms, output head, and dense linear layers.
        adapter, host_adapter: the trainable parameters, in device or in host memory.
        optimizer, host_optimizer: the optimizer's state, in device or in host memory.
        program: the compiled step.
        versions: the versions of jax, jaxlib and the compiler's package.
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
        """The bytes of device memory while the step runs."""
        return self.program.peak


def compile_train_step(spec: StepSpec[ModelSpec], machine: Machine) -> Plan:
    """Compile one training step for a machine that need not be attached, and return its plan.

    Raises:
        CompilerMissing: the machine's compiler is not installed.
        CompilerRefuses: the compiler cannot compile the step for that machine.
        DoesNotFitError: the compiler refuses, since the memory is too small. libtpu does so; for a GPU the plan says it.
        QLoRAError: the adapter does not fit the model.
    """
    mesh = machine_mesh(machine, spec.mesh)
    step = place_step(build_step(spec, platform=machine.device.target, devices=machine.count), mesh)
    with context(mesh):
        program = compile_program(step.jit_train(), (step.state, step.frozen, step.batch), machine)
    packed, dense = weight_bytes(step.frozen)
    adapter, optimizer = tree_bytes(step.state.adapter), tree_bytes(step.state.opt_state)
    on_host = spec.optimizer
    return Plan(
        machine=machine,
        packed_weights=packed,
        dense_weights=dense,
        adapter=0 if on_host.host_adapter else adapter,
        host_adapter=adapter if on_host.host_adapter else 0,
        optimizer=0 if on_host.host_optimizer else optimizer,
        host_optimizer=optimizer if on_host.host_optimizer else 0,
        program=program,
        versions=versions(machine),
    )


def place(tree: Any, mesh: Mesh, spec: Any) -> Any:
    """Return a tree of shapes with shardings: one partition spec for all leaves, or a tree of shardings."""
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, spec), tree) if isinstance(spec, P) else spec
    return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), tree, shardings)


def compile_program(function: Any, arguments: tuple[Any, ...], machine: Machine) -> Program:
    """Lower and compile a jitted function of shapes with shardings; see `compile_train_step` for the errors."""
    platform = machine.device.platform
    start = time.perf_counter()
    traced = function.trace(*arguments)
    try:
        lowered = traced.lower(lowering_platforms=(platform,))
        workspace = add_workspaces(lowered.compiler_ir()) if platform == "cuda" else 0
        compiled = lowered.compile(COMPILER_OPTIONS[platform])
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, machine) from error
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    program = parse_program(text)
    missing = missing_workspace(program)
    return Program(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=_temporaries(memory, platform),
        host_arguments=memory.host_argument_size_in_bytes,
        host_temporaries=memory.host_temp_size_in_bytes,
        flops=count_flops(traced.jaxpr, platform=platform) / machine.count,
        traffic=program.traffic(),
        compile_seconds=seconds,
        text=text,
        workspace=max(workspace, missing),
        added_workspace=missing,
        cycles=program.cycles(),
        unknown_kernels=program.unknown_kernels(),
    )


def _temporaries(memory: Any, platform: str) -> int:
    """Return the bytes of device memory that a program needs beside its arguments and outputs.

    The size of the temporaries that libtpu reports is too high by one array or more, such as the stack of the saved
    residuals: libtpu accepts programs that would not fit by it. What it reports as the peak are the bytes of all arrays at
    the moment that has most of them, together with those in host memory. The gaps between arrays are not in it: they were
    0.1 to 1.5 % of the programs of 8B models. It has only the larger of the temporaries in device and in host memory, so
    that it says nothing where there are some in host memory.
    """
    whole = getattr(memory, "peak_memory_in_bytes", 0)
    if platform != "tpu" or memory.host_temp_size_in_bytes or not whole:
        return memory.temp_size_in_bytes
    on_host = memory.host_argument_size_in_bytes + memory.host_output_size_in_bytes - memory.host_alias_size_in_bytes
    settled = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return min(memory.temp_size_in_bytes, whole - on_host - settled)


def _explained(error: Exception, machine: Machine) -> Exception:
    """Return the compiler's error as one of this package."""
    text = str(error)
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    if "RESOURCE_EXHAUSTED" in text:
        # libtpu names the size of the whole program, or of its temporaries if these alone do not fit.
        used = re.search(r"(?:[Uu]sed |HLO temporaries \()([\d.]+)([GM])\b", text)
        needed = None if used is None else int(float(used[1]) * {"G": 2**30, "M": 2**20}[used[2]])
        return DoesNotFitError(f"{machine.name}: does not fit: {line}", needed)
    return CompilerRefuses(f"{machine.name}: the compiler refuses: {line}")


def versions(machine: Machine) -> dict[str, str]:
    """Return the installed versions of jax, jaxlib and the compiler of that machine, by package."""
    packages = {"cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}[machine.device.platform]
    found: dict[str, str] = {}
    for package in ("jax", "jaxlib", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
