"""Compare the quick plan with the compiled one, over a grid of models, devices and recipes, and fit its factors again.

    python scripts/benchmarks/measure_plan.py --record plans.jsonl
    python scripts/benchmarks/measure_plan.py --models llama-3.2-1b --devices h100 --record plans.jsonl

Every cell of the grid is compiled once. With --record, earlier results are read from the file and new ones are added to it,
so that a grid can be measured in parts. A program that the compiler refuses because it does not fit is left out. Then the
factors of qlora_jax/plan/quick.py are fitted by least squares of the relative error, none below 0, from several starting
points. About a third of the cells, chosen by a checksum of their names, is held out from the fit. The errors are printed for
the cells of the fit and for those held out, with the present factors and with the fitted ones; what is held out says how far
the quick plan is from other models and runs. The last line is JSON.
"""

import dataclasses
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from qlora_jax import cli
from qlora_jax.errors import DoesNotFitError, OptionError
from qlora_jax.models import ModelConfig, ModelSpec
from qlora_jax.peft import LoRA
from qlora_jax.plan import SIZES, Machine, check_compiler, compile_train_step, machine_named, quick_plan
from qlora_jax.plan.factors import ERROR, FACTORS
from qlora_jax.plan.features import features
from qlora_jax.plan.quick import kind_of, worst_moment
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import BatchSpec, OptimizerSpec, StepSpec, language_model_objective
from scripts.benchmarks.model_sizes import USUAL, check_names, config_of
from scripts.benchmarks.page import Section, text

Spec = StepSpec[ModelSpec]
_PLAIN = language_model_objective(packed=False)


def _paper(config: ModelConfig) -> Spec:
    model, optimizer = ModelSpec(config, method=LoRA(64, 16.0, 0.05)), OptimizerSpec(host_optimizer=True)
    return StepSpec(model, _PLAIN, BatchSpec(length=512), optimizer)


def _short(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(16)), _PLAIN, BatchSpec(length=1024))


def _row(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(16)), _PLAIN, BatchSpec(length=2048))


def _resident(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(64)), _PLAIN, BatchSpec(length=512))


def _plain(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(16)), _PLAIN, BatchSpec(batch_size=4, length=2048))


def _packed(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(16)), language_model_objective(), BatchSpec(batch_size=4, length=2048))


def _offload(config: ModelConfig) -> Spec:
    model = ModelSpec(config, method=LoRA(16), remat="offload")
    batch = BatchSpec(batch_size=2, micro_batches=2, length=2048)
    return StepSpec(model, _PLAIN, batch, OptimizerSpec("adamw8bit", host_optimizer=True))


def _dots(config: ModelConfig) -> Spec:
    return StepSpec(ModelSpec(config, method=LoRA(32), remat="dots"), _PLAIN, BatchSpec(length=1024), OptimizerSpec("lion"))


# The steps of the grid: the paper's, the same with the optimizer's state on the device, that of usual_models.py, one of more
# tokens, one of more rows, the same packed, one that offloads, and one that saves the results of matrix products.
RECIPES: dict[str, Callable[[ModelConfig], Spec]] = {
    "paper": _paper,
    "resident": _resident,
    "short": _short,
    "row": _row,
    "plain": _plain,
    "packed": _packed,
    "offload": _offload,
    "dots": _dots,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the grid."""

    models: tuple[str, ...] = ("smollm2-135m", "llama-3.2-1b", "llama-3-8b", "llama-13b", "qwen3-8b")
    """Models by the name of their size, or the usual model of a family by its model_type."""
    devices: tuple[str, ...] = ("h100", "rtx4090", "h100x4", "v5e", "v5p")
    """Devices, in the notation of scripts/plan.py."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Names of recipes in this file."""
    record: Path | None = None
    """File of JSON lines with compiled results, which is read and extended."""
    compile: bool = True
    """Whether to compile cells that the record does not have."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Compile what is missing, fit the factors and print all errors."""
    check_names("models", arguments.models, [*SIZES, *(name for name in USUAL if name != "t5")])
    check_names("recipes", arguments.recipes, RECIPES)
    machines = [machine_named(name) for name in arguments.devices]
    recorded = _read(arguments.record)
    rows = []
    for machine in machines:
        if arguments.compile:
            check_compiler(machine)
        for model in arguments.models:
            for name in arguments.recipes:
                spec = RECIPES[name](config_of(model))
                key = (model, machine.name, name)
                if key not in recorded and arguments.compile:
                    recorded[key] = _compile(spec, machine)
                    _add(arguments.record, key, recorded[key])
                    print(*key, f"{(recorded[key] or 0) / 2**30:.3f} GiB", file=sys.stderr, flush=True)
                if recorded.get(key) is not None:
                    rows.append(_compared(key, spec, machine, recorded[key]))
    if not rows:
        raise OptionError("models, devices, recipes: expected at least one program that was compiled, found none")
    kinds = sorted({row["kind"] for row in rows})
    known = [row for row in rows if not row["held_out"]]
    fitted = {kind: fit([row for row in known if row["kind"] == kind], FACTORS[kind]) for kind in kinds}
    for row in rows:
        row["error"] = row["quick"] / row["compiled"] - 1
        row["fitted_error"] = peak_with(row, fitted[row["kind"]]) / row["compiled"] - 1
    print(text(_section(rows)))
    summary: dict[str, Any] = {"rows": len(rows), "factors": fitted}
    for name in ("error", "fitted_error"):
        for device in dict.fromkeys(row["device"] for row in rows):
            for held_out in (False, True):
                sizes = np.abs([row[name] for row in rows if row["device"] == device and row["held_out"] == held_out])
                if sizes.size:
                    within = float((sizes <= ERROR).mean())
                    found = {"cells": len(sizes), "worst": sizes.max(), "mean": sizes.mean(), "within": within}
                    summary.setdefault(name, {})[f"{device}, {'held out' if held_out else 'fit'}"] = found
    for kind, factors in fitted.items():
        print(f'    "{kind}": {json.dumps(factors)},')
    print(json.dumps({"method": "quick plan against compiled plan, peak of device memory", **summary, "grid": rows}))


def is_held_out(key: tuple[str, str, str]) -> bool:
    """Return whether a cell (model, device, recipe) is held out from the fit, which about a third of them are."""
    return zlib.crc32(" ".join(key).encode()) % 3 == 0


def _section(rows: list[dict[str, Any]]) -> Section:
    """Return the table of all cells."""
    cells = [
        (
            *(row[name] for name in ("model", "device", "recipe")),
            *(f"{row[name] / 2**30:.3f}" for name in ("compiled", "quick")),
            *(f"{row[name]:.1%}" for name in ("error", "fitted_error")),
            "yes" if row["held_out"] else "",
        )
        for row in rows
    ]
    columns = ("model", "device", "recipe", "compiled GiB", "quick GiB", "error", "error if fitted", "held out")
    return Section("The quick plan", (), columns, tuple(cells))


def _compile(spec: Spec, machine: Machine) -> int | None:
    """Return the compiled peak, or None if the program does not fit."""
    start = time.perf_counter()
    try:
        peak = compile_train_step(spec, machine).peak
    except DoesNotFitError as error:
        print(error, file=sys.stderr)
        return None
    print(f"{time.perf_counter() - start:.0f} s", end=" ", file=sys.stderr)
    return peak


def _compared(key: tuple[str, str, str], spec: Spec, machine: Machine, compiled: int | None) -> dict[str, Any]:
    platform = machine.device.platform
    target = machine.device.target
    quick = quick_plan(spec, target, machine.count)
    return {
        **dict(zip(("model", "device", "recipe"), key, strict=True)),
        "kind": kind_of(platform, machine.count),
        "held_out": is_held_out(key),
        "compiled": compiled,
        "quick": quick.peak,
        "settled": quick.settled,
        "features": features(spec, target, machine.count, quick.adapter),
    }


def peak_with(row: dict[str, Any], factors: dict[str, dict[str, float]]) -> int:
    """Return the quick peak that these factors give."""
    return row["settled"] + sum(worst_moment(row["features"], factors))


def fit(rows: list[dict[str, Any]], start: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return factors, none below 0, that make the worst relative error of a peak small.

    Factors of sizes that occur in no row are not changed.
    """
    present = {name for row in rows for name, size in row["features"].items() if size}
    names = [(moment, name) for moment, factors in start.items() for name in factors if name in present]

    def factors_of(values: np.ndarray) -> dict[str, dict[str, float]]:
        found = {moment: dict(factors) for moment, factors in start.items()}
        for (moment, name), value in zip(names, values, strict=True):
            found[moment][name] = float(value)
        return found

    def errors(values: np.ndarray) -> np.ndarray:
        factors = factors_of(values)
        return np.asarray([peak_with(row, factors) / row["compiled"] - 1 for row in rows])

    first = np.asarray([start[moment][name] for moment, name in names])
    draws = np.random.default_rng(0)
    starts = [first, *(first * draws.uniform(0.3, 2.0, first.shape) for _ in range(15))]
    fits = [
        least_squares(errors, np.maximum(x, 1e-3), bounds=(0, np.inf), diff_step=1e-3, loss="soft_l1", f_scale=0.05)
        for x in starts
    ]
    # Then minimise the sum of the sixth powers of the errors, which the worst cells dominate.
    worst = [
        least_squares(lambda values: (errors(values) / ERROR) ** 3, np.maximum(found.x, 1e-3), bounds=(0, np.inf))
        for found in fits
    ]
    return factors_of(np.round(min(worst, key=lambda found: found.cost).x, 3))


def _read(path: Path | None) -> dict[tuple[str, str, str], int | None]:
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(line["model"], line["device"], line["recipe"]): line["peak"] for line in lines}


def _add(path: Path | None, key: tuple[str, str, str], peak: int | None) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**dict(zip(("model", "device", "recipe"), key, strict=True)), "peak": peak}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
