"""Blocks in 8 bits: the maps against bitsandbytes', the codes against a search for the nearest value."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import dequantize_blockwise, dynamic_map, quantize_blockwise, tracing_for
from qlora_jax.quant.dynamic import lookup_dynamic


@pytest.fixture
def on_tpu() -> Iterator[None]:
    """Runs the forms that TPUs get on whatever there is."""
    with tracing_for("tpu"):
        yield


@pytest.mark.parametrize("signed", [True, False])
def test_the_maps_are_those_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    table = functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_array_equal(dynamic_map(signed), table)
    np.testing.assert_array_equal(lookup_dynamic(jnp.arange(256, dtype=jnp.uint8), signed), table)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.usefixtures("on_tpu")
def test_the_closed_form_is_the_map(signed: bool) -> None:
    found = lookup_dynamic(jnp.arange(256, dtype=jnp.uint8), signed)
    np.testing.assert_allclose(found, dynamic_map(signed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_the_search_on_tpu_finds_the_same(signed: bool, request: pytest.FixtureRequest) -> None:
    x = np.random.default_rng(0).random((3, 300), np.float32) - 0.5 * signed
    expected = quantize_blockwise(jnp.asarray(x), signed=signed)
    request.getfixturevalue("on_tpu")
    np.testing.assert_array_equal(quantize_blockwise(jnp.asarray(x), signed=signed).codes, expected.codes)


@pytest.mark.optimised
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (256,), (257,), (3, 5, 100), (16, 64)])
def test_the_nearest_value_is_taken(shape: tuple[int, ...], signed: bool) -> None:
    draws = np.random.default_rng(0)
    x = (draws.standard_normal(shape) * 10.0 ** draws.uniform(-6, 0, shape)).astype(np.float32)
    x = x if signed else np.abs(x)
    q = jax.jit(quantize_blockwise, static_argnames="signed")(x, signed=signed)
    assert (q.codes.shape, q.codes.dtype) == (shape, jnp.uint8)
    assert q.absmax.shape == (-(-x.size // 256),)
    absmax = np.array([np.abs(x.reshape(-1)[start : start + 256]).max() for start in range(0, x.size, 256)])
    np.testing.assert_array_equal(q.absmax, absmax)
    each = np.repeat(absmax, 256)[: x.size]
    values = dynamic_map(signed).astype(np.float64)[None, :] * each[:, None]
    nearest = values[np.arange(x.size), np.abs(values - x.reshape(-1, 1)).argmin(1)]
    np.testing.assert_allclose(np.asarray(dequantize_blockwise(q)).reshape(-1), nearest, rtol=1e-6)


def test_zeros_stay_zeros() -> None:
    for signed in (True, False):
        q = quantize_blockwise(jnp.zeros((3, 100)), signed=signed)
        assert not np.asarray(dequantize_blockwise(q)).any()
