"""Bradley-Terry ratings against scipy.optimize, which maximises the likelihood written out. (Under a second.)"""

import math
from pathlib import Path

import numpy as np
import pytest
from judged import tournament, verdict, write
from scipy.optimize import minimize

from qlora_jax.errors import OptionError
from qlora_jax.evaluate import bradley_terry, fit_bradley_terry, read_judgements


def peer(wins: np.ndarray) -> np.ndarray:
    """Return the ratings by BFGS on the negative log-likelihood of the wins, then by its own equations to the last digit."""
    models = len(wins)

    def loss(theta: np.ndarray) -> float:
        return float((wins * np.logaddexp(0, theta[None, :] - theta[:, None])).sum() + theta.sum() ** 2)

    theta = minimize(loss, np.zeros(models), method="BFGS", options={"gtol": 1e-9}).x
    for _ in range(20_000):  # Zermelo's iteration
        strength = np.exp(theta)
        new = np.log(wins.sum(1)) - np.log(((wins + wins.T) / (strength[:, None] + strength[None, :])).sum(1))
        new -= new.mean()
        if np.abs(new - theta).max() < 1e-14:
            break
        theta = new
    return 400 / math.log(10) * (theta - theta.mean())


def wins_of(rows: list[dict[str, object]], models: str) -> np.ndarray:
    wins = np.zeros((len(models), len(models)))
    for row in rows:
        a, b = models.index(str(row["model_a"])), models.index(str(row["model_b"]))
        points = {1: 1.0, 2: 0.0, 3: 0.5}[int(str(row["verdict"]))]
        wins[a, b] += points
        wins[b, a] += 1 - points
    return wins


@pytest.mark.parametrize(("seed", "models"), [(0, "ab"), (1, "abcd"), (2, "abcdefgh")])
def test_the_maximum_of_the_likelihood(tmp_path: Path, seed: int, models: str) -> None:
    rows = tournament(seed, models=models)
    judgements = read_judgements(write(tmp_path / "f.jsonl", [*rows, verdict(1, "a", "b", -1)]))
    found = bradley_terry(judgements, resamples=50)
    assert found.ratings is not None
    values = np.array([found.ratings[model].value for model in models])
    np.testing.assert_allclose(values - 1000, peer(wins_of(rows, models)), atol=1e-6)
    assert values.mean() == pytest.approx(1000)


def test_two_models_have_a_closed_form() -> None:
    for share in (0.5, 0.75, 0.999, 1e-6):
        wins = 1000 * np.array([[0, share], [1 - share, 0]])
        expected = 400 * math.log10(share / (1 - share))
        np.testing.assert_allclose(fit_bradley_terry(wins[None])[0], [expected / 2, -expected / 2], rtol=1e-6, atol=1e-9)


def test_without_a_finite_maximum(tmp_path: Path) -> None:
    """A model that wins everything has no finite rating; neither have two groups of which one wins everything."""
    rows = [verdict(q, a, b, v) for q in range(2) for a, b, v in (("a", "b", 1), ("b", "c", 1), ("c", "b", 1))]
    judgements = read_judgements(write(tmp_path / "f.jsonl", rows))
    assert bradley_terry(judgements).ratings is None
    tables = np.stack([wins_of(rows, "abc"), wins_of([*rows, verdict(9, "c", "a", 3)], "abc")])
    found = fit_bradley_terry(tables)  # each table by itself
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1], peer(tables[1]), atol=1e-6)
    with pytest.raises(OptionError, match="resamples: expected at least 1"):
        bradley_terry(judgements, resamples=0)


def test_resampled_questions(tmp_path: Path) -> None:
    """The bounds are those of separate fits of resampled questions; resamples without a maximum are counted."""
    rows = tournament(3, questions=30, models="abc")
    judgements = read_judgements(write(tmp_path / "f.jsonl", rows))
    found = bradley_terry(judgements, resamples=200)
    draws, fits = np.random.default_rng(1), []
    for _ in range(200):
        chosen = [row for q in draws.integers(0, 30, 30) for row in rows if row["question_id"] == q]
        fits.append(fit_bradley_terry(wins_of(chosen, "abc")[None])[0])
    low, high = 1000 + np.percentile(fits, [2.5, 97.5], axis=0)
    assert found.ratings is not None
    for place, rating in enumerate(found.ratings.values()):
        assert (rating.low, rating.high) == pytest.approx((low[place], high[place]), abs=15)
    few = read_judgements(write(tmp_path / "f.jsonl", [verdict(q, "a", "b", 1 + (q == 3)) for q in range(4)]))
    assert bradley_terry(few).undefined == pytest.approx(0.75**4 + 0.25**4, abs=0.05)
