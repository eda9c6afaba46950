"""Sampling: the same tokens stay as with transformers' logits warpers, and draws follow what stays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.serve import Sampling, sample, warp

SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.5, top_k=7),
    Sampling(temperature=1.0, top_k=10_000),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=2.0, top_p=1.0),
    Sampling(temperature=0.3, top_k=50, top_p=0.55),
]


def warp_with_transformers(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The logits after transformers' own warpers, in the order in which its generate() applies them."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    warpers: list[Any] = [logits_process.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k is not None:
        warpers.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        warpers.append(logits_process.TopPLogitsWarper(sampling.top_p))
    scores = torch.from_numpy(logits)
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


def same(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found)
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_the_same_tokens_stay_as_in_transformers(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 997)).astype(np.float32)
    same(warp(jnp.asarray(logits), sampling), warp_with_transformers(logits, sampling))


@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=8, max_size=8), min_size=1, max_size=3),
    top_k=st.none() | st.integers(1, 10),
    # No sum of probabilities of a few equal logits comes so near to these that rounding would decide.
    top_p=st.none() | st.sampled_from([0.0123, 0.3017, 0.6183, 0.8779, 0.9871]),
)
@settings(max_examples=50, deadline=None)
def test_ties_are_kept_and_dropped_as_in_transformers(rows: list[list[int]], top_k: int | None, top_p: float | None) -> None:
    logits = np.array(rows, np.float32)
    sampling = Sampling(1.0, top_k, top_p)
    found = np.asarray(warp(jnp.asarray(logits), sampling))
    same(found, warp_with_transformers(logits, sampling))
    assert np.isfinite(found).any(axis=1).all()


@pytest.mark.parametrize("logits", [[[0.0] * 6], [[5.0, 5.0, -1.0, 5.0]]])
def test_the_smallest_top_p_keeps_one_token(logits: list[list[float]]) -> None:
    kept = warp(jnp.asarray(logits), Sampling(1.0, top_p=1e-9))
    assert np.isfinite(kept).sum() == 1
    assert kept.max() == max(logits[0])


def test_greedy_takes_the_highest_logit_whatever_the_key() -> None:
    logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, -1.0, 3.0]], jnp.bfloat16)
    for seed in range(3):
        tokens = sample(logits, jax.random.key(seed), Sampling())
        assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(tokens, [1, 0])


def test_the_smallest_temperature_takes_the_highest_logit() -> None:
    """Both logits over it are infinite."""
    assert sample(jnp.array([[10.0, 30.0]]), jax.random.key(0), Sampling(temperature=1e-38)).tolist() == [1]


def test_draws_follow_the_distribution_of_what_stays() -> None:
    logits = jnp.broadcast_to(jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05])), (20_000, 4))
    tokens = np.asarray(sample(logits, jax.random.key(0), Sampling(1.0, top_k=3, top_p=0.8)))
    # 0.15 of 0.95 is less than the 0.2 that may go; 0.3 and 0.5 are left.
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=0.015)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of at least 0, found -0.1"),
        ({"temperature": float("nan")}, "temperature: .* found nan"),
        ({"top_k": 0}, "top_k: expected at least 1, found 0"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1, found 0.0"),
        ({"top_p": 1.1, "top_k": -1}, "top_k: .* found -1; top_p: .* found 1.1"),
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)
