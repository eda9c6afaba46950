"""Attention against a plain NumPy one; the kernels of the platforms as their compilers take them."""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from tiers import tiered

from qlora_jax.nn import (
    AttentionTarget,
    attention_target,
    biased_attention,
    cached_attention,
    causal_attention,
    relative_attention,
    with_prefix,
)
from qlora_jax.nn.attention import scores_at_once
from qlora_jax.nn.attention_masks import CausalRows, KeyRows, Mask
from qlora_jax.nn.attention_target import Kernel, choose_kernel
from qlora_jax.nn.attention_tiles import tiled_attention

HOPPER, AMPERE, TPU = AttentionTarget("gpu", (9, 0)), AttentionTarget("gpu", (8, 0)), AttentionTarget("tpu")


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


@pytest.mark.optimised
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


@pytest.mark.optimised
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


@pytest.mark.optimised
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


@pytest.mark.optimised
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


@pytest.mark.optimised
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


@pytest.mark.optimised
def test_cached() -> None:
    q, k, v = random_qkv(length=2, past=7)
    mask = np.random.default_rng(1).random((2, 2, 9)) < 0.6
    mask[..., 0] = True
    attended = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lambda numbers: jnp.asarray(mask)[:, numbers])
    np.testing.assert_allclose(attended, reference(q, k, v, mask), atol=1e-5)


def test_cached_with_more_queries_than_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as all at once, where the last block is not full."""
    monkeypatch.setattr("qlora_jax.nn.attention.QUERIES_AT_ONCE", 4)
    q, k, v = random_qkv(length=11, past=7)
    mask = np.random.default_rng(1).random((2, 11, 18)) < 0.6
    mask[..., 0] = True
    attended = cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lambda numbers: jnp.asarray(mask)[:, numbers])
    np.testing.assert_allclose(attended, reference(q, k, v, mask), atol=1e-5)


def test_float32_and_short_sequences_fall_back_to_xla() -> None:
    q, k, v = random_qkv()
    expected = causal_attention(q, k, v)
    for target in (HOPPER, TPU):
        np.testing.assert_array_equal(causal_attention(q, k, v, target=target), expected)


@pytest.mark.parametrize(("segmented", "window", "cap"), [(False, None, None), (True, None, None), (True, 100, 30.0)])
def test_splash_lowers_for_tpu_with_its_gradient(segmented: bool, window: int | None, cap: float | None) -> None:
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 256), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        out = causal_attention(q, k, v, segment_ids=ids if segmented else None, window=window, cap=cap, target=TPU)
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


def test_splash_takes_odd_lengths_of_virtual_tokens() -> None:
    q, kv = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))
    prefix = jax.ShapeDtypeStruct((20, 2, 64), jnp.bfloat16)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, prefix: jax.Array) -> jax.Array:
        out = causal_attention(*with_prefix(q, k, v, (prefix, prefix)), shared=20, target=TPU)
        return out[:, 20:].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).trace(q, kv, kv, prefix)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") >= 2


# (target, head size, length, dtype, further conditions) and the kernel, with the length and the head size that it is given.
CHOICES: list[tuple[AttentionTarget, int, int, str, dict[str, Any], Kernel]] = [
    (HOPPER, 128, 1024, "bfloat16", {}, Kernel("cudnn", 1024, 128)),
    (HOPPER, 128, 4097, "bfloat16", {"segmented": True}, Kernel("cudnn", 4097, 128)),
    (HOPPER, 60, 1001, "bfloat16", {"segmented": True, "window": 129}, Kernel("cudnn", 1001, 64)),
    (HOPPER, 128, 1001, "bfloat16", {"segmented": True, "window": 128}, Kernel("blocks", 1001, 128)),
    (HOPPER, 128, 1001, "bfloat16", {"segmented": True, "window": 300, "shared": 4}, Kernel("blocks", 1001, 128)),
    (HOPPER, 128, 128, "bfloat16", {"segmented": True}, Kernel("blocks", 128, 128)),
    (HOPPER, 128, 100, "bfloat16", {"window": 50}, Kernel("cudnn", 128, 128)),
    (HOPPER, 128, 4097, "bfloat16", {}, Kernel("cudnn", 4224, 128)),
    (HOPPER, 128, 4160, "bfloat16", {}, Kernel("cudnn", 4224, 128)),  # cuDNN can return NaN for 64 keys more than n · 128
    (AMPERE, 128, 4097, "bfloat16", {}, Kernel("cudnn", 4160, 128)),
    (HOPPER, 256, 1024, "bfloat16", {}, Kernel("cudnn", 1024, 256)),
    (AMPERE, 256, 1024, "bfloat16", {}, Kernel("blocks", 1024, 256)),
    (AttentionTarget("gpu", (8, 9)), 256, 1001, "bfloat16", {}, Kernel("blocks", 1001, 256)),
    (AttentionTarget("gpu", (10, 0)), 256, 1024, "bfloat16", {}, Kernel("blocks", 1024, 256)),
    (AttentionTarget("gpu", (12, 0)), 128, 64, "float16", {}, Kernel("cudnn", 64, 128)),
    (AttentionTarget("gpu", (7, 5)), 64, 64, "float16", {}, Kernel("blocks", 64, 64)),
    (AttentionTarget("gpu"), 64, 64, "bfloat16", {}, Kernel("blocks", 64, 64)),  # of another vendor
    (AMPERE, 60, 10, "bfloat16", {}, Kernel("cudnn", 64, 64)),
    (AMPERE, 64, 1024, "float32", {}, Kernel("blocks", 1024, 64)),
    (HOPPER, 64, 1024, "bfloat16", {"cap": 50.0}, Kernel("blocks", 1024, 64)),
    (TPU, 256, 1001, "bfloat16", {"cap": 50.0, "segmented": True}, Kernel("splash", 1024, 256)),
    (TPU, 80, 640, "float32", {}, Kernel("splash", 768, 128)),
    (TPU, 64, 300, "bfloat16", {"shared": 20}, Kernel("splash", 384, 64)),
    (TPU, 64, 300, "bfloat16", {"shared": 20, "segmented": True}, Kernel("blocks", 300, 64)),
    (TPU, 64, 100, "bfloat16", {}, Kernel("blocks", 100, 64)),
    (TPU, 1024, 1024, "float32", {}, Kernel("blocks", 1024, 1024)),
    (AttentionTarget(), 64, 1024, "bfloat16", {}, Kernel("blocks", 1024, 64)),
]


@pytest.mark.parametrize(("target", "head_dim", "length", "dtype", "more", "expected"), CHOICES)
def test_the_kernel_is_chosen_by_target_and_shape(
    target: AttentionTarget, head_dim: int, length: int, dtype: str, more: dict[str, Any], expected: Kernel
) -> None:
    """The limits are those of NVIDIA's cudnn-frontend for the backward pass."""
    assert choose_kernel(target, head_dim=head_dim, length=length, dtype=dtype, **more) == expected


def test_targets() -> None:
    assert [attention_target(name) for name in ("cpu", "gpu", "cuda", "tpu")] == [AttentionTarget(), AMPERE, AMPERE, TPU]
    assert attention_target(HOPPER) is HOPPER
    assert attention_target() == attention_target(jax.default_backend()) or jax.default_backend() == "gpu"


# (length, window, cap, whether there are segments, head size, dtype)
TILED = {
    "segments": (201, None, None, True, 16, "float32"),
    "window and cap": (130, 70, 5.0, False, 24, "float32"),
    "64": (64, None, None, False, 64, "float32"),
    "1000": (1000, 100, None, True, 80, "float32"),
    "1001": (1001, None, 50.0, True, 256, "float32"),
    "bfloat16": (1001, 200, None, True, 128, "bfloat16"),
}


@pytest.mark.optimised
@pytest.mark.parametrize("case", tiered(TILED, quick=("segments", "window and cap")))
def test_tiles(case: str) -> None:
    """Values and gradients of the tiled attention against the textbook's formula by autodiff, by the norm of the difference:
    1e-5 in float32, 4e-3 in bfloat16, whose values have 8 bits."""
    length, window, cap, segmented, head_dim, dtype = TILED[case]
    draws = np.random.default_rng(length)
    shapes = ((1, length, heads, head_dim) for heads in (4, 2, 2))
    rounded = tuple(jnp.asarray(draws.standard_normal(shape, np.float32), dtype) for shape in shapes)
    ids = jnp.asarray(np.sort(draws.integers(1, 4, (1, length)), axis=1).astype(np.int32)) if segmented else None
    rows, columns = np.arange(length)[:, None], np.arange(length)
    seen = (columns <= rows) & (columns > rows - (window or length))
    mask = jnp.asarray(seen[None]) if ids is None else seen & ((ids[:, :, None] == ids[:, None]) | (columns < 3))

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = head_dim**-0.5 * jnp.einsum("bthd,bshd->bhts", q, k)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf)), v)

    def tiled(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        visible = Mask(CausalRows(window, 0 if ids is None else 3), ids)
        largest = 64 if length < 256 else 256
        return tiled_attention(q, k, v, visible, scale=head_dim**-0.5, cap=cap, largest_tile=largest)

    out, gradients = value_and_pullback(tiled, rounded, lambda out: jnp.sin(out.astype(jnp.float32)).astype(out.dtype))
    back = jnp.sin(out.astype(jnp.float32)).astype(dtype).astype(jnp.float32)
    exact = tuple(x.astype(jnp.float32) for x in rounded)
    expected, expected_gradients = value_and_pullback(plain, exact, lambda _: back)
    for a, b in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= (1e-5 if dtype == "float32" else 4e-3) * np.linalg.norm(b)


def test_long_rows_take_linear_memory() -> None:
    """No array of the program, forward or backward, is larger than the queries or the scores of a tile."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return causal_attention(q, k, v, cap=2.0, target=HOPPER).sum()

    q = jax.ShapeDtypeStruct((1, 8192, 2, 64), jnp.float32)
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q).as_text()
    sizes = [math.prod(map(int, dims.split("x"))) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]+\d+>", text)]
    assert max(sizes) == 2 * 8192 * 64
    assert scores_at_once(8192, HOPPER) == (512, 512)


@pytest.mark.optimised
@pytest.mark.parametrize("before", [None, 30])
def test_tiles_with_a_bias_of_distances(before: int | None) -> None:
    """The values and gradients of the same bias and mask, spread out over all queries and keys."""
    draws = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draws.standard_normal((2, length, 4, 8), np.float32)) for length in (100, 130, 130))
    bias, keys = jnp.asarray(draws.standard_normal((4, 229), np.float32)), jnp.asarray(draws.random((2, 130)) < 0.7)
    keys = keys.at[:, 0].set(True)
    rows, columns = np.arange(100)[:, None], np.arange(130)
    mask = keys[:, None] & jnp.asarray(columns <= rows + (130 if before is None else before))

    def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return biased_attention(q, k, v, mask, bias[:, columns - rows + 99], scale=0.3)

    def tiled(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return tiled_attention(q, k, v, Mask(KeyRows(before), keys), scale=0.3, distance_bias=bias, largest_tile=64)

    def short(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return relative_attention(q, k, v, keys, bias, scale=0.3, before=before)

    out, expected = value_and_pullback(dense, (q, k, v), jnp.sin)
    for function in (tiled, short):
        found, gradients = value_and_pullback(function, (q, k, v), lambda _: jnp.sin(out))
        for a, b in zip((found, *gradients), (out, *expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
