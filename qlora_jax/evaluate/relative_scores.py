"""Scores of models relative to a reference model (Dettmers et al. 2023, arXiv 2305.14314, Table 6).

A judge gives scores to two answers, one of them the reference model's. For each of the two orders

    s = Σ scores of the model / Σ scores of the reference        over the questions that the judge gave scores for

and the relative score is the mean of both orders, in percent. The pooled score is the same ratio over the rows of both
orders at once, which weighs the orders by the reference's scores. The two differ if the reference's scores depend on its
position, or if rows of one order have no scores. The paper's reference is ChatGPT (gpt-3.5), of which Guanaco 65B reaches
99.3 %. The interval resamples questions (`bootstrap`).
"""

from dataclasses import dataclass

import numpy as np

from qlora_jax.errors import DataError, OptionError, list_names
from qlora_jax.evaluate.bootstrap import over_questions
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judgements import Judgements, check_known

__all__ = ["RelativeScore", "models_without_scores", "reference_of", "relative_scores"]

_DEFAULT = "gpt-3.5"  # the paper's reference, for files in which two models could be the reference


@dataclass(frozen=True)
class RelativeScore:
    """The relative score of a model, in percent.

    Attributes:
        relative: the score and its interval, whose bounds are NaN with fewer than two questions.
        orders: the score with the reference's answer shown first, and shown second; NaN: that order was not judged.
        pooled: the ratio of the sums over both orders.
        rows: number of rows that count.
        left_out: number of rows without scores.
    """

    relative: Interval
    orders: tuple[float, float]
    pooled: float
    rows: int
    left_out: int


def reference_of(judgements: Judgements, name: str | None = None) -> str:
    """Return the name of the reference: the given one, or the one model that is part of every row.

    Raises:
        OptionError: the given name is not in the file.
        DataError: no model is in every row, or two are and none of them is gpt-3.5.
    """
    if name is not None:
        check_known([name], judgements.models, judgements.source, "reference")
        return name
    always = [
        model
        for index, model in enumerate(judgements.models)
        if ((judgements.first == index) | (judgements.second == index)).all()
    ]
    if len(always) == 1:
        return always[0]
    if _DEFAULT in always:
        return _DEFAULT
    found = " and ".join(always) if always else "none"
    raise DataError(
        f"{judgements.source}: expected one model that is part of every row, found {found}; name it with --reference"
    )


def relative_scores(
    judgements: Judgements, reference: str, *, resamples: int = 10_000, seed: int = 0
) -> dict[str, RelativeScore]:
    """Return the relative score of each model but the reference, the highest first.

    Models without a relative score are left out; `models_without_scores` returns them.

    Args:
        judgements: scores; rows without the reference are ignored.
        reference: the model that the others are relative to.
        resamples, seed: number and seed of the resamples of the interval.

    Raises:
        OptionError: `resamples` is not positive.
        DataError: no model is left.
    """
    if resamples < 1:
        raise OptionError(f"resamples: expected at least 1, found {resamples}")
    missing = models_without_scores(judgements, reference)
    models = [model for model in judgements.models if model != reference and model not in missing]
    if not models:
        found_instead = list_names([f"{model} ({reason})" for model, reason in missing.items()]) or f"{reference} only"
        raise DataError(
            f"{judgements.source}: expected scores of models in rows with {reference}, found {found_instead}; "
            "choose others with --models or --reference"
        )
    found = {model: _relative(judgements, model, reference, resamples, seed) for model in models}
    return dict(sorted(found.items(), key=lambda item: -item[1].relative.value))


def models_without_scores(judgements: Judgements, reference: str) -> dict[str, str]:
    """Return the models that have no score relative to the reference, and why."""
    found = {}
    for model in judgements.models:
        if model == reference:
            continue
        rows = _rows(judgements, model, reference)
        valid = rows.valid()
        if not len(rows):
            found[model] = f"no rows with {reference}"
        elif not len(valid):
            found[model] = f"rows with {reference}, but no scores in them"
        elif not all(scores.any() for scores in _reference_scores(valid, reference)):
            found[model] = f"scores of {reference} that are zeros only"
    return found


def _rows(judgements: Judgements, model: str, reference: str) -> Judgements:
    ours, theirs = judgements.models.index(model), judgements.models.index(reference)
    first, second = judgements.first, judgements.second
    return judgements.rows(((first == ours) & (second == theirs)) | ((first == theirs) & (second == ours)))


def _reference_scores(valid: Judgements, reference: str) -> list[np.ndarray]:
    """Return the reference's scores in each order that has rows."""
    at = valid.models.index(reference)
    scores = [valid.values[valid.first == at, 0], valid.values[valid.second == at, 1]]
    return [one for one in scores if len(one)]


def _relative(judgements: Judgements, model: str, reference: str, resamples: int, seed: int) -> RelativeScore:
    rows = _rows(judgements, model, reference)
    valid = rows.valid()
    asked, question = np.unique(valid.question, return_inverse=True)
    sums = np.zeros((2, 2, len(asked)))  # by order, by model and reference, by question
    order = (valid.first == judgements.models.index(model)).astype(int)
    ours, theirs = np.where(order == 1, valid.values.T, valid.values.T[::-1])
    np.add.at(sums[:, 0], (order, question), ours)
    np.add.at(sums[:, 1], (order, question), theirs)
    judged = [index for index in range(2) if (order == index).any()]

    def relative(drawn: np.ndarray) -> np.ndarray:  # [n, questions] -> [n]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = (drawn @ sums[judged, 0].T) / (drawn @ sums[judged, 1].T)
        return 100 * np.where(np.isfinite(ratios).all(1), ratios.mean(1), np.nan)

    low, high = over_questions(relative, len(asked), resamples=resamples, seed=seed)
    with np.errstate(invalid="ignore"):
        orders = 100 * sums[:, 0].sum(-1) / sums[:, 1].sum(-1)
    value = float(relative(np.ones((1, len(asked))))[0])
    totals = sums.sum((0, 2))
    return RelativeScore(
        relative=Interval(value, float(low), float(high)),
        orders=(float(orders[0]), float(orders[1])),
        pooled=float(100 * totals[0] / totals[1]),
        rows=len(valid),
        left_out=rows.left_out,
    )
