"""What the memory of a run follows from: its options, as `plan` takes them; and the check before anything is loaded.

GPU, TPU    the quick plan against what the device's allocator may have; refused where it needs more than that by more
            than the error of the quick plan; and what it keeps in host memory against what the machine has available
CPU         the same against the machine's free memory, refused only where the parts that are known exactly do not fit:
            the rest there is a guess
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig
from qlora_jax.peft import LoRA, Method
from qlora_jax.plan.fit import Choice, cheaper_first
from qlora_jax.plan.quick import ERROR, QuickPlan, quick_plan
from qlora_jax.plan.recipe import Recipe
from qlora_jax.quant import Quantization


def recipe_of(
    options: Options,
    config: ModelConfig,
    platform: str,
    *,
    method: Method | None = None,
    quantization: Quantization | str | None = "asked",
) -> Recipe:
    """The recipe that a run with these options is, on devices of a platform ("cpu", "gpu", "cuda" or "tpu").

    Args:
        method, quantization: those of the run where it knows better than its options do: an adapter to go on from, a
            checkpoint that is quantised already.

    Raises:
        ValueError: options that describe no run.
    """
    options.check()
    on_cpu, data, model = platform == "cpu", options.data, options.model
    decoder = isinstance(config, DecoderConfig)
    packed = decoder and options.objective.objective == "sft" and data.packs
    options.context.check(config, options.objective.objective)
    if method is None:
        method = options.method()
        if isinstance(method, LoRA):
            saved = options.context.trained(method.modules_to_save, config.parameter_mappings)
            method = dataclasses.replace(method, modules_to_save=saved)
        method, config = _with_special_tokens(options, method, config)
    return Recipe(
        config=config,
        quantization=model.quantization() if isinstance(quantization, str) else quantization,
        embedding_storage=model.embedding_storage,
        method=method,
        dtype=("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype,
        remat=("dots" if on_cpu else "full") if model.remat == "auto" else model.remat,
        objective=options.objective.objective,
        batch_size=options.run.batch_size,
        micro_batches=options.run.accumulation_steps,
        # Rows that are not packed have a place less than tokens, in a multiple of 64: at most that, by the longest example.
        length=data.max_length if packed or data.streaming else min(-(-(data.max_length - 1) // 64) * 64, data.max_length),
        packed=packed,
        optimizer=options.optimizer.optimizer,
        host_optimizer=options.optimizer.host_offload or options.optimizer.host_adapter,
        host_adapter=options.optimizer.host_adapter,
        weight_decay=options.optimizer.weight_decay,
        max_grad_norm=options.optimizer.max_grad_norm or None,
        neftune_alpha=options.optimizer.neftune_alpha if options.objective.objective == "sft" else 0.0,
        attention_groups=options.context.groups,
        reference=options.objective.objective == "dpo" and options.starts_from_adapter(),
    )


def _with_special_tokens(options: Options, method: Method, config: ModelConfig) -> tuple[Method, ModelConfig]:
    """With a row of the token table more for each new token, and each of them trained."""
    count, size = len(options.lora.special_tokens), config.vocab_size
    if not count or not isinstance(method, LoRA):
        return method, config
    tokens = (*method.trainable_token_indices, *range(size, size + count))
    return (
        dataclasses.replace(method, trainable_token_indices=tokens),
        dataclasses.replace(config, vocab_size=size + count),
    )


def check_memory(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Refuses a run that cannot fit the attached devices or their host; nothing where nobody knows their memory.

    Raises:
        ValueError: it cannot; the message says what would, as options of the run.
    """
    limit, host_limit = memory_limit(), available_memory()
    if host_limit is not None:
        host_limit //= jax.local_device_count()
    if limit is not None:
        check_against(recipe, jax.default_backend(), jax.device_count(), limit, say, host_limit=host_limit)


def check_against(
    recipe: Recipe, backend: str, devices: int, limit: int, say: Callable[[str], None], *, host_limit: int | None = None
) -> None:
    """`check_memory` for devices that have `limit` bytes each.

    Args:
        host_limit: bytes of host memory for each device, which has a copy of its own of what lies there; None: unknown. On
            a CPU it is the device's own.
    """
    on_cpu = backend == "cpu"
    platform = "cuda" if backend == "gpu" else backend

    def plan_of(recipe: Recipe) -> QuickPlan:
        return quick_plan(recipe, platform, devices)

    def needed(plan: QuickPlan) -> float:
        return plan.exact + plan.host_peak if on_cpu else plan.peak / (1 + ERROR)

    def host_holds(plan: QuickPlan, share: float = 1.0) -> bool:
        return on_cpu or host_limit is None or plan.host_peak <= host_limit * share

    plan = plan_of(recipe)
    if needed(plan) <= limit and host_holds(plan):
        if not on_cpu and plan.peak > limit * (1 - ERROR):
            say(f"Memory is tight: about {_gib(plan.peak)} of {_gib(limit)} planned on each device.")
        return

    def fits(plan: QuickPlan) -> bool:  # what is proposed should do so for certain: on a CPU by the guess, too
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
    choices = itertools.chain(cheaper_first(recipe, devices=(1,), host=not on_cpu), _less_on_the_host(recipe))
    choice = next((choice for choice in choices if fits(plan_of(choice.recipe))), None)
    advice = "nothing that the options can do would fit" if choice is None else f"this would fit: {' '.join(choice.words)}"
    raise ValueError(
        f"{' and '.join(problems)}: {advice} "
        "(--no-memory-check runs it all the same; scripts/plan.py shows what takes the memory)"
    )


def _less_on_the_host(recipe: Recipe) -> Iterator[Choice]:
    """Ways of the same step that leave less to the host than the recipe does, the ones that take back least first."""
    remat = ("--remat full",) if recipe.remat == "offload" else ()
    adapter = ("--no-host-adapter",) if recipe.host_adapter else ()
    less = dataclasses.replace(recipe, remat="full") if remat else recipe
    without_adapter = dataclasses.replace(less, host_adapter=False)
    ways: list[tuple[tuple[str, ...], Recipe]] = [(remat, less)] if remat else []
    if adapter:
        ways.append(((*remat, *adapter, "--host-offload"), without_adapter))
    if recipe.host_optimizer:
        ways.append(((*remat, *adapter, "--no-host-offload"), dataclasses.replace(without_adapter, host_optimizer=False)))
    for words, way in ways:
        for choice in cheaper_first(way, devices=(1,), host=False):
            yield dataclasses.replace(choice, words=(*words, *choice.words))


def memory_limit() -> int | None:
    """Bytes that each device may use; on CPU, those that are free for all of them."""
    if jax.default_backend() != "cpu":
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("bytes_limit")
    available = available_memory()
    return None if available is None else available // jax.device_count()


def available_memory() -> int | None:
    """Bytes of this machine's memory that a program may still take; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # no Linux
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
