"""Fine-tune one model in several ways on the same data, with several seeds, and say what the differences are worth.

    python scripts/compare.py --data gsm8k.jsonl --output runs/compare             the study below: 18 runs
    python scripts/compare.py --data gsm8k.jsonl --output runs/compare --quick     3 variants, 1 seed, a few steps
    python scripts/compare.py --data mine.jsonl --output runs/mine --variants lora/nf4+dq lora/nf4+dq/q_proj,v_proj full
    python scripts/compare.py --data mine.jsonl --output runs/mine --methods lora dora --ranks 4 16 --seeds 0 1 2 3 4

Without --variants or --methods the study is the claim of the QLoRA paper: full fine-tuning, LoRA on a dense base, and QLoRA
with NF4, with double quantisation, and with FP4, on all linear layers; and QLoRA on query and value projections alone.

Method. The data are split once by --held-out, and every run learns and is measured on the same rows; a seed draws the
initial adapter and the order of the data, the same order for every variant. Each run is scripts/train.py's job, in a process
of its own, with the flags of --train for all. Held-out loss and token accuracy are means over learned tokens; --answers N
also asks for greedy answers to N held-out prompts, and counts those that end as expected (what follows #### where the data
mark it). Peak memory is the device's, or on a CPU the most that was resident; tokens/s is the median but for the first step.

Figures are means over seeds with 95 % intervals (Student's t). A variant is compared with the baseline by its differences
seed by seed: "equal within the interval" where the interval of their mean holds 0.

Stopped at any moment, the same command goes on where it was; finished runs are read from OUTPUT/cells. It leaves report.md,
report.png, report.html (everything in one file) and report.json in OUTPUT; the last line is the result as JSON.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.cli import parse, to_dict
from qlora_jax.data import load_records
from qlora_jax.finetune import Options
from scripts.benchmarks.page import said_command
from scripts.benchmarks.workers import device
from scripts.studies.comparison import page
from scripts.studies.comparison.grid import Cell, Variant, parse_variant, product

ROOT = Path(__file__).parents[1]
STUDY = ("lora/none", "full", "lora/nf4", "lora/nf4+dq", "lora/fp4", "lora/nf4+dq/q_proj,v_proj")
QUICK = ("lora/none", "lora/nf4+dq", "lora/nf4+dq/q_proj,v_proj")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare ways to fine-tune."""

    data: tuple[str, ...]
    """Files or hub ids of training data, as train.py takes them."""
    output: Path
    """Folder of the comparison."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    variants: tuple[str, ...] = ()
    """Ways to compare, as method/storage/rank/targets, e.g. lora/nf4+dq/r16/q_proj,v_proj; or by axes:"""
    methods: tuple[str, ...] = ()
    """Axis: methods."""
    storages: tuple[str, ...] = ("nf4+dq",)
    """Axis with --methods: storage of the base; none, or a 4-bit type, with +dq for double quantisation."""
    ranks: tuple[int, ...] = (16,)
    """Axis with --methods: ranks."""
    targets: tuple[str, ...] = ("all-linear",)
    """Axis with --methods: target sets, each with commas in between."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs of each variant."""
    baseline: str | None = None
    """Variant that the others are compared with; the first if left out."""
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Learning rates of methods, in turn: a method and its rate; train.py's default for others."""
    train: str = ""
    """More flags of train.py for all runs, as one string."""
    held_out: int = 100
    """Rows held out."""
    max_train_samples: int | None = None
    """Learn from so many rows at most."""
    steps: int = 60
    """Steps of a run."""
    batch_size: int = 4
    """Rows of a step."""
    max_length: int = 256
    """Tokens of a row."""
    answers: int = 0
    """Held-out prompts that are answered; 0: none."""
    quick: bool = False
    """A small grid, one seed, 8 steps of 2 rows: whether everything works, in a few minutes."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        compare(arguments)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on here", file=sys.stderr)
        return 130
    return 0


def compare(arguments: Arguments) -> None:
    if arguments.quick:
        arguments = dataclasses.replace(arguments, seeds=arguments.seeds[:1], steps=8, batch_size=2, held_out=20, answers=0)
    variants = chosen_variants(arguments)
    names = [variant.name for variant in variants]
    baseline = names[0] if arguments.baseline is None else parse_variant(arguments.baseline).name
    if baseline not in names:
        raise ValueError(f"baseline: expected one of {', '.join(names)}, found {baseline}")
    cells = [Cell(variant, seed) for seed in arguments.seeds for variant in variants]  # a whole seed before the next
    common = common_flags(arguments)
    for cell in cells:
        parse(Options, description=None, arguments=cell.flags(common, arguments.rates)).check()
    split_data(arguments)
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    with tqdm(total=len(cells), desc="comparing", unit="run") as bar:
        for cell in cells:
            bar.set_postfix_str(cell.name)
            results[cell.variant.name][cell.seed] = run_cell(arguments, cell, common)
            report(arguments, {name: seeds for name, seeds in results.items() if seeds}, baseline)
            bar.update()
    print(json.dumps(json.loads((arguments.output / "report.json").read_text(encoding="utf-8"))))


def chosen_variants(arguments: Arguments) -> list[Variant]:
    """The variants that the arguments name.

    Raises:
        ValueError: none, one twice, or unknown ones.
    """
    if arguments.variants and arguments.methods:
        raise ValueError("variants, methods: expected one of them, found both")
    if arguments.methods:
        variants = product(arguments.methods, arguments.storages, arguments.ranks, arguments.targets)
    else:
        rank = arguments.ranks[0]
        variants = [parse_variant(name, rank=rank) for name in arguments.variants or (QUICK if arguments.quick else STUDY)]
    if twice := [variant.name for variant in variants if variants.count(variant) > 1]:
        raise ValueError(f"variants: expected each once, found {twice[0]} twice")
    unused = [method for method in arguments.rates if method not in {v.method for v in variants}]
    if unused:
        raise ValueError(f"rates: no variant has the method {unused[0]!r}")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise ValueError(f"seeds: expected each once, found {list(arguments.seeds)}")
    return variants


def common_flags(arguments: Arguments) -> list[str]:
    """The flags of train.py that all runs have."""
    model = arguments.model or str(fetch_default_model())
    folder = arguments.output / "data"
    return [
        *("--model", model, "--data", str(folder / "train.jsonl"), "--eval-data", str(folder / "held_out.jsonl")),
        *("--max-steps", str(arguments.steps), "--epochs", "1000", "--batch-size", str(arguments.batch_size)),
        *("--max-length", str(arguments.max_length), "--eval-every", "0", "--save-every", "0", "--samples", "0"),
        *shlex.split(arguments.train),
    ]


def split_data(arguments: Arguments) -> None:
    """Writes the rows that are learned and those that are held out, once.

    Raises:
        ValueError: too few rows; or the folder holds another comparison.
    """
    folder = arguments.output / "data"
    asked = to_dict(arguments) | {"output": None, "baseline": None, "seeds": None, "variants": None, "methods": None}
    asked |= {"storages": None, "ranks": None, "targets": None, "answers": None}  # of these there may be more later
    record = arguments.output / "comparison.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))]
        if changed:
            found = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
            raise ValueError(f"{arguments.output}: holds a comparison with {found}; choose another --output")
        return
    rows = [dict(row) for source in arguments.data for row in load_records(source)]
    if len(rows) < arguments.held_out + arguments.batch_size:
        raise ValueError(f"data: expected more than the {arguments.held_out} rows held out, found {len(rows)}")
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, learned = order[: arguments.held_out], order[arguments.held_out :][: arguments.max_train_samples]
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("held_out", held_out), ("train", learned)):
        lines = [json.dumps({k: v for k, v in rows[number].items() if v is not None}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record.write_text(json.dumps(asked) + "\n", encoding="utf-8")


def run_cell(arguments: Arguments, cell: Cell, common: Sequence[str]) -> dict[str, Any]:
    """The result of a run: read where it is finished, else made.

    Raises:
        ValueError: it failed.
    """
    folder = arguments.output / "cells" / cell.name
    result_file = folder / "result.json"
    if result_file.exists():
        found = json.loads(result_file.read_text(encoding="utf-8"))
        if not arguments.answers or "eval_exact_match" in found["figures"]:
            return found
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*cell.flags(common, arguments.rates), "--output", str(folder / "run")]
    (folder / "command.txt").write_text(shlex.join(["python", "scripts/train.py", *flags]) + "\n", encoding="utf-8")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH"))))
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "comparison.cell", str(arguments.answers), *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    if done.returncode:
        last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise ValueError(f"{cell.name} failed, see {folder / 'log.txt'}: {' '.join(last)}")
    found = json.loads(done.stdout.splitlines()[-1])
    result_file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def report(arguments: Arguments, results: dict[str, dict[int, dict[str, Any]]], baseline: str) -> None:
    """Writes the report of what is there so far."""
    versions, machine = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}, device()
    method = {
        "model": arguments.model or "SmolLM2-135M-Instruct",
        "data": list(arguments.data),
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "max_length": arguments.max_length,
        "held_out": arguments.held_out,
        "train": arguments.train,
        "rates": arguments.rates,
        "seeds": list(arguments.seeds),
        "baseline": baseline,
        "versions": versions,
        "machine": machine,
    }
    data = json.dumps({"method": method, "results": results}, indent=2)
    (arguments.output / "report.json").write_text(data + "\n", encoding="utf-8")
    intro = (
        f"{method['model']} on {', '.join(Path(source).name for source in arguments.data)}: {arguments.steps} steps of "
        f"{arguments.batch_size} rows of up to {arguments.max_length} tokens, {arguments.held_out} rows held out; means "
        f"over seeds with 95 % intervals. Learning rates: "
        f"{arguments.rates or 'the defaults of train.py by method'}. "
        f"{', '.join(f'{name} {value}' for name, value in versions.items())}; {machine['cpu']}, {machine['cores']} cores. "
        f"Made by: {said_command('compare.py')}"
    )
    page.write(results, baseline, arguments.output, "Ways to fine-tune, side by side", intro, data)


if __name__ == "__main__":
    sys.exit(main())
