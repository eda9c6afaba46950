"""Elo ratings against plain Python loops, one order and one comparison at a time. (Under a second.)"""

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from judged import tournament, verdict, write

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import Judgements, elo_ratings, read_judgements


def read(tmp_path: Path, rows: list[dict[str, object]]) -> Judgements:
    return read_judgements(write(tmp_path / "verdicts.jsonl", rows), "verdicts")


def played(rows: list[dict[str, object]], k: float = 32.0, start: float = 1000.0) -> dict[str, float]:
    """Return the ratings after the comparisons in this order."""
    ratings = {str(row[name]): start for row in rows for name in ("model_a", "model_b")}
    for row in rows:
        a, b = str(row["model_a"]), str(row["model_b"])
        points = {1: 1.0, 2: 0.0, 3: 0.5}[int(str(row["verdict"]))]
        expected = 1 / (1 + math.pow(10, (ratings[b] - ratings[a]) / 400))
        ratings[a] += k * (points - expected)
        ratings[b] -= k * (points - expected)
    return ratings


def test_the_mean_over_all_orders(tmp_path: Path) -> None:
    """Five comparisons have 120 orders, and 60 of three of them: the exact means, and with all of them the exact bounds."""
    games = [(1, "a", "b", 1), (2, "a", "b", 3), (3, "b", "c", 1), (4, "c", "a", 2), (5, "c", "b", 1)]
    rows = [*(verdict(*game) for game in games), verdict(6, "a", "b", -1)]
    judgements = read(tmp_path, rows)
    for comparisons in (None, 3):
        found = elo_ratings(judgements, orders=20_000, comparisons=comparisons)
        runs = [{"a": 1000.0, "b": 1000.0, "c": 1000.0} | played(list(o)) for o in permutations(rows[:5], comparisons or 5)]
        for model in "abc":
            exact = [run[model] for run in runs]
            assert found.ratings[model].value == pytest.approx(np.mean(exact), abs=3 * found.errors[model])
            assert found.errors[model] == pytest.approx(1.96 * np.std(exact) / math.sqrt(20_000), rel=0.05)
            assert min(exact) <= found.ratings[model].low <= found.ratings[model].high <= max(exact)
        assert found.comparisons == (comparisons or 5)
        assert sum(rating.value for rating in found.ratings.values()) == pytest.approx(3000)


def test_one_comparison_moves_half_of_k(tmp_path: Path) -> None:
    found = elo_ratings(read(tmp_path, [verdict(1, "a", "b", 2)]), orders=3, k_factor=20, start=1500)
    assert {name: rating.value for name, rating in found.ratings.items()} == {"a": 1490.0, "b": 1510.0}
    assert found.ratings["a"].low == found.ratings["a"].high == 1490.0


def test_the_number_of_comparisons(tmp_path: Path) -> None:
    """Without a number a run has 500 comparisons; the means of shorter and longer runs are those of such runs."""
    judgements = read(tmp_path, tournament(questions=50))  # 600
    found = elo_ratings(judgements, orders=2000)
    assert found.comparisons == 500
    assert sorted(found.by_length) == [125, 250, 500, 600]
    assert found.by_length[500] == {name: rating.value for name, rating in found.ratings.items()}
    for length, seed in ((125, 5), (600, 6)):
        alone = elo_ratings(judgements, orders=2000, comparisons=0 if length == 600 else length, seed=seed)
        assert alone.comparisons == length
        for model, mean in found.by_length[length].items():
            assert mean == pytest.approx(alone.ratings[model].value, abs=2.5 * alone.errors[model])
    assert elo_ratings(judgements, orders=500) == elo_ratings(judgements, orders=500)  # the seed is fixed
    assert elo_ratings(judgements, orders=500) != elo_ratings(judgements, orders=500, seed=1)


def test_what_is_wrong(tmp_path: Path) -> None:
    judgements = read(tmp_path, tournament(questions=1))
    with pytest.raises(OptionError, match=r"comparisons: expected at most the 12 verdicts of .*, found 13"):
        elo_ratings(judgements, comparisons=13)
    with pytest.raises(OptionError, match=r"comparisons: .* found -1"):
        elo_ratings(judgements, comparisons=-1)
    with pytest.raises(OptionError, match="orders: expected a positive number, found 0"):
        elo_ratings(judgements, orders=0)
    with pytest.raises(OptionError, match="k_factor: expected a positive number, found 0"):
        elo_ratings(judgements, k_factor=0.0)
    with pytest.raises(OptionError, match="k_factor: expected a positive number, found nan"):
        elo_ratings(judgements, k_factor=float("nan"))
    with pytest.raises(OptionError, match="start: expected a finite number, found inf"):
        elo_ratings(judgements, start=float("inf"))
    rows = [verdict(1, "a", "b", 1), verdict(1, "c", "d", 1), verdict(2, "b", "c", -1)]
    with pytest.raises(DataError, match="found no common questions of a, b with c, d; name the models of one group"):
        elo_ratings(read(tmp_path, rows))
    with pytest.raises(DataError, match="expected verdicts on common questions of b, c, found rows without one only"):
        elo_ratings(read(tmp_path, rows[2:]))
