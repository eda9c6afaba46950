"""Fine-tune one model in several ways on the same data, with several seeds, and test the differences.

    python scripts/studies/compare.py --data gsm8k.jsonl --output runs/compare             the study below: 18 runs
    python scripts/studies/compare.py --data gsm8k.jsonl --output runs/compare --quick     3 variants, 1 seed, a few steps
    python scripts/studies/compare.py --data mine.jsonl --output runs/mine --variants lora/nf4+dq lora/nf4+dq/q_proj full
    python scripts/studies/compare.py --data mine.jsonl --output runs/mine --methods lora dora --ranks 4 16 --seeds 0 1 2 3 4

Without --variants or --methods, the study tests the claim of the QLoRA paper: it compares full fine-tuning, LoRA on a dense
base, and QLoRA with NF4, with double quantisation and with FP4, on all linear layers; and QLoRA on query and value
projections.

Method. The data are split once by --held-out, so that every run trains and is evaluated on the same rows. A seed determines
the initial adapter and the order of the data, which is the same for every variant. Each run is the job of scripts/train.py
in a separate process, with the flags of --train for all. Held-out loss and token accuracy are means over learned tokens.
--answers N also generates greedy answers to N held-out prompts, and counts those whose end is the expected one (the text
after ####, if the data have it). Peak memory is that of the device, or on a CPU the largest resident memory; tokens/s is the
median over all steps except the first.

The results are means over seeds with 95 % intervals (Student's t). A variant is compared with the baseline by the
differences for each seed: the verdict is "equal within the interval" if the interval of their mean contains 0. The report
also states the smallest difference that the seeds would have shown in four cases of five, and calls two variants equal only
if the whole interval is within --margin.

An interrupted comparison is continued by the same command; finished runs are read from OUTPUT/cells. The program writes
report.md, report.png, report.html (everything in one file) and report.json to OUTPUT; the last line is the result as JSON.
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
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.cli import parse, to_dict
from qlora_jax.data import load_records
from qlora_jax.errors import OptionError
from qlora_jax.finetune import Options
from scripts.benchmarks.page import command_line
from scripts.benchmarks.workers import ROOT, device
from scripts.studies.comparison import page
from scripts.studies.comparison.grid import Cell, Variant, parse_variant, product

STUDY = ("lora/none", "full", "lora/nf4", "lora/nf4+dq", "lora/fp4", "lora/nf4+dq/q_proj,v_proj")
QUICK = ("lora/none", "lora/nf4+dq", "lora/nf4+dq/q_proj,v_proj")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the comparison."""

    data: tuple[str, ...]
    """Files or hub ids of training data, as for train.py."""
    output: Path
    """Folder of the comparison, which is continued if it exists."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    variants: tuple[str, ...] = ()
    """Variants to compare, as method/storage/rank/targets, e.g. lora/nf4+dq/r16/q_proj,v_proj. The options --methods,
    --storages, --ranks and --targets are an alternative: all combinations of their values."""
    methods: tuple[str, ...] = ()
    """Methods to combine."""
    storages: tuple[str, ...] = ("nf4+dq",)
    """Storages of the base to combine: none, or a 4-bit type, with +dq for double quantisation."""
    ranks: tuple[int, ...] = (16,)
    """Ranks to combine."""
    targets: tuple[str, ...] = ("all-linear",)
    """Sets of target modules to combine, each separated by commas."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each variant has one run for each of them."""
    baseline: str | None = None
    """Variant with which the others are compared; the first if left out."""
    rates: dict[str, float] = dataclasses.field(default_factory=dict)
    """Learning rates, as pairs of a method and its rate; the default of train.py for other methods."""
    train: str = ""
    """Further flags of train.py for all runs, as one string."""
    held_out: int = 100
    """Number of held-out rows."""
    max_train_samples: int | None = None
    """Maximum number of training rows."""
    steps: int = 60
    """Training steps of a run."""
    batch_size: int = 4
    """Rows in the batch of a step."""
    max_length: int = 256
    """Maximum number of tokens in a row."""
    answers: int = 0
    """Number of held-out prompts to answer; 0 for none."""
    margin: float = 0.01
    """Share of the baseline's figure below which a difference counts as none."""
    quick: bool = False
    """Run a small grid with one seed and 8 steps of 2 rows, to check in a few minutes that everything works."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Run the comparison; an interruption says how to continue it."""
    try:
        compare(arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues the comparison") from None


def compare(arguments: Arguments) -> None:
    """Run all cells that are not finished and write the report after each of them."""
    if arguments.quick:
        arguments = dataclasses.replace(arguments, seeds=arguments.seeds[:1], steps=8, batch_size=2, held_out=20, answers=0)
    variants = chosen_variants(arguments)
    names = [variant.name for variant in variants]
    baseline = names[0] if arguments.baseline is None else parse_variant(arguments.baseline).name
    if baseline not in names:
        raise OptionError(f"baseline: expected one of {', '.join(names)}, found {baseline}")
    cells = [Cell(variant, seed) for seed in arguments.seeds for variant in variants]  # seed by seed
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
    """Return the variants that the options describe.

    Raises:
        OptionError: a variant is given twice or unknown, or options contradict each other.
    """
    if arguments.variants and arguments.methods:
        raise OptionError("variants, methods: expected one of them, found both")
    if arguments.methods:
        variants = product(arguments.methods, arguments.storages, arguments.ranks, arguments.targets)
    else:
        rank = arguments.ranks[0]
        variants = [parse_variant(name, rank=rank) for name in arguments.variants or (QUICK if arguments.quick else STUDY)]
    if twice := [variant.name for variant in variants if variants.count(variant) > 1]:
        raise OptionError(f"variants: expected each once, found {twice[0]} twice")
    unused = [method for method in arguments.rates if method not in {v.method for v in variants}]
    if unused:
        raise OptionError(f"rates: no variant has the method {unused[0]!r}")
    if not 0 < arguments.margin < 1:
        raise OptionError(f"margin: expected a share above 0 and below 1, found {arguments.margin}")
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise OptionError(f"seeds: expected each once, found {list(arguments.seeds)}")
    return variants


def common_flags(arguments: Arguments) -> list[str]:
    """Return the flags of train.py that all runs have."""
    model = arguments.model or str(fetch_default_model())
    folder = arguments.output / "data"
    return [
        *("--model", model, "--data", str(folder / "train.jsonl"), "--eval-data", str(folder / "held_out.jsonl")),
        *("--max-steps", str(arguments.steps), "--epochs", "1000", "--batch-size", str(arguments.batch_size)),
        *("--max-length", str(arguments.max_length), "--eval-every", "0", "--save-every", "0", "--samples", "0"),
        *shlex.split(arguments.train),
    ]


def split_data(arguments: Arguments) -> None:
    """Write the training rows and the held-out rows, unless they exist.

    Raises:
        OptionError: there are too few rows, or the folder has another comparison.
    """
    folder = arguments.output / "data"
    asked = to_dict(arguments) | {"output": None, "baseline": None, "seeds": None, "variants": None, "methods": None}
    # These may be extended later, and the margin concerns the report alone.
    asked |= {"storages": None, "ranks": None, "targets": None, "answers": None, "margin": None}
    record = arguments.output / "comparison.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        changed = [name for name in asked if before.get(name) != json.loads(json.dumps(asked[name]))]
        if changed:
            found = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
            raise OptionError(f"{arguments.output}: holds a comparison with {found}; choose another --output")
        return
    rows = [dict(row) for source in arguments.data for row in load_records(source)]
    if len(rows) < arguments.held_out + arguments.batch_size:
        raise OptionError(f"data: expected more than the {arguments.held_out} rows held out, found {len(rows)}")
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, learned = order[: arguments.held_out], order[arguments.held_out :][: arguments.max_train_samples]
    folder.mkdir(parents=True, exist_ok=True)
    for name, numbers in (("held_out", held_out), ("train", learned)):
        lines = [json.dumps({k: v for k, v in rows[number].items() if v is not None}) for number in numbers]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record.write_text(json.dumps(asked) + "\n", encoding="utf-8")


def run_cell(arguments: Arguments, cell: Cell, common: Sequence[str]) -> dict[str, Any]:
    """Return the result of a run, which is read from its folder if it is finished.

    Raises:
        OptionError: the run failed.
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
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-m", "scripts.studies.comparison.cell", str(arguments.answers), *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    if done.returncode:
        last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise OptionError(f"{cell.name} failed, see {folder / 'log.txt'}: {' '.join(last)}")
    found = json.loads(done.stdout.splitlines()[-1])
    result_file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def report(arguments: Arguments, results: dict[str, dict[int, dict[str, Any]]], baseline: str) -> None:
    """Write the report of the finished runs."""
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
        "margin": arguments.margin,
        "versions": versions,
        "machine": machine,
    }
    data = json.dumps({"method": method, "results": results}, indent=2)
    (arguments.output / "report.json").write_text(data + "\n", encoding="utf-8")
    intro = (
        f"{method['model']} was trained on {', '.join(Path(source).name for source in arguments.data)} for "
        f"{arguments.steps} steps of {arguments.batch_size} rows of up to {arguments.max_length} tokens, with "
        f"{arguments.held_out} rows held out. Figures are means over seeds with 95 % intervals. Learning rates: "
        f"{arguments.rates or 'the default of train.py for each method'}. "
        f"{', '.join(f'{name} {value}' for name, value in versions.items())}; {machine['cpu']}, {machine['cores']} cores. "
        f"Made by `{command_line('studies/compare.py')}`."
    )
    title = "Methods of fine-tuning compared"
    page.write(results, baseline, arguments.output, title, intro, data, margin=arguments.margin)


if __name__ == "__main__":
    sys.exit(main())
