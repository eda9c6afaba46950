"""Measure how far judges agree: with each other, and with themselves when the two answers change places.

    python scripts/evaluate.py agreement verdicts.jsonl
    python scripts/evaluate.py agreement gpt-4.jsonl local.jsonl people.jsonl

The files are those of `score` or of `elo`, in any mixture. Each file is a judge, with the file's name, unless its rows
have a column "judge". The first table is the position bias of each judge. The second is, for each pair of judges,
Kendall's tau of their rankings of the models (by all questions, and by single questions) and Fleiss' kappa of their
verdicts. The last line is JSON.
"""

import dataclasses
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import tyro

from qlora_jax import cli
from qlora_jax.commands.evaluations.output import bounds, check_least, number, print_json, print_notes, print_table
from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import (
    Interval,
    Judgements,
    PairAgreement,
    SelfAgreement,
    kappa_of_judges,
    pair_agreement,
    read_judgements,
    self_agreement,
    split_by_judge,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command."""

    files: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files of scores or verdicts (JSONL)."""
    models: tuple[str, ...] = ()
    """Models to look at, by the judgements between them; all if left out."""
    resamples: int = 1_000
    """Number of resamples of the questions for the intervals."""
    seed: int = 0
    """Seed of the resamples."""

    def __post_init__(self) -> None:
        check_least(self, resamples=1, seed=0)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run the command and return its exit code."""
    return cli.run(agreement, Options, __doc__, arguments, program=program)


def agreement(options: Options) -> None:
    """Print the agreement of the judges."""
    judges = _judges(options)
    draws = {"resamples": options.resamples, "seed": options.seed}
    alone = {name: self_agreement(judge, **draws) for name, judge in judges.items()}
    pairs = {pair: pair_agreement(judges, *pair, **draws) for pair in combinations(judges, 2)}
    header = ["judge", "rows", "first", "second", "tie", "bias", "95 % interval", "both orders", "consistent", "kappa"]
    print_table(header, [_self_row(name, one) for name, one in alone.items()])
    if pairs:
        print()
        header = [
            "judges",
            "models",
            "tau of systems",
            "95 % interval",
            "tau of examples",
            "of",
            "same verdict",
            "of",
            "kappa",
        ]
        print_table([*header, "95 % interval"], [_pair_row(" / ".join(pair), one) for pair, one in pairs.items()])
    print()
    result = {"judges": {name: _plain(one) for name, one in alone.items()}, "pairs": [], "fleiss_kappa": None, "items": 0}
    result["pairs"] = [{"judges": list(pair), **_plain(one)} for pair, one in pairs.items()]
    if len(judges) > 1:
        kappa, items = kappa_of_judges(judges, **draws)
        result |= {"fleiss_kappa": dataclasses.asdict(kappa), "items": items}
        if len(judges) > 2:
            print(f"Fleiss' kappa of all judges: {number(kappa.value, 3)} ({bounds(kappa, 3)}), {items:,} items\n")
    print_json({"agreement": result})


def _judges(options: Options) -> dict[str, Judgements]:
    """Read the files; return the judgements by judge."""
    if not options.files:
        raise OptionError("agreement: expected a file of scores or verdicts, found none")
    resolved = [path.resolve() for path in options.files]
    for place, path in enumerate(options.files):
        if resolved[place] in resolved[:place]:
            raise OptionError(f"agreement: expected each file once, found {path} twice")
    judges: dict[str, Judgements] = {}
    files = [read_judgements(path) for path in options.files]
    stems = [path.stem for path in options.files]
    for path, judgements in zip(options.files, files, strict=True):
        own_name = path.stem if stems.count(path.stem) == 1 else str(path)
        if options.models:
            judgements = judgements.between(options.models)
        for name, judge in split_by_judge(judgements, own_name).items():
            if name in judges:
                raise DataError(
                    f"{path}: expected each judge in one file, found {name}, which {judges[name].source} has too; "
                    "rename the judge, or put the rows into one file"
                )
            judges[name] = judge
        print_notes(judgements)
    return judges


def _self_row(name: str, one: SelfAgreement) -> list[str]:
    shares = [number(100 * share) + " %" for share in (one.first, one.second, one.tie)]
    consistent = "–" if not one.both_orders else number(100 * one.consistent) + " %"
    bias = [number(one.bias.value, 3), bounds(one.bias, 3)]
    return [name, f"{one.rows:,}", *shares, *bias, f"{one.both_orders:,}", consistent, number(one.kappa, 3)]


def _pair_row(name: str, one: PairAgreement) -> list[str]:
    tau = [number(one.system_tau.value, 3), bounds(one.system_tau, 3), number(one.example_tau, 3), f"{one.examples:,}"]
    same = "–" if not one.items else number(100 * one.same) + " %"
    return [name, str(len(one.models)), *tau, same, f"{one.items:,}", number(one.kappa.value, 3), bounds(one.kappa, 3)]


def _plain(one: SelfAgreement | PairAgreement) -> dict[str, object]:
    return {
        name: dataclasses.asdict(value) if isinstance(value, Interval) else value
        for name, value in ((field.name, getattr(one, field.name)) for field in dataclasses.fields(one))
    }
