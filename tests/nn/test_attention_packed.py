"""Attention of packed rows by parts, with a plain kernel in place of cuDNN's; what cuDNN is told, against JAX's own calls.

The module takes about 12 CPU-seconds, and 25 with the integration tests.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from tiers import tiered

from qlora_jax.nn import attention_packed
from qlora_jax.nn.attention_packed import packed_attention


def scores_of(q: Any, k: Any, lengths: Any, scale: float, causal: bool) -> Any:
    """Return float32 `[b, heads, t, s]`, -inf where a pair is not computed."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * scale
    rows, columns = jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    queries, keys = (x[:, None, None, None] for x in lengths)
    mask = (rows < queries) & (columns < keys) & ((columns <= rows) | (not causal))
    return jnp.where(mask, scores, -jnp.inf)


def plain_attention(q: Any, k: Any, v: Any, lengths: Any, *, scale: float, causal: bool) -> Any:
    """The kernel's forward pass by its definition; what is undefined is NaN."""
    assert all(x.dtype == jnp.int32 for x in lengths)
    scores = scores_of(q, k, lengths, scale, causal)
    logs = jax.nn.logsumexp(scores, axis=-1)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    valid = jnp.arange(q.shape[1]) < lengths[0][:, None]
    out = jnp.einsum("bhts,bshd->bthd", jnp.exp(scores - logs[..., None]).astype(v.dtype), v)
    return jnp.where(valid[..., None, None], out, jnp.nan).astype(q.dtype), jnp.where(valid[:, None], logs, jnp.nan)


def plain_gradients(q: Any, k: Any, v: Any, saved: Any, lengths: Any, *, scale: float, causal: bool) -> Any:
    out, logs, gradient = saved
    group = q.shape[2] // k.shape[2]
    weights = jnp.exp(scores_of(q, k, lengths, scale, causal) - logs[..., None])
    values = jnp.repeat(v, group, axis=2)
    delta = jnp.einsum("bthd,bthd->bht", gradient, out, preferred_element_type=jnp.float32)
    dweights = jnp.einsum("bthd,bshd->bhts", gradient, values, preferred_element_type=jnp.float32)
    dscores = (weights * (dweights - delta[..., None]) * scale).astype(q.dtype)
    dq = jnp.einsum("bhts,bshd->bthd", dscores, jnp.repeat(k, group, axis=2))
    dk = jnp.einsum("bhts,bthd->bshd", dscores, q)
    dv = jnp.einsum("bhts,bthd->bshd", weights.astype(v.dtype), gradient)
    dk, dv = (x.reshape(*k.shape[:3], group, -1).sum(3).astype(k.dtype) for x in (dk, dv))
    queries, keys = (jnp.arange(x.shape[1]) < n[:, None] for x, n in zip((q, k), lengths, strict=True))
    dq = jnp.where(queries[..., None, None], dq, jnp.nan)
    dk, dv = (jnp.where(keys[..., None, None], x, jnp.nan) for x in (dk, dv))
    return dq, dk, dv


@pytest.fixture
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_packed, "flash_attention", plain_attention)
    monkeypatch.setattr(attention_packed, "flash_gradients", plain_gradients)


def documents(length: int, rows: int = 2) -> np.ndarray:
    """Return int32 `[rows, length]`: documents from one token to half of the row, padding at the end of the first row."""
    generator = np.random.default_rng(length)
    ids = np.zeros((rows, length), np.int32)
    for row in ids:
        start, number = 0, 1
        while start < length:
            stop = start + int(np.exp(generator.uniform(0, np.log(length / 2))))
            row[start:stop], start, number = number, stop, number + 1
    ids[0, length - length // 7 :] = 0
    return ids


def exact(q: Any, k: Any, v: Any, ids: np.ndarray, window: int | None, shared: int) -> Any:
    """Return attention in float64 by its definition; the result of padding is 0."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    rows, columns = np.arange(length)[:, None], np.arange(length)
    same = (ids[:, :, None] == ids[:, None]) | (columns < shared)
    mask = (columns <= rows) & (columns > rows - (window or length)) & same & (ids > 0)[:, :, None]
    return q, np.repeat(k, group, 2), np.repeat(v, group, 2), mask[:, None]


def exact_attention(operands: Any, gradient: np.ndarray, kv_heads: int) -> tuple[np.ndarray, ...]:
    q, k, v, mask = operands
    scores = np.where(mask, np.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5, -1e300)
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bhts,bshd->bthd", weights, v)
    dweights = np.einsum("bthd,bshd->bhts", gradient, v)
    dscores = weights * (dweights - np.sum(weights * dweights, -1, keepdims=True)) * q.shape[-1] ** -0.5
    dk, dv = np.einsum("bhts,bthd->bshd", dscores, q), np.einsum("bhts,bthd->bshd", weights, gradient)
    dk, dv = (x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3]).sum(3) for x in (dk, dv))
    return out, np.einsum("bhts,bshd->bthd", dscores, k), dk, dv


CASES = {
    # length, window, shared, heads, kv_heads, head_dim, dtype
    "two leaves": (200, None, 0, 2, 2, 16, "float32"),
    "1000 tokens": (1000, None, 0, 2, 1, 8, "float32"),
    "window": (700, 201, 0, 2, 1, 8, "float32"),
    "window, one leaf": (300, 130, 0, 2, 1, 8, "float32"),
    "shared": (330, None, 7, 2, 1, 8, "float32"),
    "1001 tokens, window": (1001, 300, 0, 4, 2, 16, "float32"),
    "bfloat16": (700, None, 0, 4, 2, 64, "bfloat16"),
    "bfloat16, window": (1001, 300, 0, 4, 2, 64, "bfloat16"),
    "heads one by one": (520, None, 3, 4, 2, 16, "float32"),
}


@pytest.mark.usefixtures("plain_kernel")
@pytest.mark.parametrize("case", tiered(CASES, quick=("two leaves", "window", "shared")))
def test_parts_add_up(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, window, shared, heads, kv_heads, head_dim, dtype = CASES[case]
    if case == "heads one by one":
        monkeypatch.setattr(attention_packed, "_AT_ONCE", 1)
    generator, ids = np.random.default_rng(0), documents(length)
    if shared:
        ids[:, :shared] = ids[:, shared : shared + 1]
    q, k, v, weight = (
        jnp.asarray(generator.standard_normal((2, length, n, head_dim), np.float32) * 2, dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    weight = jnp.where((ids > 0)[..., None, None], weight, 0)  # no loss is learned on padding

    def attend(q: Any, k: Any, v: Any) -> Any:
        return packed_attention(
            q, k, v, jnp.asarray(ids), window=window, scale=head_dim**-0.5, shared=shared
        )

    out, gradients = value_and_pullback(attend, (q, k, v), lambda _: weight)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    operands = exact(q, k, v, ids, window, shared)
    expected = exact_attention(operands, np.asarray(weight, np.float64), kv_heads)
    found = (np.where((ids > 0)[..., None, None], np.asarray(out, np.float64), 0), *gradients)
    for ours, wanted in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < (4e-3 if dtype == "bfloat16" else 2e-6)
