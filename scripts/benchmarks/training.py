"""Measure training: the time and the memory of each variant of each program.

tokens/s   tokens of a batch / median of the steps of all rounds: wall time, what a user waits
CPU s      median of the CPU time of a step, over all threads of the process
busy       CPU time / (wall time x cores) of those steps
peak       largest peak resident memory of a process, including libraries, loading and compiler
device     largest peak of the accelerator's memory, if there is one
load       median time to read and quantise the checkpoint; qlora_jax compiles the step at the same time
first      median time of the first step; for JAX it includes the rest of the compilation
start      median time from the start of the program to the end of the first step: imports, load and first
loss       of the first step, where the adapters are still zero. It is equal where both sides compute the same. Tunix' Llama
               differs, because its rotary positions use another theta.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.page import Section, machine_sentence, skipped_sentences, versions_sentence
from scripts.benchmarks.workers import MEBIBYTE, OURS, Found, Platform, Run, command, cores, disturbed, peaks


def runs_of(
    folder: Path,
    variants: dict[str, Sequence[str]],
    pythons: dict[str, Path],
    *,
    batch_size: int,
    length: int,
    rank: int,
    steps: int,
    warmup: int,
) -> list[Run]:
    """Return the runs of one round: the variants of each program, such as float32-dots or bfloat16-checkpointing."""
    work = {"batch_size": batch_size, "length": length, "rank": rank, "steps": steps, "warmup": warmup}
    runs = []
    for side, names in variants.items():
        for variant in names:
            dtype, _, kind = variant.partition("-")
            common: dict[str, Any] = {"model": folder, **work, "dtype": dtype}
            if side == OURS:
                words = command(pythons[side], "qlora_jax_train.py", **common, remat=kind)
            elif side == "qwix":
                words = command(pythons[side], "qwix_train.py", **common, remat=kind or "none")
            else:
                library = "unsloth" if side == "unsloth" else "peft"
                how = {"gradient_checkpointing": kind == "checkpointing", "prepared": kind == "prepared"}
                words = command(pythons[side], "hf_train.py", **common, library=library, **how)
            runs.append(Run(side, variant, words))
    return runs


def progress_text(result: dict[str, Any]) -> str:
    """Return a short text about one run, for the progress messages."""
    return (
        f"{statistics.median(result['step_seconds']):.2f} s a step, {statistics.median(result['step_cpu_seconds']):.2f} s "
        f"of CPU, {result['start_seconds']:.0f} s to start"
    )


def summary(runs: Sequence[dict[str, Any]], tokens: int, platform: Platform) -> dict[str, Any]:
    """Return the metrics of one variant over its rounds."""
    steps: list[float] = [second for found in runs for second in found["step_seconds"]]
    cpu_steps: list[float] = [second for found in runs for second in found["step_cpu_seconds"]]
    median, cpu_median = statistics.median(steps), statistics.median(cpu_steps)
    busy = cpu_median / (median * cores())
    return {
        "tokens_per_second": tokens / median,
        "step_seconds": median,
        "step_seconds_range": [min(steps), max(steps)],
        "step_cpu_seconds": cpu_median,
        "busy": busy,
        "disturbed": disturbed(steps, busy, platform),
        **peaks(runs),
        **{
            name: statistics.median([found[name] for found in runs])
            for name in ("load_seconds", "first_step_seconds", "start_seconds")
        },
        "first_loss": runs[0]["losses"][0],
        "last_loss": runs[0]["losses"][-1],
        "trainable_parameters": runs[0]["trainable_parameters"],
    }


def section(found: Found, results: dict[str, dict[str, Any]], method: dict[str, Any], device: dict[str, Any]) -> Section:
    """Return the section with the table of results."""
    on_device = any(row["peak_device_bytes"] for row in results.values())
    columns = ("", "tokens/s", "s a step", "min", "max", "CPU s", "busy", "peak MiB", *(["device MiB"] * on_device))
    rows = []
    for name, row in results.items():
        low, high = row["step_seconds_range"]
        device_peak = (f"{(row['peak_device_bytes'] or 0) / MEBIBYTE:,.0f}",) if on_device else ()
        rows.append(
            (
                name,
                f"{row['tokens_per_second']:.1f}",
                f"{row['step_seconds']:.2f}",
                f"{low:.2f}",
                f"{high:.2f}",
                f"{row['step_cpu_seconds']:.2f}",
                f"{row['busy']:.0%}{'*' if row['disturbed'] else ''}",
                f"{row['peak_resident_bytes'] / MEBIBYTE:,.0f}",
                *device_peak,
                f"{row['load_seconds']:.1f}",
                f"{row['first_step_seconds']:.1f}",
                f"{row['start_seconds']:.1f}",
                f"{row['first_loss']:.4f}",
            )
        )
    return Section(
        "Training",
        (
            f"{method['model']}, NF4 (with double quantisation, which Qwix does not have), LoRA of rank {method['rank']} "
            f"on all linear layers, AdamW; batches of {method['batch_size']} x {method['length']} random tokens. Figures "
            f"are medians of {method['rounds']} rounds x {method['steps']} steps after {method['warmup']} steps of "
            "warm-up. Each run is a process of its own, and the variants take turns.",
            machine_sentence(found, device),
            versions_sentence(found),
        ),
        (*columns, "load s", "first s", "start s", "loss"),
        tuple(rows),
        (*compared(results), *disturbed_sentences(results), *skipped_sentences(found.skipped)),
    )


def compared(results: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return sentences that compare qlora_jax with the peers, for the same compute dtype."""
    sentences = []
    for name, row in results.items():
        for peer, other in results.items():
            same = name.split()[1].split("-")[0] == peer.split()[1].split("-")[0]
            if name.startswith(OURS) and not peer.startswith(OURS) and same:
                sentences.append(
                    f"{name} against {peer}: {row['tokens_per_second'] / other['tokens_per_second']:.2f} times the tokens/s "
                    f"({other['step_cpu_seconds'] / row['step_cpu_seconds']:.2f} by CPU time), "
                    f"{row['peak_resident_bytes'] / other['peak_resident_bytes']:.2f} of the memory, "
                    f"{row['start_seconds'] / other['start_seconds']:.2f} of the time to start."
                )
    return tuple(sentences)


def disturbed_sentences(results: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return a warning if other processes used the machine."""
    names = [name for name, row in results.items() if row["disturbed"]]
    return (f"(*) The machine was busy with something else: do not cite {', '.join(names)}.",) if names else ()
