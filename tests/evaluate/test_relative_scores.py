"""Relative scores against values that were calculated by hand, and intervals with the properties of a bootstrap. (0.2 s)"""

from pathlib import Path

import numpy as np
import pytest
from judged import score, write

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import Judgements, models_without_scores, read_judgements, reference_of, relative_scores

# Model "m": 8 of 10 with the reference shown first, 9 of 12 with it shown second; question 3 has no scores in one order.
ROWS = [
    score(1, "gpt-3.5", "m", 6, 5),
    score(2, "gpt-3.5", "m", 4, 3),
    score(3, "gpt-3.5", "m", -1, -1),
    score(1, "m", "gpt-3.5", 2, 4),
    score(2, "m", "gpt-3.5", 3, 5),
    score(3, "m", "gpt-3.5", 4, 3),
]


def read(tmp_path: Path, rows: list[dict[str, object]]) -> Judgements:
    return read_judgements(write(tmp_path / "scores.jsonl", rows), "scores")


def test_sums_of_each_order_and_their_mean(tmp_path: Path) -> None:
    judgements = read(tmp_path, ROWS)
    assert reference_of(judgements) == "gpt-3.5"
    found = relative_scores(judgements, "gpt-3.5", resamples=2000)["m"]
    assert found.orders == pytest.approx((80.0, 75.0))
    assert found.relative.value == pytest.approx(77.5)
    assert found.pooled == pytest.approx(100 * (8 + 9) / (10 + 12))
    assert (found.rows, found.left_out) == (5, 1)
    assert found.relative.low < 77.5 < found.relative.high
    assert relative_scores(judgements, "gpt-3.5", resamples=2000)["m"] == found  # the seed is fixed
    assert relative_scores(judgements, "m")["gpt-3.5"].orders == pytest.approx((100 * 12 / 9, 100 * 10 / 8))


def test_intervals_cover_what_a_second_sample_gives(tmp_path: Path) -> None:
    """The width is that of the ratio's standard error by the delta method; constant ratios have no width."""
    draws = np.random.default_rng(0)
    theirs, ours = draws.uniform(6, 10, 80), draws.uniform(4, 10, 80)
    rows = [score(q, "gpt-3.5", "m", theirs[q], ours[q]) for q in range(80)]
    rows += [score(q, "gpt-3.5", "half", theirs[q], theirs[q] / 2) for q in range(80)]
    found = relative_scores(read(tmp_path, rows), "gpt-3.5")
    ratio = ours.sum() / theirs.sum()
    error = 100 * (ours - ratio * theirs).std(ddof=1) / np.sqrt(80) / theirs.mean()
    interval = found["m"].relative
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(error, rel=0.05)
    assert (found["half"].relative.low, found["half"].relative.high) == pytest.approx((50, 50))
    assert np.isnan(found["m"].orders[1])  # the other order was not judged


def test_one_question_has_no_interval(tmp_path: Path) -> None:
    found = relative_scores(read(tmp_path, [score(1, "a", "b", 2, 1)]), "a")["b"].relative
    assert found.value == 50
    assert np.isnan([found.low, found.high]).all()


def test_which_model_is_the_reference(tmp_path: Path) -> None:
    two = read(tmp_path, [score(1, "a", "b", 2, 1)])
    with pytest.raises(DataError, match="expected one model that is part of every row, found a and b; name it with --ref"):
        reference_of(two)
    assert reference_of(two, "b") == "b"
    with pytest.raises(OptionError, match=r"reference: expected models of .* \(a, b\), found 'gpt-4'"):
        reference_of(two, "gpt-4")
    with pytest.raises(DataError, match="part of every row, found none"):
        reference_of(read(tmp_path, [score(1, "a", "b", 2, 1), score(1, "c", "d", 2, 1)]))


def test_models_without_scores_are_left_out(tmp_path: Path) -> None:
    rows = [score(1, "r", "a", 2, 1), score(1, "a", "none", 1, 2), score(1, "empty", "r", -1, -1)]
    rows += [score(1, "r", "zero", 0, 2), score(1, "zero", "r", 1, 1)]
    judgements = read(tmp_path, rows)
    assert list(relative_scores(judgements, "r")) == ["a"]
    assert models_without_scores(judgements, "r") == {
        "empty": "rows with r, but no scores in them",
        "none": "no rows with r",
        "zero": "scores of r that are zeros only",
    }
    with pytest.raises(DataError, match="expected scores of models in rows with r, found r only"):
        relative_scores(judgements.between(["r"]), "r")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [score(1, "r", "a", -1, -1)],
            r"found a \(rows with r, but no scores in them\); .* --models or --ref",
        ),
        ([score(1, "r", "a", 0, 2), score(2, "r", "a", 0, 2)], r"found a \(scores of r that are zeros only\)"),
    ],
)
def test_nothing_to_divide_by(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        relative_scores(read(tmp_path, rows), "r")
    with pytest.raises(OptionError, match="resamples: expected at least 1, found 0"):
        relative_scores(read(tmp_path, rows), "r", resamples=0)
