"""Rotary positions: what a rotation has to satisfy, and which configurations are refused. (Every scaling is
compared with transformers in tests/models/test_llama.py.)"""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import QLoRAError
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


@pytest.mark.optimised
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


@pytest.mark.optimised
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


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 8,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}


def rotations(rope: RotaryEmbedding, *positions: int) -> np.ndarray:
    """`[2, 32, 8]`: cosine and sine of a row of 32 positions, padded as the batches of training are."""
    row = [*positions, *[0] * (32 - len(positions))]
    return np.stack(rope(jnp.asarray([row], jnp.int32)))[:, 0]


@pytest.mark.parametrize("scaling", [LONGROPE, DYNAMIC])
def test_each_text_has_the_frequencies_of_its_own_length(scaling: dict[str, object]) -> None:
    """Packed into one row with a longer text, and followed by padding."""
    rope = RotaryEmbedding.from_config(16, 100.0, 8, scaling)
    short, long = range(6), range(20)
    alone = rotations(rope, *short)[:, :6], rotations(rope, *long)[:, :20]
    np.testing.assert_allclose(alone[0], rotations(embedding(), *short)[:, :6], atol=1e-6)
    assert np.abs(alone[0] - alone[1][:, :6]).max() > 0.1
    packed = rotations(rope, *short, *long, *short)
    for start, expected in ((0, alone[0]), (6, alone[1]), (26, alone[0])):
        np.testing.assert_array_equal(packed[:, start : start + expected.shape[1]], expected)


def test_given_lengths_count() -> None:
    rope = RotaryEmbedding.from_config(16, 100.0, 8, LONGROPE)
    whole = np.stack(rope(jnp.arange(20)[None]))[:, :, :6]
    np.testing.assert_array_equal(np.stack(rope(jnp.arange(6)[None], jnp.asarray([[20]]))), whole)


def test_how_long_rotations_last() -> None:
    plain, longrope = embedding(), RotaryEmbedding.from_config(16, 100.0, 64, LONGROPE)
    dynamic = RotaryEmbedding.from_config(16, 100.0, 8, DYNAMIC)
    assert [plain.lasts(length) for length in (1, 10**6)] == [None, None]
    assert [longrope.lasts(length) for length in (1, 8, 9, 100)] == [8, 8, None, None]
    assert [dynamic.lasts(length) for length in (1, 8, 9, 100)] == [8, 8, 9, 100]


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_older_names_of_longrope(name: str) -> None:
    fields = {key: value for key, value in LONGROPE.items() if key != "rope_type"}
    assert embedding(**fields, type=name) == embedding(**LONGROPE)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": ["linear"]}, "is not supported"),
        ({"rope_type": "linear", "factor": "2"}, "factor: expected a number above 0, found 2"),
        ({"rope_type": "linear", "factor": 0}, "factor: expected a number above 0, found 0"),
        ({"rope_type": "dynamic", "factor": float("inf")}, "factor: expected a number above 0, found inf"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": None, "beta_slow": True}, "beta_slow: expected a number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64.0}, "expected a whole number above 1"),
        (LONGROPE | {"long_factor": [1.0] * 7}, "long_factor: expected 8 numbers above 0"),
        (LONGROPE | {"short_factor": 1.0}, "short_factor: expected 8 numbers above 0"),
        (LONGROPE | {"short_factor": [0.0] * 8}, "short_factor: expected 8 numbers above 0"),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "expected low_freq_factor below high_freq_factor",
        ),
    ],
)
def test_numbers_out_of_bounds(scaling: dict[str, object], expected: str) -> None:
    with pytest.raises(QLoRAError, match=expected):
        embedding(**scaling)


def test_root_mean_square_norm() -> None:
    norm, x = RMSNorm(8, eps=1e-3), np.random.default_rng(0).standard_normal((3, 8), np.float32)
    norm.weight.set_value(jnp.arange(8.0))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-3) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
