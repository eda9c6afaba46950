"""The sections of a report: what the judgements say, the results of other commands, and answers side by side."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qlora_jax.errors import QLoRAError
from qlora_jax.evaluate.agreement import PairAgreement, SelfAgreement, pair_agreement, self_agreement, split_by_judge
from qlora_jax.evaluate.bradley_terry import bradley_terry
from qlora_jax.evaluate.elo import elo_ratings
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judge.answers import Answers
from qlora_jax.evaluate.judgements import Judgements, notes_on_pairs
from qlora_jax.evaluate.relative_scores import reference_of, relative_scores
from qlora_jax.evaluate.report.page import note, paragraph, section, table, text
from qlora_jax.evaluate.report.pictures import intervals, matrix, shares
from qlora_jax.evaluate.report.results import of_result
from qlora_jax.evaluate.report.sources import Sources

__all__ = ["sections_of"]

_RESAMPLES = 1_000


def sections_of(sources: Sources, *, orders: int, samples: int, longest: int, seed: int) -> list[tuple[str, str]]:
    """Return (title, HTML) of each section.

    What cannot be calculated, for example ratings of models that were never compared, is a note in its section.

    Args:
        sources: the files.
        orders: number of random orders of the Elo ratings.
        samples: number of questions whose answers are shown.
        longest: number of characters of an answer that are shown.
        seed: of all random draws.
    """
    found = []
    for name, judgements in sources.judgements.items():
        make = _scores if judgements.kind == "scores" else _verdicts
        found.append(section(f"{judgements.kind.capitalize()}: {name}", make(judgements, orders, seed)))
    if sources.judgements:
        found.append(section("Position of the answers and agreement of judges", _judges(sources.judgements, seed)))
    found += [section(f"Results: {name}", of_result(values)) for name, values in sources.results.items()]
    if sources.answers is not None and samples:
        found.append(section("Answers side by side", _answers(sources.answers, sources.judgements, samples, longest)))
    return found


def _scores(judgements: Judgements, orders: int, seed: int) -> list[str]:
    def ratios() -> list[str]:
        reference = reference_of(judgements)
        found = relative_scores(judgements, reference, resamples=_RESAMPLES, seed=seed)
        header = ["model", f"% of {reference}", "low", "high", "shown second", "shown first", "pooled", "rows", "left out"]
        rows = []
        for model, one in found.items():
            figures = (one.relative.value, one.relative.low, one.relative.high, *one.orders, one.pooled)
            rows.append([model, *map(_one_digit, figures), one.rows, one.left_out])
        label = f"Sum of the scores in percent of that of {reference}, mean of both orders, with 95 % intervals (questions)"
        return [intervals({model: one.relative for model, one in found.items()}, label), table(header, rows)]

    return [*_described(judgements), *_or_note(ratios), *_wins(judgements)]


def _verdicts(judgements: Judgements, orders: int, seed: int) -> list[str]:
    def ratings() -> list[str]:
        elo = elo_ratings(judgements, orders=orders, seed=seed)
        beside = bradley_terry(judgements, resamples=_RESAMPLES, seed=seed).ratings
        models = sorted(elo.ratings, key=lambda model: -elo.ratings[model].value)
        drawn = {model: (beside or elo.ratings)[model] for model in models}
        label = (
            "Bradley-Terry ratings with 95 % intervals (questions)"
            if beside
            else "Elo ratings and 95 % of the orders; Bradley-Terry has no finite ratings here"
        )
        rows = [
            [model, _one_digit(elo.ratings[model].value), _bounds(elo.ratings[model])]
            + ([_one_digit(beside[model].value), _bounds(beside[model])] if beside else [None, None])
            for model in models
        ]
        header = ["model", "Elo", "95 % of the orders", "Bradley-Terry", "95 % interval"]
        caption = f"Elo: mean of {orders:,} random orders of {elo.comparisons:,} comparisons"
        return [intervals(drawn, label, 0), table(header, rows, caption)]

    return [*_described(judgements), *_or_note(ratings), *_wins(judgements)]


def _wins(judgements: Judgements) -> list[str]:
    """Return the matrix of points that the model of a row won against that of a column; none if most pairs are missing."""
    valid = judgements.valid()
    points, count = valid.points(), len(judgements.models)
    won, asked = np.zeros((count, count)), np.zeros((count, count))
    for first, second, gained in ((valid.first, valid.second, points), (valid.second, valid.first, 1 - points)):
        np.add.at(won, (first, second), gained)
        np.add.at(asked, (first, second), 1)
    if 2 * np.count_nonzero(asked) < count * (count - 1):
        return []
    with np.errstate(invalid="ignore"):
        share = won / asked
    order = np.argsort(-won.sum(1) / np.maximum(asked.sum(1), 1), kind="stable")
    cells = [[None if np.isnan(share[a, b]) else float(share[a, b]) for b in order] for a in order]
    caption = "Share of the comparisons that the model of the row won against that of the column; a tie counts ½"
    return [matrix([judgements.models[index] for index in order], cells, caption)]


def _judges(files: Mapping[str, Judgements], seed: int) -> list[str]:
    judges: dict[str, Judgements] = {}
    for name, judgements in files.items():
        for judge, rows in split_by_judge(judgements, name).items():
            judges[judge if judge not in judges else f"{judge} ({name})"] = rows
    parts, alone = [], {}
    for name, judge in judges.items():
        try:
            alone[name] = self_agreement(judge, resamples=_RESAMPLES, seed=seed)
        except QLoRAError as error:
            parts.append(note(f"{name}: {error}"))
    if alone:
        words = "How often each judge preferred the answer in each position. Without a bias, the outer parts are equal."
        bars = {name: (one.first, one.tie, one.second) for name, one in alone.items()}
        parts += [paragraph(words), shares(bars, ("first", "tie", "second"))]
        header = ["judge", "rows", "left out", "bias", "95 % interval", "judged in both orders", "same verdict", "kappa"]
        parts.append(table(header, [_self_row(name, one) for name, one in alone.items()]))
    pairs = []
    for one, other in itertools.combinations(alone, 2):
        try:
            pairs.append(_pair_row(f"{one} / {other}", pair_agreement(judges, one, other, resamples=_RESAMPLES, seed=seed)))
        except QLoRAError as error:
            parts.append(note(f"{one} / {other}: {error}"))
    if pairs:
        header = ["judges", "models", "tau of systems", "tau of examples", "same verdict", "of", "kappa", "95 % interval"]
        parts.append(table(header, pairs, "Agreement of two judges"))
    return parts


def _self_row(name: str, one: SelfAgreement) -> list[object]:
    bias = [f"{one.bias.value:+.3f}", _bounds(one.bias, 3)]
    return [name, one.rows, one.left_out, *bias, one.both_orders, _percent(one.consistent), one.kappa]


def _pair_row(name: str, one: PairAgreement) -> list[object]:
    tau = [one.system_tau.value, one.example_tau]
    return [name, len(one.models), *tau, _percent(one.same), one.items, one.kappa.value, _bounds(one.kappa, 3)]


def _answers(answers: Answers, files: Mapping[str, Judgements], samples: int, longest: int) -> list[str]:
    models = list(answers.by_model)
    shared = [q for q in answers.ids if all(q in answers.by_model[model] for model in models)] or list(answers.ids)
    places = np.unique(np.linspace(0, len(shared) - 1, min(samples, len(shared))).round().astype(int))
    words = f"{len(places):,} of {len(shared):,} questions, evenly spread; answers are cut at {longest:,} characters."
    parts = [paragraph(words)]
    for question in (shared[place] for place in places):
        parts.append(f"<h3>Question {text(question)}</h3>")
        parts.append(f'<div class="written" dir="auto">{_cut(answers.prompts[question], longest)}</div>')
        cards = [
            f'<div class="answer"><h4>{text(model)}</h4><div class="written" dir="auto">'
            f"{_cut(answers.by_model[model][question], longest)}</div></div>"
            for model in models
            if question in answers.by_model[model]
        ]
        parts.append(f'<div class="answers">{"".join(cards)}</div>')
        if rows := list(
            itertools.chain.from_iterable(_of_question(name, one, question, models) for name, one in files.items())
        ):
            parts.append(table(["judge", "shown first", "shown second", "judgement"], rows, words=[1, 2, 3]))
    return parts


def _of_question(name: str, judgements: Judgements, question: str, models: Sequence[str]) -> list[list[object]]:
    """Return the judgements of a question between some models as rows of a table."""
    if question not in judgements.questions:
        return []
    rows = judgements.rows(np.flatnonzero(judgements.question == judgements.questions.index(question)))
    found = []
    for row, (first, second) in enumerate(zip(rows.first.tolist(), rows.second.tolist(), strict=True)):
        names = [judgements.models[first], judgements.models[second]]
        if not set(names) <= set(models):
            continue
        one, other = rows.values[row].tolist()
        if np.isnan(one):
            words = "none"
        elif judgements.kind == "scores":
            words = f"{one:g} : {other:g}"
        else:
            words = "tie" if one == other else names[int(one < other)]
        found.append([judgements.judges[rows.judge[row]] or name, *names, words])
    return found[:_MOST_JUDGEMENTS]


_MOST_JUDGEMENTS = 24  # of a question that are shown


def _described(judgements: Judgements) -> list[str]:
    left_out = f" {judgements.left_out:,} of them have no judgement and are left out." if judgements.left_out else ""
    words = (
        f"{len(judgements):,} {judgements.kind} of {len(judgements.models):,} models on {len(judgements.questions):,} "
        f"questions.{left_out}"
    )
    return [paragraph(words), *(note(one) for one in notes_on_pairs(judgements))]


def _or_note(make: Callable[[], Sequence[str]]) -> list[str]:
    """Return what `make` returns, or a note with the reason why it cannot."""
    try:
        return list(make())
    except QLoRAError as error:
        return [note(str(error))]


def _cut(words: str, longest: int) -> str:
    return text(words) if len(words) <= longest else text(words[:longest].rstrip()) + ' <span class="faint">[cut]</span>'


def _one_digit(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f} %"


def _bounds(interval: Interval, digits: int = 0) -> str:
    return "–" if np.isnan(interval.low) else f"{interval.low:.{digits}f} to {interval.high:.{digits}f}"
