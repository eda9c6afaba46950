"""Measure decoding: every variant continues the same prompt greedily by the same number of tokens.

    tokens/s   rows of the batch / time of a token after the first: median over the answers of all rounds
    prefill    median time until the first token is known, when everything is compiled
    peak       largest peak resident memory of a process
    start      median time from the start of the program to its first token: imports, loading, quantising, compiling
    same       number of tokens at the start of the answer that equal those of transformers with the same storage and dtype

Greedy tokens agree if both programs compute the same, except where rounding decides between two tokens of almost equal
probability. bitsandbytes uses the kernels of its wheel; it cannot download others from the hub. On a CPU with AVX512-BF16,
bitsandbytes 0.50 multiplies a row by a 4-bit matrix in bfloat16 whatever the compute dtype is, so that its tokens in float32
may differ from those of qlora_jax.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.benchmarks.page import Section, machine_sentence, skipped_sentences, versions_sentence
from scripts.benchmarks.training import disturbed_sentences
from scripts.benchmarks.workers import MEBIBYTE, OURS, Found, Platform, Run, command, cores, disturbed, peaks

TEXT = """The harbour was quiet in the early morning. Two boats had come in during the night, and their crews were asleep
below deck. On the quay a woman in a green coat counted crates of oranges, wrote the number into a small book, and counted
them again. There should have been sixty, as there were every week, but each time she arrived at fifty-eight. She looked
towards the warehouse, whose door stood open by the width of a hand, and then at the wet stones in front of it. """


def prompt_of(tokenizer: Any, length: int) -> list[int]:
    """Return `length` tokens of a text, which is repeated if it is too short."""
    tokens = list(tokenizer(TEXT.replace("\n", " "), add_special_tokens=False)["input_ids"])
    return (tokens * -(-length // len(tokens)))[:length]


def runs_of(
    folder: Path,
    variants: dict[str, Sequence[str]],
    pythons: dict[str, Path],
    *,
    batch_size: int,
    prompt: list[int],
    new_tokens: int,
    answers: int,
) -> list[Run]:
    """Return the runs of one round: the variants of each program, such as nf4-float32."""
    scripts = {OURS: "qlora_jax_decode.py", "hf": "hf_decode.py"}
    words = "[" + ",".join(map(str, prompt)) + "]"
    runs = []
    for side, names in variants.items():
        for variant in names:
            storage, dtype = variant.split("-")
            flags = {"batch_size": batch_size, "new_tokens": new_tokens, "answers": answers, "prompt": words}
            line = command(pythons[side], scripts[side], model=folder, storage=storage, dtype=dtype, **flags)
            runs.append(Run(side, variant, line))
    return runs


def progress_text(result: dict[str, Any]) -> str:
    """Return a short text about one run, for the progress messages."""
    return (
        f"{statistics.median(result['token_seconds']) * 1e3:.1f} ms a token, "
        f"{statistics.median(result['token_cpu_seconds']) * 1e3:.1f} ms of CPU, {result['start_seconds']:.0f} s to start"
    )


def summary(runs: Sequence[dict[str, Any]], rows: int, platform: Platform) -> dict[str, Any]:
    """Return the metrics of one variant over its rounds."""
    seconds: list[float] = [second for found in runs for second in found["token_seconds"]]
    cpu: float = statistics.median(second for found in runs for second in found["token_cpu_seconds"])
    median = statistics.median(seconds)
    return {
        "tokens_per_second": rows / median,
        "token_seconds": median,
        "token_seconds_range": [min(seconds), max(seconds)],
        "token_cpu_seconds": cpu,
        "busy": cpu / (median * cores()),
        # One token need not use all cores: only the spread of the answers shows other processes.
        "disturbed": disturbed(seconds, 1.0, platform),
        "prefill_seconds": statistics.median(second for found in runs for second in found["prefill_seconds"]),
        **peaks(runs),
        "load_seconds": statistics.median(found["load_seconds"] for found in runs),
        "start_seconds": statistics.median(found["start_seconds"] for found in runs),
        "tokens": runs[0]["tokens"],
    }


def agreement(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return, for each variant of qlora_jax, how many of its first tokens equal those of transformers."""
    found = {}
    for name, row in results.items():
        other = results.get(name.replace(OURS, "hf", 1))
        if name.startswith(OURS) and other is not None:
            pairs = list(zip(row["tokens"], other["tokens"], strict=True))
            found[name] = next((place for place, (a, b) in enumerate(pairs) if a != b), len(pairs))
    return found


def section(found: Found, results: dict[str, dict[str, Any]], method: dict[str, Any], device: dict[str, Any]) -> Section:
    """Return the section with the table of results."""
    on_device = any(row["peak_device_bytes"] for row in results.values())
    columns = ("", "tokens/s", "ms a token", "min", "max", "CPU ms", "busy", "prefill ms", "peak MiB", "load s", "start s")
    columns += (*(["device MiB"] * on_device), "same tokens")
    same, total = agreement(results), method["new_tokens"]
    rows = []
    for name, row in results.items():
        low, high = row["token_seconds_range"]
        device_peak = (f"{(row['peak_device_bytes'] or 0) / MEBIBYTE:,.0f}",) if on_device else ()
        rows.append(
            (
                name,
                f"{row['tokens_per_second']:.1f}",
                *(f"{value * 1e3:.1f}" for value in (row["token_seconds"], low, high, row["token_cpu_seconds"])),
                f"{row['busy']:.0%}{'*' if row['disturbed'] else ''}",
                f"{row['prefill_seconds'] * 1e3:.0f}",
                f"{row['peak_resident_bytes'] / MEBIBYTE:,.0f}",
                f"{row['load_seconds']:.1f}",
                f"{row['start_seconds']:.1f}",
                *device_peak,
                f"{same[name]} of {total}" if name in same else "",
            )
        )
    return Section(
        "Decoding",
        (
            f"{method['model']}: {method['batch_size']} x {method['prompt_tokens']} tokens of English text are continued "
            f"by {total} tokens, greedily. Figures are medians of {method['rounds']} rounds x {method['answers']} "
            "answers after one answer of warm-up. Each run is a process of its own, and the variants take turns. nf4 "
            "has double quantisation.",
            machine_sentence(found, device),
            versions_sentence(found),
        ),
        columns,
        tuple(rows),
        (
            *agreement_sentences(same, total),
            *compared(results),
            *disturbed_sentences(results),
            *skipped_sentences(found.skipped),
        ),
    )


def agreement_sentences(same: dict[str, int], total: int) -> tuple[str, ...]:
    """Return sentences that say whether the greedy tokens of both programs agree."""
    return tuple(
        f"Greedy tokens of {name} {'agree' if count == total else f'do NOT agree (from token {count + 1} on)'} with "
        f"those of {name.replace(OURS, 'hf', 1)}."
        for name, count in same.items()
    )


def compared(results: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """Return sentences that compare qlora_jax with the peers, for the same compute dtype."""
    return tuple(
        f"{name} against {peer}: {row['tokens_per_second'] / other['tokens_per_second']:.2f} times the tokens/s "
        f"({other['token_cpu_seconds'] / row['token_cpu_seconds']:.2f} by CPU time), "
        f"{row['peak_resident_bytes'] / other['peak_resident_bytes']:.2f} of the memory, "
        f"{row['start_seconds'] / other['start_seconds']:.2f} of the time to start."
        for name, row in results.items()
        for peer, other in results.items()
        if name.startswith(OURS) and not peer.startswith(OURS) and name.split("-")[1] == peer.split("-")[1]
    )
