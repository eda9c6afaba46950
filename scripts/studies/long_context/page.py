"""The report of the study of long contexts, as a table and in words.

Of the answers of two models to the same prompts, those are compared that only one model has right: wins of the one, losses
of the other. The interval of the difference of shares is Student's over the pairs; there is none if all pairs are alike.
Whether one model is better is decided by the exact sign test (McNemar), with the probability ½ for each win or loss.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from qlora_jax.evaluate import Interval, paired_difference, share_interval
from scripts.studies.long_context.texts import DEPTHS, DIGITS, Prompt

MODELS = ("untuned", "untuned, scaled", "tuned")
ALL = "all"  # all depths together
SIGNIFICANCE = 0.05


def table(prompts: Sequence[Prompt], right: Mapping[str, Sequence[bool]]) -> list[dict[str, Any]]:
    """Return the rows of the table, by kind of prompt and depth of the key.

    A row has the shares of right answers with their intervals, and the gain of the tuned model over each of the others.
    """
    rows = []
    for kind in dict.fromkeys(prompt.kind for prompt in prompts):
        for depth in (ALL, *DEPTHS):
            chosen = [i for i, prompt in enumerate(prompts) if prompt.kind == kind and depth in (ALL, prompt.third)]
            if not chosen:
                continue
            hits = {name: [right[name][i] for i in chosen] for name in MODELS}
            row: dict[str, Any] = {"kind": kind, "depth": depth, "prompts": len(chosen)}
            row |= {name: dataclasses.asdict(share_interval(hits[name])) for name in MODELS}
            row["gains"] = {name: gain(hits["tuned"], hits[name]) for name in MODELS[:2]}
            rows.append(row)
    return rows


def gain(tuned: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """Return the difference of the shares of two models, its interval (None if all pairs are alike) and p."""
    pairs = np.asarray(tuned, int) - np.asarray(other, int)
    wins, losses = int((pairs > 0).sum()), int((pairs < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    interval = None if (pairs == pairs[0]).all() else dataclasses.asdict(paired_difference(tuned, other))
    return {"value": float(pairs.mean()), "interval": interval, "wins": wins, "losses": losses, "p": p}


def verdict(row: Mapping[str, Any]) -> str:
    """Return the result of a row of the table in words."""
    untuned, scaled, tuned = (round(row[name]["value"] * row["prompts"]) for name in MODELS)
    found = (
        f"{row['kind']}: of {row['prompts']} keys the tuned model finds {tuned}, the untuned model {untuned} with its own "
        f"positions and {scaled} with scaled positions"
    )
    gains = [*row["gains"].values()]
    if 2 * 0.5 ** row["prompts"] >= SIGNIFICANCE:  # p of all pairs alike
        return f"{found}: too few keys for a verdict"
    if all(gain["p"] < SIGNIFICANCE and gain["value"] > 0 for gain in gains):
        return f"{found}: significantly more than both (p up to {max(gain['p'] for gain in gains):.2g})"
    if any(gain["p"] < SIGNIFICANCE and gain["value"] < 0 for gain in gains):
        return f"{found}: significantly fewer than one of them"
    return f"{found}: not significantly more than both (p up to {max(gain['p'] for gain in gains):.2g})"


def markdown(report: Mapping[str, Any]) -> str:
    """Return the page in Markdown."""
    arguments, losses = report["arguments"], report["losses"]
    steps, rank, length, extended = (arguments[name] for name in ("steps", "rank", "length", "extended"))
    rate, ratio = arguments["learning_rate"], arguments["loraplus_lr_ratio"]
    first, last = np.mean(losses[:5]), np.mean(losses[-5:])
    training, total = (report["seconds"][name] / 60 for name in ("training", "all"))
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    lines = [
        "# Retrieval beyond the context after training with shifted sparse attention",
        "",
        f"{arguments['model']}, whose context is {report['context']} positions, is fine-tuned for {extended} positions "
        f"with the recipe of LongLoRA. Each prompt hides a key of {DIGITS} digits in filler text and asks for it at the "
        "end. Evaluation uses dense attention.",
        "",
        *(f"- {verdict(row)}." for row in report["rows"] if row["depth"] == ALL),
        "",
        f"Training: {steps} steps of one row of {length} tokens, whose positions have gaps; learning rate {rate:g} "
        f"(LoRA+, ratio {ratio:g}), rank {rank}, {report['dtype']}. The mean loss was {first:.2f} over the first five "
        f"steps and {last:.2f} over the last five. Device: {report['device']}, cores: {report['cores']}; {versions}. "
        f"Training took {training:.0f} minutes, and the whole study {total:.0f} minutes. Made by `{report['command']}`. "
        "The docstring of the program describes the method.",
        "",
        "Shares of correct answers with 95 % intervals. An answer is correct where greedy decoding gives all digits:",
        "",
        f"| prompts | key in | number | {' | '.join(MODELS)} | tuned - untuned |",
        f"|{' --- |' * (len(MODELS) + 4)}",
    ]
    for row in report["rows"]:
        cells = [Interval(**row[name]).text(2) for name in MODELS]
        gained = row["gains"][MODELS[0]]
        interval = gained["interval"]
        cells.append(f"{gained['value']:+.2f}" if interval is None else Interval(**interval).text(2, sign=True))
        lines.append(f"| {row['kind']} | {row['depth']} | {row['prompts']} | {' | '.join(cells)} |")
    lines += [
        "",
        "The prompts:",
        "",
        f"- within: {length} tokens with gaps; the last position is in the upper half of the context;",
        f"- beyond: {length} tokens with gaps; the last position is between the context and {extended};",
        f"- real: {extended} tokens without gaps.",
        "",
        '"key in" is the third of the positions that holds the key. The tuned model has also learned the wording of the '
        "question. The rows `within` of the untuned model show how much of the gain is due to that and not to positions.",
        "",
    ]
    return "\n".join(lines)
