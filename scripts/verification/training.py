"""Training steps of a real and of random models: time, memory and loss against the plan.

weights     how the weights were made, and how many layers there are: fewer where memory is short
compile     tracing, lowering and compiling the step on this machine
loss        one batch is learned again and again, so its loss must fall
step        the median time of the steps but the first
floor       the step's time against the least time that the compiled plan gives by operations and by memory traffic
MFU         the operations that the model needs (recomputed ones are not counted) by the time and the device's peak
peak        the most memory that the device's allocator reports, against the plan's; it also holds libraries' workspaces
host        what host memory costs: the optimizer's state there, and the residuals of the layers there
"""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from qlora_jax.plan import CompilerMissing, Machine, Report, compile_train_step, quick_plan, report_of
from qlora_jax.plan.flops import count_flops
from qlora_jax.train import build_step, place_step
from scripts.verification.checks import Check, Row, Skipped, Status, measured, rows_of, skipped
from scripts.verification.machine import attached_machine, peak_memory
from scripts.verification.workloads import (
    WORKLOADS,
    Run,
    Spec,
    Workload,
    another_adapter,
    layers_of,
    random_weights,
    real_weights,
    step_spec,
    train,
)

GIB = 2**30
_NAMES = ("weights", "compile", "loss", "step", "MFU", "peak against the quick plan", "peak against the plan", "floor")
_HOST = ("optimizer in host memory", "residuals in host memory")
# The plan must be right to this share and this number of bytes, which are what an allocator and libraries may add.
_PLAN, _QUICK, _LIBRARIES = 0.05, 0.15, 256 * 2**20


def checks_of(section: str, small: bool) -> list[Check]:
    """Return the checks of one model, which share its weights."""
    work = WORKLOADS[section]
    return [Check((*_NAMES, *(_HOST if work.offload else ())), partial(_train, work, small))]


def _train(work: Workload, small: bool) -> Iterator[Row]:
    spec, machine, steps = step_spec(work, small), attached_machine(), min(work.steps, 6) if small else work.steps
    (graphdef, adapter, frozen), origin = _weights(work, spec, small)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapter)
    jax.block_until_ready((adapter, frozen))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((adapter, frozen)))
    text = f"{origin}, {layers_of(spec)} layers, {size / GIB:.2f} GiB; {spec.batch.batch_size} x {spec.batch.length} tokens"
    yield measured("weights", text, bytes=size, layers=layers_of(spec))
    before = peak_memory()
    run = train(spec, graphdef, adapter, frozen, steps)
    del adapter
    peak = peak_memory()
    yield measured("compile", f"{run.compile_seconds:.1f} s", seconds=run.compile_seconds)
    yield _loss(run)
    rate = spec.tokens / run.median
    yield measured("step", f"{run.median * 1e3:.1f} ms, {rate:,.0f} tokens/s", seconds=run.seconds, tokens_per_second=rate)
    yield _utilisation(spec, run, machine)
    yield from _peaks(spec, machine, run, before, peak)
    if work.offload:
        if "pinned_host" not in {memory.kind for memory in jax.devices()[0].addressable_memories()}:
            raise Skipped("this device has no pinned host memory")
        for name in _HOST[: 1 if small else 2]:
            yield _host_memory(name, spec, shapes, frozen, run)
        if small:
            yield skipped(_HOST[1], "--small leaves it out")


def _weights(work: Workload, spec: Spec, small: bool) -> tuple[tuple[Any, Any, Any], str]:
    if work.real and not small:
        weights, remark = real_weights(spec.model)
        return weights or random_weights(spec.model), remark
    return random_weights(spec.model), "random weights"


def _loss(run: Run) -> Row:
    first, last = run.losses[0], run.losses[-1]
    status: Status = "pass" if all(map(math.isfinite, run.losses)) and last < first else "fail"
    text = f"{first:.3f}, after {len(run.losses)} steps {last:.3f}; must fall"
    return Row("loss", status, text, {"losses": run.losses})


def _utilisation(spec: Spec, run: Run, machine: Machine | None) -> Row:
    if machine is None:
        return skipped("MFU", "the peak of this device is not known to the plans")
    saving = dataclasses.replace(spec, model=dataclasses.replace(spec.model, remat="none"))
    step = place_step(build_step(saving), None)
    jitted: Any = step.jit_train()
    platform, peak = machine.device.platform, machine.device.flops
    needed = count_flops(jitted.trace(step.state, step.frozen, step.batch).jaxpr, platform=platform)
    done = count_flops(run.traced.jaxpr, platform=platform)
    text = f"{needed / run.median / peak:.1%}; with recomputed operations {done / run.median / peak:.1%}"
    return measured("MFU", f"{text} of {peak / 1e12:.0f} TFLOP/s", flops=needed, flops_done=done)


def _peaks(spec: Spec, machine: Machine | None, run: Run, before: int | None, peak: int | None) -> Iterator[Row]:
    """Yield the rows that compare with plans: of the peak by arithmetic and by the compiler, and of the time."""
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    memory = run.compiled.memory_analysis()
    own = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    own -= memory.alias_size_in_bytes
    quick = quick_plan(spec, platform, 1).peak
    yield _compared("peak against the quick plan", quick, _QUICK, before, peak, program=own)

    def compiled_plan() -> Iterator[Row]:
        if machine is None:
            reason = "a CPU" if platform == "cpu" else "a device that is not among the plans'"
            raise Skipped(f"{reason} has no compiled plan; XLA's buffers of the step take {own / GIB:.2f} GiB")
        try:
            report = report_of(compile_train_step(spec, machine), spec, machine, "")
        except CompilerMissing as error:
            raise Skipped(str(error)) from error
        yield _compared("peak against the plan", report.total, _PLAN, before, peak, program=own)
        yield _floor(report, run)

    yield from rows_of(Check(("peak against the plan", "floor"), compiled_plan))  # an error there is no end of the rest


def _floor(report: Report, run: Run) -> Row:
    by, floor = max(report.floors.items(), key=lambda item: item[1])
    text = f"{floor * 1e3:.1f} ms by {by}; the step takes {run.median / floor:.2f} times that"
    return measured("floor", text, floors=report.floors, flops=report.flops, traffic=report.traffic)


def _compared(name: str, planned: int, share: float, before: int | None, peak: int | None, *, program: int) -> Row:
    values = {"planned": planned, "measured": peak, "program": program}
    if peak is None or before is None:
        row = skipped(name, f"this device reports no peak; planned {planned / GIB:.3f} GiB")
        return dataclasses.replace(row, values=values)
    if peak <= before:
        row = skipped(
            name, f"making the weights took {peak / GIB:.2f} GiB, more than the step; planned {planned / GIB:.2f} GiB"
        )
        return dataclasses.replace(row, values=values)
    status: Status = "pass" if abs(peak - planned) <= share * planned + _LIBRARIES else "fail"
    text = f"{peak / GIB:.3f} GiB, planned {planned / GIB:.3f}: {peak / planned - 1:+.1%}, at most {share:.0%} and 0.25 GiB"
    return Row(name, status, text, values)


def _host_memory(name: str, spec: Spec, shapes: Any, frozen: Any, plain: Run) -> Row:
    """Return the time of a step with the optimizer's state or with the residuals in host memory."""
    if name == _HOST[0]:
        spec = dataclasses.replace(spec, optimizer=dataclasses.replace(spec.optimizer, host_optimizer=True))
    else:
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, remat="offload"))
    run = train(spec, build_step(spec).graphdef, another_adapter(shapes), frozen, len(plain.seconds))
    sizes = [one.compiled.memory_analysis() for one in (plain, run)]
    saved = sizes[0].argument_size_in_bytes + sizes[0].temp_size_in_bytes
    saved -= sizes[1].argument_size_in_bytes + sizes[1].temp_size_in_bytes
    text = f"{run.median * 1e3:.1f} ms, {run.median / plain.median:.2f} times as long; "
    text += f"{saved / GIB:.2f} GiB less on the device"
    values = {"seconds": run.seconds, "compile_seconds": run.compile_seconds, "saved_bytes": saved}
    return Row(name, "measured" if all(map(math.isfinite, run.losses)) else "fail", text, values)
