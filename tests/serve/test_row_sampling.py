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
