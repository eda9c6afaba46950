"""Compile steps for devices that need not be attached: memory, operations and bytes of qlora_jax and of Qwix.

    peak       arguments + temporaries + outputs - outputs in donated arguments, by XLA's buffer assignment
    TFLOP      of matrix products, counted in the traced program, including those that the backward pass recomputes
    GB         least number of bytes of device memory that one run reads and writes, counted in the compiled program

The workers are peers/*_compile.py. Both programs are counted by the same functions, for the same model, batch, rank and
dtype (bfloat16), with layers recomputed in the backward pass. GEMMs are not autotuned.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from scripts.benchmarks.page import Section, skipped_sentences, versions_sentence
from scripts.benchmarks.workers import OURS, Found, Run, command

Step = Literal["train", "decode"]
GIB = 2**30


def runs_of(
    models: Sequence[str],
    devices: Sequence[str],
    steps: Sequence[Step],
    pythons: dict[str, Path],
    *,
    batch_size: int,
    length: int,
    rank: int,
) -> list[Run]:
    """Return a run for each step of each model on each device.

    The decode step has one row and a cache of `length` tokens. Of Qwix, only the training step is compiled.
    """
    runs = []
    for device in devices:
        for model in models:
            for step in steps:
                rows = batch_size if step == "train" else 1
                work: dict[str, Any] = {"model": model, "device": device, "step": step, "batch_size": rows}
                work |= {"length": length, "rank": rank}
                variant = f"{step} {model} {device}"
                runs.append(Run(OURS, variant, command(pythons[OURS], "qlora_jax_compile.py", **work)))
                if step == "train" and "qwix" in pythons:
                    line = command(pythons["qwix"], "qwix_compile.py", **work, remat="decoder")
                    runs.append(Run("qwix", variant, line))
    return runs


def progress_text(result: dict[str, Any]) -> str:
    """Return a short text about one run, for the progress messages."""
    if result["peak"] is None:
        return "does not fit"
    return f"{result['peak'] / GIB:.2f} GiB, compiled in {result['compile_seconds']:.0f} s"


def section(found: Found, method: dict[str, Any]) -> Section:
    """Return the table, in which rows of the same work are neighbours."""
    rows = []
    for name in sorted(found.runs, key=lambda name: (*name.split()[:0:-1], name)):
        side, step, model, device = name.split()
        result = found.runs[name][0]
        work = f"{method['batch_size']} x {method['length']}" if step == "train" else f"1 of {method['length']}"
        head = (f"{device} {model}", step, work, side)
        if result["peak"] is None:
            needed = f"does not fit ({result['needed'] / GIB:.2f})" if result["needed"] else "does not fit"
            rows.append((*head, needed, "", "", "", "", ""))
            continue
        sizes = (result[part] / GIB for part in ("peak", "weights", "temporaries"))
        counts = (f"{result['flops'] / 1e12:.3f}", f"{result['traffic'] / 1e9:.1f}", f"{result['compile_seconds']:.0f}")
        rows.append((*head, *(f"{size:.2f}" for size in sizes), *counts))
    return Section(
        "Steps compiled for devices that are not attached",
        (
            f"NF4 (ours with double quantisation, Qwix without), LoRA of rank {method['rank']} on all linear layers, "
            "bfloat16, float32 adapter and AdamW, layers recomputed in the backward pass. All figures are for each "
            "device.",
            versions_sentence(found),
        ),
        ("device and model", "step", "tokens", "side", "peak GiB", "frozen", "temporaries", "TFLOP", "GB", "compiled in s"),
        tuple(rows),
        skipped_sentences(found.skipped),
    )
