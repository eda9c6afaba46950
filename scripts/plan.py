"""What a run needs: its training step or its decode step, compiled for devices that need not be attached.

    python scripts/plan.py --model llama-3-8b --batch-size 4 --max-length 2048 --device h100
    python scripts/plan.py --config recipes/guanaco-65b.toml --device a100-80 --plot memory.png
    python scripts/plan.py --model llama-3-8b --max-length 2048 --device v5e:2x2
    python scripts/plan.py --model llama-65b --rank 64 --device h100 --fit batch
    python scripts/plan.py --model llama-3-8b --step decode --capacity 4096 --device l4
    python scripts/plan.py --model llama-3-8b --device rtx4090 --quick

The options are those of scripts/train.py and mean the same, so that its config files can be planned as they are. Figures are
those of XLA's buffer assignment, on each device; with --quick they are arithmetic. The last line is JSON.
"""

import dataclasses
import difflib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

# The plan runs nothing on a device: one that is attached stays free, and without one JAX loads its compiler only so.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a metadata server what machine this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA complains of programs that do not fit: that is what is asked

from qlora_jax.checkpoint.bitsandbytes import is_quantized
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from qlora_jax.errors import CheckpointError, DoesNotFitError
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import ModelSpec, family_of, scaled
from qlora_jax.plan import (
    HUB_IDS,
    SIZES,
    Choice,
    Machine,
    Report,
    as_json,
    cheaper_first,
    cheapest_that_fits,
    check_compiler,
    check_drawing,
    compile_decode_step,
    compile_train_step,
    draw,
    largest_that_fits,
    machine_named,
    quick_plan,
    report_of,
    spec_values,
    table,
)
from qlora_jax.train import StepSpec

Spec = StepSpec[ModelSpec]

_DEFAULT = "smollm2-135m"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """What to plan, and for which device."""

    device: str = "h100"
    """Device: h100, h200, b200, a100-80, a100-40, l4, rtx4090, rtx3090, v4, v5e, v5p or v6e; several: h100x4, v5e:2x2."""
    step: Literal["train", "decode"] = "train"
    """The training step, or the step that generates one token a row."""
    capacity: int = 2048
    """Tokens a row that the cache of the decode step holds."""
    quick: bool = False
    """Arithmetic instead of a compilation: seconds, and a working memory that is estimated."""
    fit: Literal["none", "batch", "length", "options"] = "none"
    """Search what fits: the largest batch-size, the largest max-length (a multiple of 128), or the cheapest options."""
    plot: Path | None = None
    """File for a bar of memory against the device's limit."""


@dataclasses.dataclass(frozen=True)
class Arguments(Options):
    """What a run needs on a device."""

    plan: PlanOptions = dataclasses.field(default_factory=PlanOptions)


def main() -> int:
    try:
        run(parse(Arguments, description=__doc__))
    except (ValueError, OSError) as error:  # errors of the package are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Arguments) -> None:
    asked = arguments.plan
    machine = machine_named(asked.device)
    if asked.step == "decode" and (asked.quick or asked.fit != "none"):
        beside = "quick" if asked.quick else f"fit {asked.fit}"
        raise ValueError(f"step decode: is compiled as it is: expected no quick and no fit beside it, found {beside}")
    if asked.capacity < 1:
        raise ValueError(f"capacity: expected at least 1, found {asked.capacity}")
    if asked.plot is not None:
        check_drawing(asked.plot)
    if not asked.quick:
        check_compiler(machine)  # before anything is downloaded or traced
    model = arguments.model.model or _DEFAULT
    hf_config = read_config(model)
    config = family_of(hf_config).config(hf_config)
    if (scaling := arguments.context.scaling(config, arguments.data.max_length)) is not None:
        config = family_of(hf_config).config(scaled(hf_config, config, scaling))
    spec = step_spec(arguments, config, machine.device.platform)
    if is_quantized(hf_config) and spec.model.quantization is not None:
        print("The checkpoint is quantised already: planned with the storage that the options name.", file=sys.stderr)
    found: dict[str, Any] = {}
    if asked.fit == "options":
        spec, machine, found = fit_options(spec, machine, asked.quick)
    elif asked.fit != "none":
        spec, found = fit_number(spec, machine, asked.fit, asked.quick)
    if asked.step == "decode":
        plan = compile_decode_step(spec, machine, capacity=asked.capacity)
        title = f"{model}: decoding {spec.batch.batch_size} x {asked.capacity}"
        report = report_of(plan, spec, machine, title)
    else:
        report = train_report(spec, machine, f"{model}: training {spec.batch.batch_size} x {spec.batch.length}", asked.quick)
    print(table(report))
    if asked.fit != "none":
        print(f"  found: {', '.join(f'{name} {value}' for name, value in found.items())}")
    if asked.plot is not None:
        draw([report], asked.plot)
        print(f"  drawn: {asked.plot}")
    print(json.dumps({**as_json(report), "model": model, "recipe": spec_values(spec), "found": found}))


def train_report(spec: Spec, machine: Machine, title: str, quick: bool) -> Report:
    if quick:
        start = time.perf_counter()
        plan = quick_plan(spec, machine.device.platform, machine.count)
        return report_of(plan, spec, machine, title, time.perf_counter() - start)
    return report_of(compile_train_step(spec, machine), spec, machine, title)


def peak_of(spec: Spec, machine: Machine, quick: bool) -> int:
    """Bytes on each device; of what the compiler refuses for want of memory, more than the device has."""
    if quick:
        return quick_plan(spec, machine.device.platform, machine.count).peak
    try:
        return compile_train_step(spec, machine).peak
    except DoesNotFitError as error:
        return max(error.needed or 0, machine.device.memory_bytes + 1)


def fit_number(spec: Spec, machine: Machine, kind: Literal["batch", "length"], quick: bool) -> tuple[Spec, dict[str, Any]]:
    """Return the step with the largest batch or length that fits."""
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
        hint = "nothing that the options can do would" if choice is None else f"what would: {_said(choice[0], machine)}"
        raise ValueError(
            f"{field} {step} does not fit {machine.name}: expected at most {limit / 2**30:.2f} GiB, found about "
            f"{need / 2**30:.2f} GiB; {hint}"
        )
    return with_number(best[0]), {field: best[0]}


def fit_options(spec: Spec, machine: Machine, quick: bool) -> tuple[Spec, Machine, dict[str, Any]]:
    """Return the step and the machine with the cheapest options that fit."""
    best = _cheapest(spec, machine, quick)
    if best is None:
        least = min(
            quick_plan(choice.spec, machine.device.platform, machine.count * choice.devices).peak
            for choice in cheaper_first(spec)
        )
        raise ValueError(
            f"nothing fits {machine.name}: expected at most {machine.device.memory_bytes / 2**30:.2f} GiB, found about "
            f"{least / 2**30:.2f} GiB with all options and 8 times the devices"
        )
    choice, _ = best
    words = _said(choice, machine)
    return choice.spec, _times(machine, choice.devices), {"options": words}


def _cheapest(spec: Spec, machine: Machine, quick: bool) -> tuple[Choice, int] | None:
    def estimate(choice: Choice) -> int:
        return quick_plan(choice.spec, machine.device.platform, machine.count * choice.devices).peak

    def peak(choice: Choice) -> int:
        size = peak_of(choice.spec, _times(machine, choice.devices), quick)
        if not quick:
            print(f"{_said(choice, machine)}: {size / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        return size

    return cheapest_that_fits(cheaper_first(spec), estimate, peak, machine.device.memory_bytes)


def _times(machine: Machine, factor: int) -> Machine:
    """So many times as many devices; of a TPU, the topology grows where it is smallest."""
    shape = list(machine.shape)
    while factor > 1:
        side = shape.index(min(shape))
        shape[side], factor = shape[side] * 2, factor // 2
    return Machine(machine.device, tuple(shape))


def _said(choice: Choice, machine: Machine) -> str:
    words = [word for word in choice.words if "times the devices" not in word]
    words += [f"--device {_times(machine, choice.devices).name}"] if choice.devices > 1 else []
    return " ".join(words) or "the options as they are"


def read_config(model: str) -> dict[str, Any]:
    """The config.json that a size, a path or a hub id stands for; no weights are read or downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if model in SIZES:
        return SIZES[model]
    path = Path(model).expanduser()
    if not path.exists() and model in HUB_IDS:
        return SIZES[HUB_IDS[model]]
    if path.suffix.lower() == ".gguf":
        return open_checkpoint(model).config
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        if "/" not in model:  # a size misspelt: do not go and ask the hub for it
            near = difflib.get_close_matches(model, SIZES, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise CheckpointError(f"--model {model}: no such path, and no size by that name{hint} known: {', '.join(SIZES)}")
        path = _config_from_hub(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _config_from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    print(f"Asking the hub for config.json of {model}.", file=sys.stderr, flush=True)
    logging.set_verbosity_error()  # it would say each try that fails: the error below says it once
    try:
        return Path(hf_hub_download(model, "config.json"))
    # Any of the hub's own errors, or of the HTTP client beneath it, which changes with its version.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        near = difflib.get_close_matches(model, HUB_IDS, n=2, cutoff=0.6)
        hint = f"; without the hub {' and '.join(near)} are known" if near else ""
        raise CheckpointError(
            f"--model {model}: no such path, and no hub id that can be read "
            f"({type(error).__name__}: {reason}){hint}; sizes by name: {', '.join(SIZES)}"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
