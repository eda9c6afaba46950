"""Agreement of judges: of one with itself in the other order, and of several with each other.

    position bias     share of verdicts for the first answer minus that for the second; near 0 without such a bias
    consistency       of the pairs judged in both orders, the share with the same verdict both times
    Kendall's τ_b     of the rankings of the models by two judges (`rankings`). System level: the rankings by all questions;
                      example level: those by a single question, averaged over questions
    Fleiss' κ         agreement on better, worse or tie beyond that of chance: (P - P_e) / (1 - P_e) (Fleiss 1971)

A judge's verdict on a question and a pair of models is that of its points over both orders, so that a judge that contradicts
itself has given a tie. Scores are compared as verdicts: the higher score is better. The QLoRA paper (§5) finds τ = 0.43 and
κ = 0.25 between GPT-4 and people.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qlora_jax.errors import DataError, OptionError, list_names
from qlora_jax.evaluate.bootstrap import over_questions
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judgements import Judgements
from qlora_jax.evaluate.rankings import difference_sums, kendall_tau, least_squares

__all__ = [
    "PairAgreement",
    "SelfAgreement",
    "fleiss_kappa",
    "kappa_of_judges",
    "pair_agreement",
    "self_agreement",
    "split_by_judge",
]

_Verdicts = dict[tuple[str, str, str], int]  # (question, model, other model) -> 0 better, 1 worse, 2 tie


@dataclass(frozen=True)
class SelfAgreement:
    """What one judge does with the order of two answers.

    Attributes:
        rows, left_out: numbers of rows with and without a judgement.
        first, second, tie: shares of the verdicts for the first answer, for the second, and of ties.
        bias: first - second, with its interval.
        both_orders: number of questions and pairs that were judged in both orders.
        consistent: share of them with the same verdict in both orders; NaN if there are none.
        same_position: share of them with the same position, and so different models, in both orders.
        kappa: Fleiss' κ of the two orders.
    """

    rows: int
    left_out: int
    first: float
    second: float
    tie: float
    bias: Interval
    both_orders: int
    consistent: float
    same_position: float
    kappa: float


@dataclass(frozen=True)
class PairAgreement:
    """The agreement of two judges.

    Attributes:
        models: the models that both have judged.
        system_tau: Kendall's τ of the rankings of the models, with its interval.
        example_tau: the mean of Kendall's τ over questions; NaN if no question has a ranking.
        examples: number of questions with a ranking by both judges, which ties between all models are not.
        items: number of questions and pairs that both judged.
        same: share of them with the same verdict.
        kappa: Fleiss' κ on them, with its interval.
    """

    models: tuple[str, ...]
    system_tau: Interval
    example_tau: float
    examples: int
    items: int
    same: float
    kappa: Interval


def split_by_judge(judgements: Judgements, name: str) -> dict[str, Judgements]:
    """Return the judgements of each judge; rows without a judge's name have the given one."""
    return {judge or name: judgements.rows(judgements.judge == index) for index, judge in enumerate(judgements.judges)}


def self_agreement(judgements: Judgements, *, resamples: int = 1_000, seed: int = 0) -> SelfAgreement:
    """Return what one judge does with the order of two answers.

    Raises:
        DataError: there is no row, or none with a judgement.
        OptionError: `resamples` is not positive.
    """
    _check_resamples(resamples)
    if not len(judgements):
        models = list_names(judgements.models)
        raise DataError(
            f"{judgements.source}: expected judgements between the models {models}, found no rows; "
            "name two or more that were compared with --models"
        )
    valid = judgements.valid()
    if not len(valid):
        raise DataError(f"{judgements.source}: expected judgements, found rows without one only")
    points = valid.points()
    asked, question = np.unique(valid.question, return_inverse=True)
    kinds = np.stack([points == 1, points == 0, points == 0.5], 1).astype(np.float64)
    sums = np.zeros((len(asked), 3))
    np.add.at(sums, question, kinds)

    def bias(drawn: np.ndarray) -> np.ndarray:
        totals = drawn @ sums
        return (totals[:, 0] - totals[:, 1]) / totals.sum(1)

    low, high = over_questions(bias, len(asked), resamples=resamples, seed=seed)
    first, second, tie = kinds.mean(0).tolist()
    counts = _counts(valid, points)
    pairs = [(row, counts[other]) for (q, a, b), row in counts.items() if a < b and (other := (q, b, a)) in counts]
    verdicts = np.array([[_verdict(*row), _verdict(*other[::-1])] for row, other in pairs], int).reshape(-1, 2)
    opposite = (verdicts[:, 0] + verdicts[:, 1] == 1).mean() if len(verdicts) else np.nan
    return SelfAgreement(
        rows=len(valid),
        left_out=judgements.left_out,
        first=first,
        second=second,
        tie=tie,
        bias=Interval(first - second, float(low), float(high)),
        both_orders=len(verdicts),
        consistent=float((verdicts[:, 0] == verdicts[:, 1]).mean()) if len(verdicts) else np.nan,
        same_position=float(opposite),
        kappa=fleiss_kappa(_categories(verdicts)),
    )


def pair_agreement(
    judges: Mapping[str, Judgements], one: str, other: str, *, resamples: int = 1_000, seed: int = 0
) -> PairAgreement:
    """Return the agreement of two of the judges.

    Raises:
        DataError: they have fewer than two models, or no questions, in common.
        OptionError: `resamples` is not positive.
    """
    _check_resamples(resamples)
    pair = [judges[one].valid(), judges[other].valid()]
    models = sorted(set.intersection(*(_judged(judge) for judge in pair)))
    if len(models) < 2:
        names = " and ".join(list_names(sorted(_judged(judge))) or "none" for judge in pair)
        raise DataError(f"{one} and {other}: expected judgements of the same models, at least two, found {names}")
    questions = sorted(set.intersection(*({judge.questions[q] for q in set(judge.question.tolist())} for judge in pair)))
    if not questions:
        raise DataError(f"{one} and {other}: expected judgements of the same questions, found no common questions")
    sums = [difference_sums(judge, models, questions) for judge in pair]

    def system(drawn: np.ndarray) -> np.ndarray:  # [n, questions] -> [n]
        return kendall_tau(*(least_squares(np.tensordot(drawn, counts, 1), drawn @ total) for counts, total in sums))

    examples = kendall_tau(*(least_squares(*one) for one in sums))
    ranked = ~np.isnan(examples)
    tau = float(system(np.ones((1, len(questions))))[0])
    low, high = over_questions(system, len(questions), resamples=resamples, seed=seed)
    verdicts = [_verdicts(judge) for judge in pair]
    common = sorted(verdicts[0].keys() & verdicts[1].keys())
    labels = np.array([[of[item] for of in verdicts] for item in common], int).reshape(-1, 2)
    return PairAgreement(
        models=tuple(models),
        system_tau=Interval(tau, float(low), float(high)),
        example_tau=float(examples[ranked].mean()) if ranked.any() else np.nan,
        examples=int(ranked.sum()),
        items=len(common),
        same=float((labels[:, 0] == labels[:, 1]).mean()) if common else np.nan,
        kappa=_kappa([item[0] for item in common], labels, resamples, seed),
    )


def kappa_of_judges(judges: Mapping[str, Judgements], *, resamples: int = 1_000, seed: int = 0) -> tuple[Interval, int]:
    """Return Fleiss' κ of all judges on what all of them judged, with its interval, and the number of such items."""
    _check_resamples(resamples)
    verdicts = [_verdicts(judge.valid()) for judge in judges.values()]
    common = sorted(set.intersection(*(set(of) for of in verdicts)))
    labels = np.array([[of[item] for of in verdicts] for item in common], int).reshape(-1, len(verdicts))
    return _kappa([item[0] for item in common], labels, resamples, seed), len(common)


def fleiss_kappa(counts: np.ndarray) -> float:
    """Return Fleiss' κ of counts `[items, categories]`: how many judges chose each category, with as many judges per item.

    It is NaN if there is no item, or if all judges always chose the same category.
    """
    if not len(counts):
        return float("nan")
    return float(_kappa_of_sums(_item_agreement(counts).sum(), counts.sum(0, dtype=np.float64), len(counts)))


def _kappa_of_sums(agreement: np.ndarray, categories: np.ndarray, items: np.ndarray | int) -> np.ndarray:
    """Return κ from sums over items: of the agreement of an item `[…]` and of the counts of each category `[…, k]`."""
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = categories / categories.sum(-1, keepdims=True)
        chance = (shares**2).sum(-1)
        return np.where(chance < 1 - 1e-12, (agreement / items - chance) / (1 - chance), np.nan)


def _item_agreement(counts: np.ndarray) -> np.ndarray:
    """Return the share of the pairs of judges that agree on each item `[items]`."""
    judges = counts[0].sum()
    return ((counts**2).sum(1) - judges) / (judges * (judges - 1))


def _kappa(questions: Sequence[str], labels: np.ndarray, resamples: int, seed: int) -> Interval:
    if not questions:
        return Interval(np.nan, np.nan, np.nan)
    counts = _categories(labels)
    asked, question = np.unique(questions, return_inverse=True)
    sums = np.zeros((len(asked), 5))  # of each question: agreement, three categories, items
    np.add.at(sums, question, np.column_stack([_item_agreement(counts), counts, np.ones(len(counts))]))

    def kappa(drawn: np.ndarray) -> np.ndarray:
        totals = drawn @ sums
        return _kappa_of_sums(totals[:, 0], totals[:, 1:4], totals[:, 4])

    low, high = over_questions(kappa, len(asked), resamples=resamples, seed=seed)
    return Interval(fleiss_kappa(counts), float(low), float(high))


def _categories(labels: np.ndarray) -> np.ndarray:
    """Return how many judges chose each of the three verdicts, int `[items, 3]`, from labels `[items, judges]`."""
    return (labels[:, :, None] == np.arange(3)).sum(1)


def _counts(valid: Judgements, points: np.ndarray) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return the points of the first and of the second model by (question, first model, second model)."""
    found: dict[tuple[str, str, str], tuple[float, float]] = {}
    for question, first, second, point in zip(valid.question, valid.first, valid.second, points.tolist(), strict=True):
        key = (valid.questions[question], valid.models[first], valid.models[second])
        a, b = found.get(key, (0.0, 0.0))
        found[key] = (a + point, b + 1 - point)
    return found


def _verdict(a: float, b: float) -> int:
    return 0 if a > b else 1 if a < b else 2


def _verdicts(valid: Judgements) -> _Verdicts:
    """Return the verdicts on the models in the order of their names, with both orders added up."""
    totals: dict[tuple[str, str, str], tuple[float, float]] = {}
    for (question, first, second), (a, b) in _counts(valid, valid.points()).items():
        key, gained = ((question, first, second), (a, b)) if first < second else ((question, second, first), (b, a))
        before = totals.get(key, (0.0, 0.0))
        totals[key] = (before[0] + gained[0], before[1] + gained[1])
    return {key: _verdict(*values) for key, values in totals.items()}


def _judged(valid: Judgements) -> set[str]:
    return {valid.models[index] for index in {*valid.first.tolist(), *valid.second.tolist()}}


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise OptionError(f"resamples: expected at least 1, found {resamples}")
