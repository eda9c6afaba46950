"""Rotary positions: what a rotation has to satisfy, and which configurations are refused. (Every scaling is
compared with transformers in tests/models/test_llama.py.)"""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn import RMSNorm, RotaryEmbedding, rotate


def embedding(**scaling: object) -> RotaryEmbedding:
    return RotaryEmbedding.from_config(16, 100.0, 64, scaling)


def test_scores_depend_on_distance_alone() -> None:
    generator = np.random.default_rng(0)
    q, k = (jnp.asarray(generator.standard_normal((1, 1, 1, 16), np.float32)) for _ in range(2))

    def score(at: int, other: int) -> float:
        turned = [rotate(x, *embedding()(jnp.asarray([[position]]))) for x, position in ((q, at), (k, other))]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)


def test_rotation_is_that_of_complex_numbers() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 16), np.float32)
    positions = np.arange(10, dtype=np.int32).reshape(2, 5)
    turned = np.asarray(rotate(jnp.asarray(x), *embedding()(jnp.asarray(positions))))
    angles = positions[..., None] * 100.0 ** (-np.arange(8) / 8)
    expected = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)


def test_rotation_keeps_the_dtype() -> None:
    cosine, sine = embedding()(jnp.arange(5)[None])
    assert (cosine.dtype, cosine.shape) == (jnp.float32, (1, 5, 8))
    assert rotate(jnp.ones((1, 5, 2, 16), jnp.bfloat16), cosine, sine).dtype == jnp.bfloat16


def test_bfloat16_is_rounded_once() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 50, 2, 16)), jnp.bfloat16)
    cosine, sine = embedding()(jnp.arange(50)[None])
    exact = np.asarray(rotate(x.astype(jnp.float32), cosine, sine), np.float64)
    found = np.asarray(rotate(x, cosine, sine), np.float64)
    assert (np.abs(found - exact) <= 2**-8 * np.abs(exact)).all()


def test_refused_configurations() -> None:
    with pytest.raises(ValueError, match="rope_type 'mrope' is not supported; expected one of default, linear"):
        embedding(rope_type="mrope")
    with pytest.raises(ValueError, match="'llama3' needs the fields factor, high_freq_factor, original_max"):
        embedding(rope_type="llama3", low_freq_factor=1.0)


def test_root_mean_square_norm() -> None:
    norm, x = RMSNorm(8, eps=1e-3), np.random.default_rng(0).standard_normal((3, 8), np.float32)
    norm.weight.set_value(jnp.arange(8.0))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
