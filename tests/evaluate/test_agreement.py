"""Agreement against scipy's Kendall τ, the published example of Fleiss' κ, and values by hand. (Under a second.)"""

from pathlib import Path

import numpy as np
import pytest
from judged import score, tournament, verdict, write
from scipy.stats import kendalltau

from qlora_jax.errors import DataError
from qlora_jax.evaluate import (
    Judgements,
    fleiss_kappa,
    kappa_of_judges,
    kendall_tau,
    pair_agreement,
    read_judgements,
    self_agreement,
    split_by_judge,
)
from qlora_jax.evaluate.rankings import difference_sums, least_squares


def read(tmp_path: Path, rows: list[dict[str, object]]) -> Judgements:
    return read_judgements(write(tmp_path / "judgements.jsonl", rows))


def test_kendall_tau_is_that_of_scipy() -> None:
    x, y = np.random.default_rng(0).integers(0, 4, (2, 50, 6)).astype(np.float64)
    x[0] = 1  # all ties
    found = kendall_tau(x, y)
    assert np.isnan(found[0])
    np.testing.assert_allclose(found[1:], [kendalltau(a, b).statistic for a, b in zip(x[1:], y[1:], strict=True)])
    x[1, 2] = np.nan
    assert kendall_tau(x, y)[1] == pytest.approx(kendalltau(np.delete(x[1], 2), np.delete(y[1], 2)).statistic)


def test_fleiss_kappa() -> None:
    """14 raters, 10 subjects and 5 categories: the example that is usually printed, with κ = 0.210."""
    counts = """0 0 0 0 14 | 0 2 6 4 2 | 0 0 3 5 6 | 0 3 9 2 0 | 2 2 8 1 1 |
                7 7 0 0 0 | 3 2 6 3 0 | 2 5 3 2 2 | 6 5 2 1 0 | 0 2 2 3 7"""
    table = np.array([[int(n) for n in row.split()] for row in counts.split("|")])
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa(np.array([[2, 0], [0, 2]])) == 1
    assert fleiss_kappa(np.array([[1, 1], [1, 1]])) == -1
    assert np.isnan(fleiss_kappa(np.array([[2, 0], [2, 0]])))
    assert np.isnan(fleiss_kappa(np.zeros((0, 3), int)))


def test_position_bias(tmp_path: Path) -> None:
    rows = [
        *(verdict(1, "a", "b", 1), verdict(1, "b", "a", 1)),  # the first answer both times
        *(verdict(2, "a", "b", 1), verdict(2, "b", "a", 2)),  # a both times
        *(verdict(3, "a", "b", 3), verdict(3, "b", "a", 1)),
        *(verdict(4, "a", "b", 3), verdict(4, "b", "a", 3)),
        *(verdict(5, "a", "b", 2), verdict(5, "b", "a", -1)),  # one order only
    ]
    found = self_agreement(read(tmp_path, rows))
    assert (found.rows, found.left_out, found.both_orders) == (9, 1, 4)
    assert (found.first, found.second, found.tie) == pytest.approx((4 / 9, 2 / 9, 3 / 9))
    assert found.bias.value == pytest.approx(2 / 9)
    assert found.bias.low < 2 / 9 < found.bias.high
    assert (found.consistent, found.same_position) == (0.5, 0.25)
    # The verdicts on a by order: better, worse | better, better | tie, worse | tie, tie
    assert found.kappa == pytest.approx(fleiss_kappa(np.array([[1, 1, 0], [2, 0, 0], [0, 1, 1], [0, 0, 2]])))
    assert self_agreement(read(tmp_path, rows[-2:])).both_orders == 0
    with pytest.raises(DataError, match="expected judgements, found rows without one only"):
        self_agreement(read(tmp_path, rows[-1:]))
    with pytest.raises(DataError, match="expected judgements between the models a, found no rows; name two or more"):
        self_agreement(read(tmp_path, rows).between(["a"]))


def test_a_judge_agrees_with_itself_and_not_with_its_opposite(tmp_path: Path) -> None:
    rows = tournament(models="abcde")
    opposite = [row | {"verdict": {1: 2, 2: 1, 3: 3}[row["verdict"]]} for row in rows]
    judges = {"x": read(tmp_path, rows), "same": read(tmp_path, rows), "opposite": read(tmp_path, opposite)}
    same = pair_agreement(judges, "x", "same")
    assert (same.system_tau.value, same.example_tau, same.same, same.kappa.value) == pytest.approx((1, 1, 1, 1))
    assert (same.items, same.examples) == (60, 6)
    other = pair_agreement(judges, "x", "opposite")
    assert (other.system_tau.value, other.example_tau) == pytest.approx((-1, -1))
    assert other.kappa.low <= other.kappa.value <= other.kappa.high < 1
    assert other.same < 1
    kappa, items = kappa_of_judges(judges)
    assert (items, other.kappa.value < kappa.value < 1) == (60, True)
    assert kappa_of_judges({name: judges[name] for name in ("x", "same")})[0].value == 1


def test_scores_against_verdicts(tmp_path: Path) -> None:
    """The scores rank m > r > n, also on each question; the verdicts r > m > n."""
    scores = [score(q, "r", model, 5, value) for q in (1, 2) for model, value in (("m", 6), ("n", 3))]
    verdicts = [verdict(q, "r", "m", 1) for q in (1, 2, 3)] + [verdict(q, "n", "m", 2) for q in (1, 2)]
    verdicts += [verdict(q, "n", "r", 2) for q in (1, 2)] + [verdict(1, "x", "m", 1)]
    judges = {"scores": read(tmp_path, scores), "verdicts": read(tmp_path, verdicts)}
    found = pair_agreement(judges, "scores", "verdicts")
    assert found.models == ("m", "n", "r")
    assert (found.system_tau.value, found.example_tau) == pytest.approx((1 / 3, 1 / 3))
    assert (found.items, found.same) == (4, 0.5)  # r against m: worse and better; r against n: better by both


def test_least_squares_ratings(tmp_path: Path) -> None:
    """Differences from a reference, whoever else the reference was compared with; lstsq's solution for any design."""
    judgements = read(tmp_path, [score(1, "r", "a", 5, 6), score(1, "r", "b", 9, 2), score(1, "b", "r", 2, 7)])
    found = least_squares(*difference_sums(judgements, judgements.models, judgements.questions))[0]
    np.testing.assert_allclose(found - found[2], [1, -6, 0])
    judgements = read(tmp_path, tournament(questions=1)[:7])
    counts, sums = difference_sums(judgements, judgements.models, judgements.questions)
    design = np.eye(4)[judgements.first] - np.eye(4)[judgements.second]
    difference = judgements.values[:, 0] - judgements.values[:, 1]
    expected = np.linalg.lstsq(design, difference, rcond=None)[0]
    np.testing.assert_allclose(least_squares(counts, sums)[0], expected, atol=1e-8)
    judgements = read(tmp_path, [verdict(1, "a", "b", 1), verdict(1, "c", "d", 1)])  # two groups
    assert np.isnan(least_squares(*difference_sums(judgements, judgements.models, judgements.questions))).all()


def test_what_judges_must_have_in_common(tmp_path: Path) -> None:
    judges = {"x": read(tmp_path, [verdict(1, "a", "b", 1)]), "y": read(tmp_path, [verdict(1, "b", "c", 1)])}
    with pytest.raises(
        DataError, match="x and y: expected judgements of the same models, at least two, found a, b and b, c"
    ):
        pair_agreement(judges, "x", "y")
    judges["y"] = read(tmp_path, [verdict(2, "a", "b", 1), verdict(1, "a", "b", -1)])
    with pytest.raises(DataError, match="x and y: expected judgements of the same questions, found no common questions"):
        pair_agreement(judges, "x", "y")


def test_judges_of_one_file(tmp_path: Path) -> None:
    rows = [
        {**verdict(1, "a", "b", 1), "judge": "ann"},
        {**verdict(1, "a", "b", 2), "judge": "ben"},
        verdict(1, "a", "b", 3),
    ]
    found = split_by_judge(read(tmp_path, rows), "file")
    assert {name: judge.points().tolist() for name, judge in found.items()} == {"file": [0.5], "ann": [1], "ben": [0]}
    assert kappa_of_judges(found)[1] == 1
