"""The check of a run's memory, before anything is loaded.

GPU, TPU    compares the quick plan with the memory of the device's allocator, and refuses the run if the plan needs more by
            more than its error; also compares the plan's host memory with the machine's free memory
CPU         compares the quick plan with the machine's free memory, and refuses the run only if the parts that are known
            exactly do not fit, since the rest is a guess there
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec
from qlora_jax.nn import AttentionTarget, attention_target
from qlora_jax.plan.factors import ERROR
from qlora_jax.plan.fit import Choice, cheaper_first, with_host_memory
from qlora_jax.plan.quick import QuickPlan, quick_plan
from qlora_jax.train import StepSpec

_logger = logging.getLogger(__name__)


def check_memory(spec: StepSpec[ModelSpec]) -> None:
    """Refuse a run that cannot fit the attached devices or their host. Memory that is unknown is not checked.

    Args:
        spec: the step of the run.

    Raises:
        DoesNotFitError: the run cannot fit; the message says which options would.
    """
    limit, host_limit = memory_limit(), available_memory()
    if host_limit is not None:
        host_limit //= jax.local_device_count()
    if limit is not None:
        check_against(spec, attention_target(), jax.device_count(), limit, host_limit=host_limit)


def check_against(
    spec: StepSpec[ModelSpec],
    device: str | AttentionTarget,
    devices: int,
    limit: int,
    *,
    host_limit: int | None = None,
) -> None:
    """Refuse a run that cannot fit devices with `limit` bytes each; see `check_memory`.

    Args:
        spec: the step of the run.
        device: the platform of the devices ("cpu", "gpu" or "tpu"), or the target of one of them.
        devices: the number of devices.
        limit: the bytes of each device.
        host_limit: the bytes of host memory for each device, which has its own copy of what is stored there; None: unknown.
            On a CPU host memory is the device's own.
    """
    target = attention_target(device)
    spec, devices = spec.along_fsdp(devices)
    on_cpu = target.platform == "cpu"

    def plan_of(spec: StepSpec[ModelSpec]) -> QuickPlan:
        return quick_plan(spec, target, devices)

    def needed(plan: QuickPlan) -> float:
        return plan.exact + plan.host_peak if on_cpu else plan.peak / (1 + ERROR)

    def host_holds(plan: QuickPlan, share: float = 1.0) -> bool:
        return on_cpu or host_limit is None or plan.host_peak <= host_limit * share

    plan = plan_of(spec)
    if needed(plan) <= limit and host_holds(plan):
        if not on_cpu and plan.peak > limit * (1 - ERROR):
            _logger.info("Memory is tight: about %s of %s planned on each device.", _gib(plan.peak), _gib(limit))
        return

    def fits(plan: QuickPlan) -> bool:  # a proposal must fit for certain: on a CPU with the guess, too
        size = plan.peak + plan.host_peak if on_cpu else needed(plan)
        return size <= limit * (1 - 2 * ERROR) and host_holds(plan, 1 - 2 * ERROR)

    problems = []
    if needed(plan) > limit:
        found = plan.exact + plan.host_peak if on_cpu else plan.peak
        about, where = ("at least", "this machine has") if on_cpu else ("about", "each device has")
        problems.append(f"the run needs {about} {_gib(found)}, {where} {_gib(limit)}")
    if not host_holds(plan):
        problems.append(
            f"the run keeps {_gib(plan.host_peak)} in host memory for each device, this machine has {_gib(host_limit or 0)} "
            "available for each"
        )
    choices = itertools.chain(cheaper_first(spec, devices=(1,), host=not on_cpu), _less_on_the_host(spec))
    choice = next((choice for choice in choices if fits(plan_of(choice.spec))), None)
    advice = "nothing that the options can do would fit" if choice is None else f"this would fit: {' '.join(choice.words)}"
    raise DoesNotFitError(
        f"{' and '.join(problems)}: {advice} "
        "(--no-memory-check runs it all the same; scripts/plan.py shows what takes the memory)"
    )


def _less_on_the_host(spec: StepSpec[ModelSpec]) -> Iterator[Choice]:
    """Yield ways to run the same step with less host memory, those that move the least back to the device first."""
    host = spec.optimizer
    remat = ("--remat full",) if spec.model.remat == "offload" else ()
    adapter = ("--no-host-adapter",) if host.host_adapter else ()
    less = dataclasses.replace(spec, model=dataclasses.replace(spec.model, remat="full")) if remat else spec
    ways: list[tuple[tuple[str, ...], StepSpec[ModelSpec]]] = [(remat, less)] if remat else []
    if adapter:
        ways.append(((*remat, *adapter, "--host-offload"), with_host_memory(less, optimizer=True, adapter=False)))
    if host.host_optimizer:
        none = with_host_memory(less, optimizer=False, adapter=False)
        ways.append(((*remat, *adapter, "--no-host-offload"), none))
    for words, way in ways:
        for choice in cheaper_first(way, devices=(1,), host=False):
            yield dataclasses.replace(choice, words=(*words, *choice.words))


def memory_limit() -> int | None:
    """Return the bytes that each device may use, or None if they are unknown; on a CPU its share of the free memory."""
    if jax.default_backend() != "cpu":
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")
    available = available_memory()
    return None if available is None else available // jax.local_device_count()


def available_memory() -> int | None:
    """Return the bytes of this machine's memory that are free; None if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
