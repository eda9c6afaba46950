"""What was found, as a table and in words.

Of two models' answers to the same prompts, those count that only one of them has right: a wins, b loses. The interval of the
difference of shares is Student's over the pairs, none where all pairs are alike; whether the one is better, the exact sign
test says (McNemar): w of w + l by chance, p = ½ each.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from qlora_jax.evaluate import Interval, paired_difference, share_interval
from scripts.studies.long_context.texts import DEPTHS, DIGITS, Prompt

MODELS = ("untuned", "untuned, scaled", "tuned")
ALL = "all"  # depths together
SIGNIFICANCE = 0.05


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
            row["gains"] = {name: gain(hits["tuned"], hits[name]) for name in MODELS[:2]}
            rows.append(row)
    return rows


def gain(tuned: Sequence[bool], other: Sequence[bool]) -> dict[str, Any]:
    """The difference of the shares of one model and another, its interval (None: see above) and p."""
    pairs = np.asarray(tuned, int) - np.asarray(other, int)
    wins, losses = int((pairs > 0).sum()), int((pairs < 0).sum())
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    interval = None if (pairs == pairs[0]).all() else dataclasses.asdict(paired_difference(tuned, other))
    return {"value": float(pairs.mean()), "interval": interval, "wins": wins, "losses": losses, "p": p}


def verdict(row: Mapping[str, Any]) -> str:
    """What a row of the table says, in words."""
    untuned, scaled, tuned = (round(row[name]["value"] * row["prompts"]) for name in MODELS)
    found = (
        f"{row['kind']}: of {row['prompts']} keys the tuned model finds {tuned}, the untuned one {untuned} as it is and "
        f"{scaled} with its positions divided"
    )
    gains = [*row["gains"].values()]
    if 2 * 0.5 ** row["prompts"] >= SIGNIFICANCE:  # p of all pairs alike
        return f"{found}: too few to tell"
    if all(gain["p"] < SIGNIFICANCE and gain["value"] > 0 for gain in gains):
        return f"{found}: clearly more than either (p up to {max(gain['p'] for gain in gains):.2g})"
    if any(gain["p"] < SIGNIFICANCE and gain["value"] < 0 for gain in gains):
        return f"{found}: clearly less than one of them"
    return f"{found}: not clearly more than both (p up to {max(gain['p'] for gain in gains):.2g})"


def markdown(report: Mapping[str, Any]) -> str:
    """The page."""
    arguments, losses = report["arguments"], report["losses"]
    steps, rank, length, extended = (arguments[name] for name in ("steps", "rank", "length", "extended"))
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
        f"`{report['command']}`, whose head describes it.",
        "",
        "Shares of right answers, greedy and of all digits, with 95 % intervals:",
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
        f"within: {length} tokens with gaps, the last position in the upper half of the context; beyond: the same, the last",
        f"position between it and {extended}; real: {extended} tokens without gaps. Thirds are those of positions.",
        "The tuned model has learned the wording of the question, too: how much of its gain is that of positions,",
        "the untuned model within its context shows.",
        "",
    ]
    return "\n".join(lines)
