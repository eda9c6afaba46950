"""Relate the scores of models to those of a reference model, as the QLoRA paper does.

    python scripts/evaluate.py score scores.jsonl
    python scripts/evaluate.py score scores.jsonl --reference gpt-4 --plot scores.png

The file has a JSON object a line: question_id, model_a, model_b, score_a, score_b; a score is -1 if the judge gave none. The
relative score of a model is the sum of its scores over the sum of the reference's on the same questions, as the mean of both
orders, in percent; "pooled" are the sums over both orders. The intervals resample the questions. The last line is JSON.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from qlora_jax import cli
from qlora_jax.commands.evaluations.output import (
    bounds,
    check_least,
    check_plot,
    draw_intervals,
    number,
    print_json,
    print_notes,
    print_table,
)
from qlora_jax.errors import OptionError, list_names
from qlora_jax.evaluate import RelativeScore, models_without_scores, read_judgements, reference_of, relative_scores


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    file: tyro.conf.Positional[Path | None] = None
    """File of scores (JSONL)."""
    reference: str | None = None
    """Model that the others are relative to; the one that is part of every row if left out, and gpt-3.5 if two are."""
    models: tuple[str, ...] = ()
    """Models to score; all if left out."""
    resamples: int = 10_000
    """Number of resamples of the questions for the intervals."""
    seed: int = 0
    """Seed of the resamples."""
    plot: Path | None = None
    """Picture to write: the relative scores with their intervals."""

    def __post_init__(self) -> None:
        check_least(self, resamples=1, seed=0)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(score, Options, __doc__, arguments, program=program)


def score(options: Options) -> None:
    """Print the relative scores."""
    if options.file is None:
        raise OptionError("score: expected a file of scores, found none")
    check_plot(options.plot)
    judgements = read_judgements(options.file, "scores")
    reference = reference_of(judgements, options.reference)
    if options.models:
        judgements = judgements.between([*options.models, reference])
    print_notes(judgements)
    at = judgements.models.index(reference)
    if others := int(((judgements.first != at) & (judgements.second != at)).sum()):
        print(f"{judgements.source}: rows without {reference}, which are ignored: {others:,}", file=sys.stderr)
    found = relative_scores(judgements, reference, resamples=options.resamples, seed=options.seed)
    missing = models_without_scores(judgements, reference)
    for reason in dict.fromkeys(missing.values()):
        models = [model for model, its_reason in missing.items() if its_reason == reason]
        print(f"{judgements.source}: models left out ({reason}): {len(models)} ({list_names(models)})", file=sys.stderr)
    header = ["model", f"% of {reference}", "95 % interval", "shown second", "shown first", "pooled", "rows", "left out"]
    print_table(header, [_row(model, one) for model, one in found.items()])
    if options.plot is not None:
        draw_intervals(
            {model: one.relative for model, one in found.items()}, options.plot, f"% of {reference}, and 95 % interval"
        )
    scores = {
        model: {
            "relative": one.relative.value,
            "low": one.relative.low,
            "high": one.relative.high,
            "rows": one.rows,
            "left_out": one.left_out,
            "shown_second": one.orders[0],
            "shown_first": one.orders[1],
            "pooled": one.pooled,
        }
        for model, one in found.items()
    }
    print_json({"scores": scores, "reference": reference, "left_out": judgements.left_out})


def _row(model: str, one: RelativeScore) -> list[str]:
    orders = map(number, (*one.orders, one.pooled))
    return [model, number(one.relative.value), bounds(one.relative), *orders, f"{one.rows:,}", f"{one.left_out:,}"]
