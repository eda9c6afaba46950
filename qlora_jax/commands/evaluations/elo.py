"""Rate models by the verdicts of a judge on pairs of their answers: Elo, and Bradley-Terry beside it.

    python scripts/evaluate.py elo verdicts.jsonl
    python scripts/evaluate.py elo verdicts.jsonl --comparisons 0 --plot ratings.png

The file has a JSON object a line: question_id, model_a, model_b, verdict (1: the first answer is better, 2: the second,
3: a tie, -1: none). An Elo rating is the mean over many random orders of the comparisons, each of --comparisons of them; it
depends on that number, and the second table shows how. The last line is JSON.
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
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import BradleyTerry, Elo, Interval, bradley_terry, check_elo, elo_ratings, read_judgements


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    file: tyro.conf.Positional[Path | None] = None
    """File of verdicts (JSONL)."""
    models: tuple[str, ...] = ()
    """Models to rate, by their comparisons with each other; all if left out."""
    orders: int = 10_000
    """Number of random orders."""
    comparisons: int | None = None
    """Number of comparisons in each order; 0: all. If left out, 500, or all if there are fewer."""
    k_factor: float = 32.0
    """Maximum number of points that a comparison moves."""
    start: float = 1000.0
    """Rating before the first comparison."""
    resamples: int = 1_000
    """Number of resamples of the questions for the intervals of the Bradley-Terry ratings."""
    seed: int = 0
    """Seed of the orders and of the resamples."""
    plot: Path | None = None
    """Picture to write: the Elo ratings with their intervals."""

    def __post_init__(self) -> None:
        check_least(self, comparisons=0, resamples=1, seed=0)
        check_elo(orders=self.orders, k_factor=self.k_factor, start=self.start)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(elo, Options, __doc__, arguments, program=program)


def elo(options: Options) -> None:
    """Print the ratings."""
    if options.file is None:
        raise OptionError("elo: expected a file of verdicts, found none")
    check_plot(options.plot)
    judgements = read_judgements(options.file, "verdicts")
    if options.models:
        judgements = judgements.between(options.models)
    print_notes(judgements)
    found = elo_ratings(
        judgements,
        orders=options.orders,
        comparisons=options.comparisons,
        k_factor=options.k_factor,
        start=options.start,
        seed=options.seed,
    )
    beside = bradley_terry(judgements, resamples=options.resamples, start=options.start, seed=options.seed)
    models = sorted(found.ratings, key=lambda model: -found.ratings[model].value)
    _print_tables(models, found, beside, options.orders)
    if options.plot is not None:
        draw_intervals({model: found.ratings[model] for model in models}, options.plot, "Elo rating, and 95 % of the orders")
    print_json(
        {
            "elo": {model: _plain(found.ratings[model]) | {"error": found.errors[model]} for model in models},
            "bradley_terry": beside.ratings and {model: _plain(beside.ratings[model]) for model in models},
            "comparisons": found.comparisons,
            "orders": options.orders,
            "verdicts": len(judgements.valid()),
            "left_out": judgements.left_out,
            "by_comparisons": {str(count): means for count, means in found.by_length.items()},
        }
    )


def _print_tables(models: list[str], found: Elo, beside: BradleyTerry, orders: int) -> None:
    rows = []
    for model in models:
        rating, other = found.ratings[model], None if beside.ratings is None else beside.ratings[model]
        cells = [number(rating.value), f"± {number(found.errors[model])}", bounds(rating, 0)]
        rows.append([model, *cells, *([number(other.value), bounds(other, 0)] if other else ["–", "–"])])
    print(f"{orders:,} random orders of {found.comparisons:,} comparisons each:\n")
    print_table(["model", "Elo", "of the mean", "95 % of the orders", "Bradley-Terry", "95 % interval"], rows)
    print("\nElo after as many comparisons:\n")
    header = ["model", *(f"{count:,}" for count in found.by_length)]
    print_table(header, [[model, *(number(means[model], 0) for means in found.by_length.values())] for model in models])
    print()
    if beside.ratings is None:
        print(
            "Bradley-Terry: no finite ratings, because some models won, or lost, all their comparisons with the others.",
            file=sys.stderr,
        )
    elif beside.undefined:
        print(
            f"Bradley-Terry: {beside.undefined:.1%} of the resamples have no finite ratings and are left out of the "
            "intervals, which are too narrow then.",
            file=sys.stderr,
        )


def _plain(interval: Interval) -> dict[str, float]:
    return {"rating": interval.value, "low": interval.low, "high": interval.high}
