"""Compare the compiled plan on this CPU with measured resident memory, in a process for each training step.

The worker is peers/qlora_jax_memory.py. A training step is written as dtype-remat-BxT, such as float32-full-4x256.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError
from scripts.benchmarks.page import Section, versions_sentence
from scripts.benchmarks.workers import MEBIBYTE, OURS, Found, Run, command

DTYPES, REMATS = ("float32", "bfloat16"), ("full", "dots", "none")
RECIPES = tuple(f"{dtype}-{remat}-{batch}" for batch in ("4x256", "1x512") for dtype in DTYPES for remat in REMATS)
LIMIT = 0.15  # largest relative error of the plan that is promised


def parsed(recipe: str) -> dict[str, Any]:
    """Return the flags that a text such as float32-full-4x256 stands for.

    Raises:
        OptionError: the text has another form.
    """
    match = re.fullmatch(rf"({'|'.join(DTYPES)})-({'|'.join(REMATS)})-([1-9]\d*)x([1-9]\d*)", recipe)
    if match is None:
        raise OptionError(f"memory-recipes: expected dtype-remat-BxT such as {RECIPES[0]}, found {recipe}")
    return {"dtype": match[1], "remat": match[2], "batch_size": int(match[3]), "length": int(match[4])}


def runs_of(folder: Path, recipes: Sequence[str], python: Path, rank: int) -> list[Run]:
    """Return a run for each training step."""
    return [
        Run(OURS, recipe, command(python, "qlora_jax_memory.py", model=folder, rank=rank, steps=3, **parsed(recipe)))
        for recipe in recipes
    ]


def progress_text(result: dict[str, Any]) -> str:
    """Return a short text about one run, for the progress messages."""
    return f"planned {result['planned'] / MEBIBYTE:,.0f} MiB, measured {result['measured'] / MEBIBYTE:,.0f} MiB"


def section(found: Found, method: dict[str, Any]) -> Section:
    """Return the section with the table of results."""
    rows = []
    errors = []
    for name, (result, *_) in found.runs.items():
        errors.append(result["error"])
        sizes = (result[part] / MEBIBYTE for part in ("planned", "arguments", "temporaries", "measured"))
        rows.append((name.removeprefix(f"{OURS} "), *(f"{size:,.0f}" for size in sizes), f"{result['error']:+.1%}"))
    worst = max(map(abs, errors), default=0.0)
    verdict = "within" if worst <= LIMIT else "NOT within"
    return Section(
        "Planned and measured memory on a CPU",
        (
            f"{method['model']}, NF4 with double quantisation, LoRA of rank {method['rank']} on all linear layers, "
            "AdamW. Planned memory is XLA's buffer assignment of the training step, compiled for this CPU from shapes "
            "alone (arguments + temporaries + outputs - outputs in donated arguments). Measured memory is the peak "
            "resident memory of 3 steps, minus the resident memory of a process that compiled, loaded and trained once "
            "and then freed everything.",
            versions_sentence(found),
        ),
        ("dtype-remat-batch", "planned MiB", "arguments", "temporaries", "measured MiB", "planned / measured - 1"),
        tuple(rows),
        (f"The largest error is {worst:.1%}: {verdict} the limit of {LIMIT:.0%}.",),
    )
