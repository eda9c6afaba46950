"""The settings of rows as arrays, against those of a whole batch, which are compared with transformers; 2 CPU-seconds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.serve import Sampling, warp
from qlora_jax.serve.request import Choices
from qlora_jax.serve.row_sampling import Draws, RowSettings, all_allowed, empty_memory, sample_rows

VOCABULARY, DRAWS = 40, 400
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.7},
    {"temperature": 0.0, "top_k": 5},
)


def test_each_row_draws_from_the_distribution_of_its_own_settings() -> None:
    """Side by side; no draw is outside the tokens that remain, and all of them are drawn about as often as they should."""
    rows = len(SETTINGS)
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 2, (rows, VOCABULARY)), jnp.float32)
    settings = RowSettings.of([(Choices(**fields, seed=7), row, False) for row, fields in enumerate(SETTINGS)], VOCABULARY)
    memory, every, allowed = empty_memory(rows, VOCABULARY), np.arange(rows), all_allowed(rows, VOCABULARY)

    @jax.jit
    def draw(steps: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda step: sample_rows(logits, memory, settings, Draws(every, jnp.full(rows, step), allowed))[0].token, steps
        )

    drawn = np.asarray(draw(jnp.arange(DRAWS)))
    for row, fields in enumerate(SETTINGS):
        found = np.bincount(drawn[:, row], minlength=VOCABULARY) / DRAWS
        if fields["temperature"] == 0:
            assert found[int(logits[row].argmax())] == 1
            continue
        expected = np.asarray(jax.nn.softmax(warp(logits[row : row + 1], Sampling(**fields)))[0])
        assert not found[expected == 0].any()
        np.testing.assert_allclose(found, expected, atol=4 * 0.5 / DRAWS**0.5)


def test_tiny_temperatures_and_limits_choose_the_likeliest_token_that_is_allowed() -> None:
    """Where logits over the temperature would be infinite; beside a row of NaN, and where a grammar allows little."""
    settings: list[dict[str, Any]] = [
        {"temperature": 1e-9},
        {"temperature": 1e-38},
        {"temperature": 1e-42},
        {"temperature": 2.0, "top_k": 1},
        {"temperature": 2.0, "top_p": 1e-12},
        {"temperature": 2.0, "min_p": 1.0},
        {"temperature": 1e-38, "top_k": 3, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.9},
    ]
    rows = len(settings)
    logits = np.random.default_rng(1).normal(0, 9, (rows, VOCABULARY)).astype(np.float32) + 20
    logits[-1] = np.nan
    masks = np.random.default_rng(2).random((rows, VOCABULARY)) < 0.3
    bits = np.packbits(np.pad(masks, ((0, 0), (0, -VOCABULARY % 32))), axis=1, bitorder="little").view(np.int32)
    of_rows = RowSettings.of([(Choices(**fields, seed=3), row, False) for row, fields in enumerate(settings)], VOCABULARY)
    for allowed, own in ((all_allowed(rows, VOCABULARY), logits), (bits, np.where(masks, logits, -np.inf))):
        draws = Draws(np.arange(rows), np.zeros(rows, np.int32), allowed)
        drawn, _ = jax.jit(sample_rows)(jnp.asarray(logits), empty_memory(rows, VOCABULARY), of_rows, draws)
        np.testing.assert_array_equal(np.asarray(drawn.token)[:-1], own[:-1].argmax(-1))
