"""Attention against a plain NumPy one; the kernels of the platforms as their compilers take them."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback

from qlora_jax.nn import biased_attention, cached_attention, causal_attention, default_implementation, with_prefix


def reference(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One batch row and one head after the other; mask `[b, t, s]`."""
    batch, length, heads, head_dim = q.shape
    group, out = heads // k.shape[2], np.zeros_like(q)
    for b, h in np.ndindex(batch, heads):
        scores = q[b, :, h] @ k[b, :, h // group].T / np.sqrt(head_dim)
        scores = np.where(mask[b], scores, -np.inf)
        for t in range(length):
            if mask[b, t].any():
                weights = np.exp(scores[t] - scores[t].max())
                out[b, t, h] = weights / weights.sum() @ v[b, :, h // group]
    return out


def random_qkv(length: int = 11, past: int = 0, kv_heads: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    q = generator.standard_normal((2, length, 4, 8), np.float32)
    k, v = (generator.standard_normal((2, length + past, kv_heads, 8), np.float32) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal(kv_heads: int) -> None:
    q, k, v = random_qkv(kv_heads=kv_heads)
    mask = np.broadcast_to(np.tril(np.ones((11, 11), bool)), (2, 11, 11))
    np.testing.assert_allclose(causal_attention(q, k, v), reference(q, k, v, mask), atol=1e-5)


def test_segments_see_themselves_and_padding_stays_finite() -> None:
    q, k, v = random_qkv()
    segments = np.array([[1, 1, 1, 2, 2, 3, 3, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    mask = same & np.tril(np.ones((11, 11), bool))
    found = np.asarray(causal_attention(q, k, v, segment_ids=jnp.asarray(segments)))
    assert np.isfinite(found).all()
    real = segments > 0
    np.testing.assert_allclose(found[real], reference(q, k, v, mask)[real], atol=1e-5)


@pytest.mark.parametrize(("window", "shared"), [(None, 0), (100, 0), (200, 3)])
@pytest.mark.parametrize("segmented", [False, True])
def test_blocks_of_queries(segmented: bool, window: int | None, shared: int) -> None:
    """More tokens than one block has, with what a block leaves out: the numbers of all scores at once."""
    q, k, v = random_qkv(length=300)
    rows, columns = np.arange(300)[:, None], np.arange(300)
    seen = (columns <= rows) & (columns > rows - (window or 300))
    segments = np.sort(np.random.default_rng(1).integers(1, 4, (2, 300)), axis=1).astype(np.int32)
    same = (segments[:, :, None] == segments[:, None, :]) | (columns < shared)
    mask = seen & (same if segmented else np.ones((2, 1, 1), bool))
    ids = jnp.asarray(segments) if segmented else None

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, segment_ids=ids, window=window, shared=shared if segmented else 0)

    def at_once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return biased_attention(q, k, v, jnp.asarray(mask), None, scale=8**-0.5)

    out, gradients = value_and_pullback(ours, (q, k, v), jnp.sin)
    np.testing.assert_allclose(out, reference(q, k, v, mask), atol=1e-5)
    _, expected = value_and_pullback(at_once, (q, k, v), lambda _: jnp.sin(out))
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_blocks_in_bfloat16_add_their_gradients_in_float32() -> None:
    """The gradients of keys and values of 8 blocks are as near to the exact ones as those of all scores at once."""
    seen = jnp.tril(jnp.ones((1024, 1024), bool))[None]

    def at_once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return biased_attention(q, k, v, seen, None, scale=8**-0.5)

    rounded = tuple(jnp.asarray(x, jnp.bfloat16) for x in random_qkv(length=1024))
    exact = tuple(x.astype(jnp.float32) for x in rounded)
    out, wanted = value_and_pullback(at_once, exact, lambda out: jnp.sin(out).astype(jnp.bfloat16).astype(jnp.float32))
    back = jnp.sin(out).astype(jnp.bfloat16)

    def errors(function: Any) -> list[float]:
        _, found = value_and_pullback(function, rounded, lambda _: back)
        pairs = zip(found, wanted, strict=True)
        return [float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs]

    for ours, plain in zip(errors(causal_attention), errors(at_once), strict=True):
        assert ours < 1.1 * plain


def test_blocks_make_fewer_products() -> None:
    """Of n blocks (n + 1) / 2n, by the sizes of all products of the lowered program."""
    q = jax.ShapeDtypeStruct((1, 1024, 2, 64), jnp.float32)
    text = jax.jit(causal_attention).lower(q, q, q).as_text()
    shapes = re.findall(r"dot_general.*-> tensor<2x(\d+)x(\d+)xf32>", text)
    scores = sum(int(queries) * int(keys) for queries, keys in shapes if int(keys) != 64)
    assert scores == 1024 * 1024 * 9 / 16


@pytest.mark.parametrize(("window", "cap"), [(3, None), (None, 1.5), (4, 1.5), (11, None), (1, None)])
def test_window_scale_and_cap_with_gradients(window: int | None, cap: float | None) -> None:
    """Values and gradients against the textbook's formula by autodiff."""
    q, k, v = (jnp.asarray(x) for x in random_qkv())
    distance = np.arange(11)[:, None] - np.arange(11)
    seen = (distance >= 0) & (distance < (window or 99))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = 0.4 * jnp.einsum("bthd,bshd->bhts", q, k)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, window=window, scale=0.4, cap=cap)

    out, gradients = value_and_pullback(ours, (q, k, v), jnp.sin)
    expected, expected_gradients = value_and_pullback(plain, (q, k, v), lambda _: jnp.sin(out))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("rows", ["one for all", "one a query"])
@pytest.mark.parametrize("biased", [True, False])
def test_bias_with_gradients(kv_heads: int, rows: str, biased: bool) -> None:
    """A bias of each head and a mask over other tokens than the queries, against the textbook's formula by autodiff."""
    q, k, v = (jnp.asarray(x) for x in random_qkv(past=5, kv_heads=kv_heads))
    draws = np.random.default_rng(1)
    bias = jnp.asarray(draws.standard_normal((4, 11, 16), np.float32)) if biased else None
    mask = draws.random((2, 1 if rows == "one for all" else 11, 16)) < 0.6
    mask[..., 0] = True

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 4 // kv_heads, axis=2) for x in (k, v))
        scores = 0.7 * jnp.einsum("bthd,bshd->bhts", q, k)
        scores = scores if bias is None else scores + bias[None]
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return biased_attention(q, k, v, jnp.asarray(mask), bias, scale=0.7)

    out, gradients = value_and_pullback(ours, (q, k, v), jnp.sin)
    expected, expected_gradients = value_and_pullback(plain, (q, k, v), lambda _: jnp.sin(out))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_cached() -> None:
    q, k, v = random_qkv(length=2, past=7)
    mask = np.random.default_rng(1).random((2, 2, 9)) < 0.6
    mask[..., 0] = True
    attended = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    np.testing.assert_allclose(attended, reference(q, k, v, mask), atol=1e-5)


def test_float32_and_short_sequences_fall_back_to_xla() -> None:
    q, k, v = random_qkv()
    expected = causal_attention(q, k, v)
    for implementation in ("cudnn", "splash"):
        np.testing.assert_array_equal(causal_attention(q, k, v, implementation=implementation), expected)


@pytest.mark.parametrize(("segmented", "window", "cap"), [(False, None, None), (True, None, None), (True, 100, 30.0)])
def test_splash_lowers_for_tpu_with_its_gradient(segmented: bool, window: int | None, cap: float | None) -> None:
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        out = causal_attention(
            q, k, v, segment_ids=ids if segmented else None, window=window, cap=cap, implementation="splash"
        )
        return out.astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, ids)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 2, "a kernel forward and one or two backward"


@pytest.mark.parametrize("segmented", [False, True])
def test_keys_before_all_others(segmented: bool) -> None:
    """Every token sees them, whatever its segment; and the padding to lengths that kernels want changes nothing."""
    (q, k, v), (_, keys, values) = random_qkv(length=9), random_qkv(length=3)
    prefix = keys[0], values[0]
    ids = jnp.asarray([[1] * 4 + [2] * 5] * len(q), jnp.int32)
    all_ids = jnp.pad(ids, ((0, 0), (3, 0)), constant_values=1)
    attend = partial(
        causal_attention,
        *with_prefix(*map(jnp.asarray, (q, k, v)), prefix),  # pyright: ignore[reportArgumentType]
        segment_ids=all_ids if segmented else None,
        shared=3,
    )
    before = (np.broadcast_to(x, (len(q), *x.shape)) for x in prefix)
    same = np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None, :]
    mask = np.tril(np.ones((9, 9), bool))[None] & (same if segmented else True)
    mask = np.concatenate([np.ones((len(q), 9, 3), bool), np.broadcast_to(mask, (len(q), 9, 9))], -1)
    k, v = (np.concatenate(pair, 1) for pair in zip(before, (k, v), strict=True))
    np.testing.assert_allclose(attend()[:, 3:], reference(q, k, v, mask), atol=1e-5)
    for implementation in ("cudnn", "splash"):  # padded, then XLA's for float32
        np.testing.assert_allclose(attend(implementation=implementation)[:, 3:], reference(q, k, v, mask), atol=1e-5)


def test_splash_takes_odd_lengths_of_virtual_tokens() -> None:
    q, kv = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    prefix = jax.ShapeDtypeStruct((20, 2, 64), jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, prefix: jax.Array) -> jax.Array:
        out = causal_attention(*with_prefix(q, k, v, (prefix, prefix)), shared=20, implementation="splash")
        return out[:, 20:].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, kv, kv, prefix)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 2


@pytest.mark.parametrize(("platform", "expected"), [("cpu", "xla"), ("gpu", "cudnn"), ("tpu", "splash")])
def test_default_implementation(platform: str, expected: str) -> None:
    assert default_implementation(platform) == expected
