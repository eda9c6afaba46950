"""One model against another by one metric, over the same texts, questions or documents of a task.

    value    the metric of a model, with the interval of resamples of the units
    change   perplexity: ours / theirs - 1, in percent; share: ours - theirs, in percent of the questions

Judged answers are shares too: the mean points of a model's answers to a question against others, of 1, ½ or 0.

The units are resampled together for both models (a paired bootstrap): what is hard for both cancels, so that the interval
of a change is much narrower than those of the two values suggest. A change is a "drift" where a model should be as the other
one (quantised and dense, merged and not merged), and a "gain" where it should be better (an adapter and its base).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from qlora_jax.errors import DataError, list_names
from qlora_jax.evaluate.bootstrap import over_questions
from qlora_jax.evaluate.intervals import Interval
from qlora_jax.evaluate.judgements import Judgements
from qlora_jax.evaluate.perplexity import Perplexity, compare_perplexities

__all__ = ["Change", "Measured", "Share", "change_of", "judged_points", "value_of", "verdict_of"]


@dataclass(frozen=True)
class Share:
    """A mean over units that are right or wrong, or have points from 0 to 1.

    Attributes:
        points: float64 `[units]`.
    """

    points: np.ndarray


Measured = Perplexity | Share


@dataclass(frozen=True)
class Change:
    """What a model changes of another.

    Attributes:
        kind: "drift" or "gain"; see the module.
        interval: the change, with its bounds.
        unit: "%" of the other's perplexity, or "points" of a share in percent.
        lower_is_better: whether the metric is.
    """

    kind: Literal["drift", "gain"]
    interval: Interval
    unit: str
    lower_is_better: bool


def value_of(measured: Measured, *, resamples: int, seed: int) -> Interval:
    """Return the perplexity, or the share in percent, with its interval."""
    if isinstance(measured, Perplexity):
        return measured.perplexity(resamples=resamples, seed=seed)
    return _mean(100 * measured.points, resamples, seed)


def change_of(
    ours: Measured, theirs: Measured, kind: Literal["drift", "gain"], *, resamples: int = 1_000, seed: int = 0
) -> Change:
    """Return what a model changes of another.

    Raises:
        DataError: the two were measured by different metrics, or on different texts or questions.
    """
    if isinstance(ours, Perplexity) and isinstance(theirs, Perplexity):
        return Change(kind, compare_perplexities(ours, theirs, resamples=resamples, seed=seed), "%", True)
    if not (isinstance(ours, Share) and isinstance(theirs, Share) and ours.points.shape == theirs.points.shape):
        raise DataError("a change: expected two models that were measured on the same questions, found others")
    return Change(kind, _mean(100 * (ours.points - theirs.points), resamples, seed), "points", False)


def verdict_of(change: Change) -> str:
    """Return what an interval says: "better", "worse", or that no difference can be seen."""
    low, high = change.interval.low, change.interval.high
    if math.isnan(low):
        return "too few to tell"
    if low <= 0 <= high:
        return "no difference seen"
    return "better" if (high < 0) == change.lower_is_better else "worse"


def _mean(values: np.ndarray, resamples: int, seed: int) -> Interval:
    low, high = over_questions(lambda drawn: drawn @ values / len(values), len(values), resamples=resamples, seed=seed)
    return Interval(float(values.mean()), float(low), float(high))


def judged_points(judgements: Judgements, names: Mapping[str, str]) -> dict[str, Share]:
    """Return the points of models on each question that all of them were judged on, by the names of a table.

    A better answer has 1 point, a worse one 0, a tie ½; of a model's comparisons on a question, the mean counts.

    Args:
        judgements: scores or verdicts.
        names: the models in the judgements, by their names in the table; those that are not in it are left out.

    Raises:
        DataError: none of the models is in the file, or there is no question that all of them were judged on.
    """
    valid = judgements.valid()
    present = {name: valid.models.index(model) for name, model in names.items() if model in valid.models}
    if not present:
        expected, found = list_names(list(names.values())), list_names(valid.models)
        raise DataError(f"{judgements.source}: expected judgements of {expected}, found {found}")
    points = np.nan_to_num(valid.points())
    sums, counts = np.zeros((2, len(valid.models), len(valid.questions)))
    for models, gained in ((valid.first, points), (valid.second, 1 - points)):
        np.add.at(sums, (models, valid.question), gained)
        np.add.at(counts, (models, valid.question), 1.0)
    indices = list(present.values())
    common = (counts[indices] > 0).all(0)
    if not common.any():
        raise DataError(
            f"{judgements.source}: expected a question that all of {list_names(list(present))} answered, found none"
        )
    return {name: Share(sums[index, common] / counts[index, common]) for name, index in present.items()}
