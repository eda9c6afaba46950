"""Compile the training step of each family's usual model for devices that need not be attached: does it fit, and if not why.

    python -m scripts.benchmarks.usual_models --record usual.jsonl --page docs/usual-models.md
    python -m scripts.benchmarks.usual_models --devices rtx4090 --families gemma

One row of 1024 tokens, not packed (`--packing` for packed rows), NF4 with double quantisation, LoRA of rank 16 on all linear
layers, bfloat16, AdamW. A cell compiles, with the peak of memory and the least time of a step, or it is refused for memory
alone; the exit code is 1 if one is refused for another reason. A second table has the error of the quick plan of each cell,
which no compiler is needed for. A cell takes 10 to 60 CPU seconds on a GPU's compiler, and up
to 150 on a TPU's.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax import cli
from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import FAMILIES, ModelSpec
from qlora_jax.peft import LoRA
from qlora_jax.plan import Machine, compile_train_step, machine_named, quick_plan, report_of
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import BatchSpec, StepSpec, build_step, language_model_objective, seq2seq_objective
from scripts.benchmarks.model_sizes import USUAL, check_names, config_of
from scripts.benchmarks.page import Section, command_line, text, write

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The cells to compile."""

    devices: tuple[str, ...] = ("h100", "a100-40", "rtx4090", "v5e", "v5p", "v6e")
    """Devices, in the notation of scripts/plan.py."""
    families: tuple[str, ...] = tuple(USUAL)
    """Families, by their model_type."""
    packing: bool = False
    """Compile for packed rows."""
    compile: bool = True
    """Whether to compile cells that the record does not have; otherwise the table has a dash for them."""
    record: Path | None = None
    """File of JSON lines with the results, which is read and extended: cells that it has are not compiled again."""
    page: Path | None = None
    """Markdown page to write."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Compile the cells, print and write the table, and return 1 if one is refused for another reason than memory."""
    check_names("families", arguments.families, FAMILIES)
    machines = [machine_named(name) for name in arguments.devices]
    recorded = _read(arguments.record)
    for family in arguments.families:
        for machine in machines:
            if arguments.compile and (family, machine.name, arguments.packing) not in recorded:
                cell = _compile(family, machine, arguments.packing)
                print(json.dumps(cell), file=sys.stderr, flush=True)
                if arguments.record is not None:
                    with arguments.record.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
                recorded[family, machine.name, arguments.packing] = cell
    sections = [_section(arguments, recorded), _quick_section(arguments, recorded)]
    print("\n".join(map(text, sections)))
    if arguments.page is not None:
        write(arguments.page, sections, command_line("benchmarks/usual_models.py"), "Each family on each device")
    keys = [(family, name, arguments.packing) for family in arguments.families for name in arguments.devices]
    found = [recorded[key] for key in keys if key in recorded]
    bad = [cell for cell in found if cell["problem"] is not None]
    print(json.dumps({"cells": len(found), "bad": len(bad), "seconds": round(sum(cell["seconds"] for cell in found))}))
    return 1 if bad else 0


def _spec(family: str, packing: bool) -> StepSpec[ModelSpec]:
    objective = seq2seq_objective() if family == "t5" else language_model_objective(packed=packing)
    return StepSpec(ModelSpec(config_of(family), method=LoRA(16)), objective, BatchSpec(length=1024))


def _compile(family: str, machine: Machine, packing: bool) -> dict[str, Any]:
    """Return what the compiler says of a cell, as plain values."""
    spec = _spec(family, packing)
    start = time.process_time()
    cell: dict[str, Any] = {"family": family, "device": machine.name, "packed": packing}
    cell |= {"peak": None, "needed": None, "floor": None, "problem": None, "versions": {}}
    try:
        plan = compile_train_step(spec, machine)
        floors = report_of(plan, spec, machine, family).floors
        cell |= {"peak": plan.peak, "floor": max(floors.values()), "versions": plan.versions}
    except DoesNotFitError as error:
        cell |= {"needed": error.needed or machine.device.memory_bytes}
    except Exception as error:  # the reason is what the table is for
        cell |= {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return cell | {"seconds": round(time.process_time() - start, 1)}


def _section(arguments: Arguments, cells: dict[tuple[str, str, bool], dict[str, Any]]) -> Section:
    """Return the table: a row for each family, a column for each device."""

    def shown(cell: dict[str, Any] | None, memory: int) -> str:
        if cell is None:
            return "–"
        if cell["problem"] is not None:
            return f"FAILS: {cell['problem']}"
        if cell["peak"] is None or cell["peak"] > memory:
            return f"does not fit ({(cell['peak'] or cell['needed']) / GIB:.1f})"
        return f"{cell['peak'] / GIB:.2f}"

    memories = {name: machine_named(name).device.memory_bytes for name in arguments.devices}
    rows = [
        (
            USUAL[family][0],
            *(shown(cells.get((family, name, arguments.packing)), memories[name]) for name in arguments.devices),
        )
        for family in arguments.families
    ]
    dashes = any("–" in row for row in rows)
    versions = {name: value for cell in cells.values() for name, value in cell["versions"].items()}
    return Section(
        "Training one row of 1024 tokens",
        (
            "Peak of device memory in GiB of the compiled step: NF4 with double quantisation, LoRA of rank 16 on all linear "
            f"layers, bfloat16, AdamW, {'packed rows' if arguments.packing else 'rows of one example'}.",
            f"Compiled with {', '.join(f'{name} {value}' for name, value in sorted(versions.items()))}."
            + (" A dash: not compiled." if dashes else ""),
        ),
        ("model", *(f"{name} ({memories[name] / GIB:.0f})" for name in arguments.devices)),
        tuple(rows),
    )


def _quick_section(arguments: Arguments, cells: dict[tuple[str, str, bool], dict[str, Any]]) -> Section:
    """Return the table of the errors of the quick plan, with the largest of each device."""
    errors: dict[str, dict[str, float]] = {name: {} for name in arguments.devices}
    for family in arguments.families:
        spec, steps = _spec(family, arguments.packing), {}
        for name in arguments.devices:
            cell, device = cells.get((family, name, arguments.packing)), machine_named(name).device
            if cell is not None and cell["peak"] is not None:
                if device.platform not in steps:
                    steps[device.platform] = build_step(spec, platform=device.target)
                quick = quick_plan(spec, device.target, step=steps[device.platform]).peak
                errors[name][family] = 100 * (quick / cell["peak"] - 1)
    rows = [
        (USUAL[family][0], *(f"{own[family]:+.1f} %" if family in own else "–" for own in errors.values()))
        for family in arguments.families
    ]
    largest = (f"{max(map(abs, own.values())):.1f} %" if own else "–" for own in errors.values())
    return Section(
        "The quick plan of the same steps",
        ("Error of the peak of `plan.py --quick` against the compiled one.",),
        ("model", *arguments.devices),
        (*rows, ("largest", *largest)),
    )


def _read(record: Path | None) -> dict[tuple[str, str, bool], dict[str, Any]]:
    if record is None or not record.exists():
        return {}
    cells = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return {(cell["family"], cell["device"], cell["packed"]): cell for cell in cells}


if __name__ == "__main__":
    sys.exit(main())
