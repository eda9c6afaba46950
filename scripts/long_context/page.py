"""What was found, as a table and in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from long_context.texts import DEPTHS, DIGITS, Prompt
from qlora_jax.evaluate import Interval, paired_difference, share_interval

MODELS = ("untuned", "untuned, scaled", "tuned")
ALL = "all"  # depths together


def table(prompts: Sequence[Prompt], right: Mapping[str, Sequence[bool]]) -> list[dict[str, Any]]:
    """Shares of right answers with their intervals, by kind of prompt: of all, and by the depth of the key; and what the
    tuned model has more than each of the others."""
    rows = []
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        for depth in (ALL, *DEPTHS):
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind == kind and depth in (ALL, prompt.third)]
            if not chosen:
                continue
            hits = {name: [right[name][i] for i in chosen] for name in MODELS}
            row: dict[str, Any] = {"kind": kind, "depth": depth, "prompts": len(chosen)}
            row |= {name: dataclasses.asdict(share_interval(hits[name])) for name in MODELS}
            if len(chosen) > 1:  # one pair has no interval
                gains = {name: paired_difference(hits["tuned"], hits[name]) for name in MODELS[:2]}
                row["gains"] = {name: dataclasses.asdict(gain) for name, gain in gains.items()}
            rows.append(row)
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """What a row of the table says, in words."""
    untuned, scaled, tuned = (round(row[name]["value"] * row["prompts"]) for name in MODELS)
    found = (
        f"{row['kind']}: of {row['prompts']} keys the tuned model finds {tuned}, the untuned one {untuned} as it is and "
        f"{scaled} with its positions divided"
    )
    gains = [*row.get("gains", {}).values()]
    if not gains:
        return found
    if all(gain["low"] > 0 for gain in gains):
        return f"{found}: clearly more than either (the intervals of the differences lie above 0)"
    if any(gain["high"] < 0 for gain in gains):
        return f"{found}: clearly less than one of them"
    return f"{found}: not clearly more than either (an interval of the differences holds 0)"


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    arguments, losses = report["arguments"], report["losses"]
    steps, rank, length, extended, real = (arguments[name] for name in ("steps", "rank", "length", "extended", "real"))
    rate, ratio = arguments["learning_rate"], arguments["loraplus_lr_ratio"]
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    training, total = (report["seconds"][name] / 60 for name in ("training", "all"))
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    lines = [
        "# Beyond the context: trained with shifted sparse attention, asked with dense attention",
        "",
        f"{arguments['model']}, made for {report['context']} positions, fine-tuned for {extended} by LongLoRA's recipe,",
        f"and asked for a key of {DIGITS} digits that stands somewhere in filler.",
        "",
        *(f"- {verdict(row)}." for row in report["rows"] if row["depth"] == ALL),
        "",
        f"{steps} steps of one row of {length} tokens, whose positions have gaps; learning rate {rate:g}",
        f"(LoRA+, ratio {ratio:g}), rank {rank}, {report['dtype']}. The loss was {first:.2f} over the first five steps and",
        f"{last:.2f} over the last five. Device: {report['device']}, cores: {report['cores']}; {versions};",
        f"{training:.0f} minutes of training, {total:.0f} with all questions. Made by",
        f"`python scripts/measure_long_context.py --real {real} --output docs/long-context.md`, whose head describes it.",
        "",
        "Shares of right answers, greedy and of all digits, with 95 % intervals:",
        "",
        f"| prompts | key in | number | {' | '.join(MODELS)} | tuned - untuned |",
        f"|{' --- |' * (len(MODELS) + 4)}",
    ]
    for row in report["rows"]:
        cells = [Interval(**row[name]).text(2) for name in MODELS]
        cells.append(Interval(**row["gains"][MODELS[0]]).text(2, sign=True) if "gains" in row else "")
        lines.append(f"| {row['kind']} | {row['depth']} | {row['prompts']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"within: {length} tokens with gaps, the last position in the upper half of the context; beyond: the same, the last",
        f"position between it and {extended}; real: {extended} tokens without gaps. Thirds are those of positions.",
        "",
    ]
    return "\n".join(lines)
