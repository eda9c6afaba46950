"""Plan a run: compile its training step, its decode step or a server's programs for devices that need not be attached.

    python scripts/plan.py --model llama-3-8b --batch-size 4 --max-length 2048 --device h100
    python scripts/plan.py --config recipes/guanaco-65b.toml --device a100-80 --plot memory.png
    python scripts/plan.py --model llama-3-8b --max-length 2048 --device v5e:2x2
    python scripts/plan.py --model llama-3-8b --max-length 2048 --device h100x8 --mesh data=2,fsdp=2,tensor=2
    python scripts/plan.py --model llama-65b --rank 64 --device h100 --fit batch
    python scripts/plan.py --model llama-3-8b --step decode --capacity 4096 --device l4
    python scripts/plan.py --model llama-3-8b --device rtx4090 --quick
    python scripts/plan.py --model llama-3-8b --device h100 --tenants 64 --tenant-rank 16 --batch-size 8
    python scripts/plan.py --model llama-3-8b --device v5e --step serve --tenants 64 --batch-size 16 --capacity 4096

The command takes all options of scripts/train.py with the same meaning, so that a config file for training can be planned
unchanged. The numbers are those of XLA's buffer assignment, on each device; with --quick they are calculated without a
compiler. The last line is JSON.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from qlora_jax import cli
from qlora_jax.checkpoint.bitsandbytes import is_quantized
from qlora_jax.commands.planning.config import read_config
from qlora_jax.commands.planning.serving import serving_report
from qlora_jax.errors import DoesNotFitError, OptionError
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import ModelSpec, family_of, scaled
from qlora_jax.nn import MeshShape, shape_on
from qlora_jax.plan import (
    Choice,
    Machine,
    QuickPlan,
    Report,
    ServeSizes,
    TenantsPlan,
    as_json,
    cheaper_first,
    cheapest_that_fits,
    check_compiler,
    check_drawing,
    compile_decode_step,
    compile_tenants_step,
    compile_train_step,
    draw,
    largest_that_fits,
    machine_named,
    quick_plan,
    report_of,
    spec_values,
    table,
)
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import StepSpec

Spec = StepSpec[ModelSpec]

_DEFAULT = "smollm2-135m"
_OF_ONE = ("batch", "length", "options")


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Options of the plan."""

    device: str = "h100"
    """Device: h100, h200, b200, a100-80, a100-40, l4, rtx4090, rtx3090, v4, v5e, v5p or v6e; several devices: h100x4,
    v5e:2x2."""
    step: Literal["train", "decode", "serve"] = "train"
    """The training step, the step that generates one token for each row, or the engine of serve.py, whose rows are the
    batch-size and whose adapters on the device are the tenants (0: the bare base)."""
    capacity: int = 2048
    """Number of tokens per row in the cache of the decode step and of the engine."""
    chunk: int = 128
    """Tokens of a prompt that the engine processes at a time."""
    quick: bool = False
    """Calculate instead of compiling: it takes seconds, and the memory of temporaries is an estimate."""
    fit: Literal["none", "batch", "length", "options", "tenants"] = "none"
    """Search for what fits: the largest batch-size, the largest max-length (a multiple of 128), the cheapest options, or the
    most tenants."""
    tenants: int = 0
    """Number of tenants that train at once, each with a row of a step (0: one run), or whose adapters are served."""
    tenant_rank: int = 16
    """The largest rank of the tenants' adapters."""
    tenant_slots: int = 0
    """Tenants on the device at the same time, while the states of the others are in pinned host memory; 0: all of them."""
    plot: Path | None = None
    """Picture to write: a bar of the memory by use, with the limit of the device."""


@dataclasses.dataclass(frozen=True)
class PlanCommandOptions(Options):
    """The options of the command: those of training, and those of the plan."""

    plan: PlanOptions = dataclasses.field(default_factory=PlanOptions)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    use_compilers_only()  # nothing is run on a device: one that is attached stays free
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA logs programs that do not fit, which is the question here
    return cli.run(plan, PlanCommandOptions, __doc__, arguments, program=program)


def plan(options: PlanCommandOptions) -> None:
    """Print what the step needs as a table and, on the last line, as JSON."""
    chosen = options.plan
    machine = machine_named(chosen.device)
    _check(chosen, machine, options.run.mesh_shape)
    tenants = chosen.step == "train" and (chosen.tenants > 0 or chosen.fit == "tenants")
    if tenants:
        _check_tenants(options)
    model = options.model.model or _DEFAULT
    spec = read_spec(options, model, machine)
    found: dict[str, Any] = {}
    if chosen.step == "serve":
        sizes = ServeSizes(chosen.tenants, chosen.tenant_rank, chosen.capacity, chosen.chunk)
        found, report = serving_report(spec, machine, model, sizes, cast(Any, chosen.fit))
    elif chosen.step == "decode":
        decode_step = compile_decode_step(spec, machine, capacity=chosen.capacity)
        title = f"{model}: decoding {spec.batch.batch_size} x {chosen.capacity}"
        report = report_of(decode_step, spec, machine, title)
    elif tenants:
        number, report = tenants_report(spec, machine, model, chosen)
        found = {"tenants": number} if chosen.fit == "tenants" else {}
    else:
        if chosen.fit == "options":
            spec, machine, found = fit_options(spec, machine, chosen.quick)
        elif chosen.fit in ("batch", "length"):
            spec, found = fit_number(spec, machine, chosen.fit, chosen.quick)
        title = f"{model}: training {spec.batch.batch_size} x {spec.batch.length}"
        report = train_report(spec, machine, title, chosen.quick)
    print(table(report))
    if chosen.fit != "none":
        print(f"  found: {', '.join(f'{name} {value}' for name, value in found.items())}")
    if chosen.plot is not None:
        draw([report], chosen.plot)
        print(f"  drawn: {chosen.plot}")
    print(json.dumps({**as_json(report), "model": model, "recipe": spec_values(spec), "found": found}))


def _check(chosen: PlanOptions, machine: Machine, mesh: MeshShape | None) -> None:
    """Raise an error for options that contradict each other, before anything is downloaded or traced."""
    if chosen.step == "decode" and (chosen.quick or chosen.fit != "none"):
        other = "quick" if chosen.quick else f"fit {chosen.fit}"
        raise OptionError(f"step decode: is always compiled: expected no quick and no fit beside it, found {other}")
    if chosen.fit == "options" and mesh is not None:
        raise OptionError(f"fit options: chooses the number of devices: expected no mesh beside it, found {mesh}")
    shape_on(mesh, machine.count)
    if chosen.step == "serve":
        if chosen.quick or chosen.tenant_slots or chosen.fit in ("length", "options") or mesh is not None:
            raise OptionError(
                "step serve: is compiled for one device: expected no quick, mesh, tenant_slots, or fit but batch and tenants"
            )
    elif (chosen.tenants or chosen.fit == "tenants") and (chosen.quick or chosen.step != "train" or chosen.fit in _OF_ONE):
        raise OptionError("tenants: is a compiled training step: expected no quick, decode or other fit beside it")
    elif (chosen.tenants or chosen.fit == "tenants") and mesh is not None:
        raise OptionError(f"tenants: train with all devices along fsdp: expected no mesh beside them, found {mesh}")
    for name, least in (("tenants", 0), ("tenant_rank", 1), ("tenant_slots", 0), ("capacity", 1), ("chunk", 1)):
        if getattr(chosen, name) < least:
            raise OptionError(f"{name}: expected at least {least}, found {getattr(chosen, name)}")
    if chosen.fit == "tenants" and chosen.tenant_slots:
        raise OptionError("fit tenants: expected no tenant_slots, which bound the memory of the device, found some")
    if chosen.tenant_slots and not chosen.tenants:
        raise OptionError("tenant_slots: expected tenants beside it, found none")
    if chosen.plot is not None:
        check_drawing(chosen.plot)
    if not chosen.quick:
        check_compiler(machine)


def _check_tenants(options: PlanCommandOptions) -> None:
    """Raise OptionError for options that tenants cannot have, or that the plan of their step does not know."""
    from qlora_jax.finetune.tenants.options import tenant_problems  # its package imports all of training

    problems = list(tenant_problems(options))
    if options.objective.objective == "dpo":
        problems.append("objective: expected sft, whose step is planned, found dpo")
    if options.run.accumulation_steps > 1:
        found = options.run.accumulation_steps
        problems.append(f"accumulation_steps: expected 1, a row of each tenant, found {found}")
    if problems:
        raise OptionError(f"tenants: {'; '.join(problems)}")


def read_spec(options: PlanCommandOptions, model: str, machine: Machine) -> Spec:
    """Return the step that the options describe, for the config of a model."""
    hf_config = read_config(model, options.model.revision)
    config = family_of(hf_config).config(hf_config)
    if (scaling := options.context.scaling(config, options.data.max_length)) is not None:
        config = family_of(hf_config).config(scaled(hf_config, config, scaling))
    spec = step_spec(options, config, machine.device.platform)
    if is_quantized(hf_config) and spec.model.quantization is not None:
        print("The checkpoint is quantised already: planned with the storage that the options name.", file=sys.stderr)
    return spec


def train_report(spec: Spec, machine: Machine, title: str, quick: bool) -> Report:
    """Return the report of a training step, calculated or compiled."""
    if quick:
        start = time.perf_counter()
        estimate = _quick_plan(spec, machine)
        return report_of(estimate, spec, machine, title, time.perf_counter() - start)
    return report_of(compile_train_step(spec, machine), spec, machine, title)


def tenants_report(spec: Spec, machine: Machine, model: str, chosen: PlanOptions) -> tuple[int, Report]:
    """Return (the number of tenants, the report of their step); with `fit` the most that fit.

    Raises:
        DoesNotFitError: not even one tenant fits.
    """
    plans: dict[int, TenantsPlan] = {}

    def peak(tenants: int) -> int:
        try:
            plan = compile_tenants_step(
                spec, machine, tenants=tenants, rank=chosen.tenant_rank, slots=chosen.tenant_slots or None
            )
        except DoesNotFitError as error:
            if chosen.fit != "tenants":
                raise
            return max(error.needed or 0, machine.device.memory_bytes + 1)
        plans[tenants] = plan
        print(f"tenants {tenants}: {plan.peak / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return plan.peak

    number = chosen.tenants or 8
    if chosen.fit == "tenants":
        best = largest_that_fits(peak, machine.device.memory_bytes, start=number)
        if best is None:
            raise DoesNotFitError(f"tenants 1 does not fit {machine.name}, which has {machine.device.memory_bytes:,} bytes")
        number = best[0]
    else:
        peak(number)
    title = f"{model}: training {number} tenants of rank {chosen.tenant_rank}, {spec.batch.batch_size} x {spec.batch.length}"
    return number, report_of(plans[number], spec, machine, title)


def peak_of(spec: Spec, machine: Machine, quick: bool) -> int:
    """Return the peak of memory in bytes on each device.

    For a program that the compiler refuses because it does not fit, this is a number above the memory of the device.
    """
    if quick:
        return _quick_plan(spec, machine).peak
    try:
        return compile_train_step(spec, machine).peak
    except DoesNotFitError as error:
        return max(error.needed or 0, machine.device.memory_bytes + 1)


def _quick_plan(spec: Spec, machine: Machine) -> QuickPlan:
    """Return the quick plan. It counts the activations of a tensor axis as whole on each device, which is too much."""
    along_fsdp, devices = spec.along_fsdp(machine.count)
    return quick_plan(along_fsdp, machine.device.target, devices)


def fit_number(spec: Spec, machine: Machine, kind: Literal["batch", "length"], quick: bool) -> tuple[Spec, dict[str, Any]]:
    """Return the step with the largest batch or length that fits, and that number by its name."""
    field, step = ("batch_size", 1) if kind == "batch" else ("length", 128)
    limit = machine.device.memory_bytes

    def with_number(number: int) -> Spec:
        return dataclasses.replace(spec, batch=dataclasses.replace(spec.batch, **{field: number}))

    def peak(number: int, by_arithmetic: bool = quick) -> int:
        size = peak_of(with_number(number), machine, by_arithmetic)
        if not by_arithmetic:
            print(f"{field} {number}: {size / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return size

    guess = largest_that_fits(lambda number: peak(number, True), limit, start=getattr(spec.batch, field), step=step)
    best = guess if quick else largest_that_fits(peak, limit, start=step if guess is None else guess[0], step=step)
    if best is None:
        need = peak(step, True)
        choice = _cheapest(with_number(step), machine, True)
        hint = "no options would make it fit" if choice is None else f"what would: {_flags(choice[0], machine)}"
        raise DoesNotFitError(
            f"{field} {step} does not fit {machine.name}: expected at most {limit / 2**30:.2f} GiB, found about "
            f"{need / 2**30:.2f} GiB; {hint}"
        )
    return with_number(best[0]), {field: best[0]}


def fit_options(spec: Spec, machine: Machine, quick: bool) -> tuple[Spec, Machine, dict[str, Any]]:
    """Return the step and the machine with the cheapest options that fit, and these options in words."""
    best = _cheapest(spec, machine, quick)
    if best is None:
        least = min(
            quick_plan(choice.spec, machine.device.target, machine.count * choice.devices).peak
            for choice in cheaper_first(spec)
        )
        raise DoesNotFitError(
            f"nothing fits {machine.name}: expected at most {machine.device.memory_bytes / 2**30:.2f} GiB, found about "
            f"{least / 2**30:.2f} GiB with all options and 8 times the devices"
        )
    choice, _ = best
    words = _flags(choice, machine)
    return choice.spec, _times(machine, choice.devices), {"options": words}


def _cheapest(spec: Spec, machine: Machine, quick: bool) -> tuple[Choice, int] | None:
    """Return the cheapest options that fit and their peak of memory; None if none fit."""

    def estimate(choice: Choice) -> int:
        return quick_plan(choice.spec, machine.device.target, machine.count * choice.devices).peak

    def peak(choice: Choice) -> int:
        size = peak_of(choice.spec, _times(machine, choice.devices), quick)
        if not quick:
            print(f"{_flags(choice, machine)}: {size / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return size

    return cheapest_that_fits(cheaper_first(spec), estimate, peak, machine.device.memory_bytes)


def _times(machine: Machine, factor: int) -> Machine:
    """Return a machine with `factor` times as many devices; the smallest sides of its topology are doubled first."""
    shape = list(machine.shape)
    while factor > 1:
        side = shape.index(min(shape))
        shape[side], factor = shape[side] * 2, factor // 2
    return Machine(machine.device, tuple(shape))


def _flags(choice: Choice, machine: Machine) -> str:
    """Return the flags of a choice of options, in words."""
    words = [word for word in choice.words if "times the devices" not in word]
    words += [f"--device {_times(machine, choice.devices).name}"] if choice.devices > 1 else []
    return " ".join(words) or "the options as they are"
