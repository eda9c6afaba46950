"""Attention of packed rows by parts, with a plain kernel in place of cuDNN's; what cuDNN is told, against JAX's own calls.

The module takes about 4 CPU-seconds, and 14 with the integration tests.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from tiers import tiered

from qlora_jax.nn import AttentionTarget, attention_packed, causal_attention, shifted_group_attention
from qlora_jax.nn.attention_cudnn import flash_attention, flash_gradients
from qlora_jax.nn.attention_packed import heads_at_once, packed_attention

HOPPER = AttentionTarget("gpu", (9, 0))


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


def exact_operands(q: Any, k: Any, v: Any, ids: np.ndarray, window: int | None, shared: int) -> Any:
    """Return (q, k, v, mask) in float64, each head with its keys; padding attends to nothing."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    rows, columns = np.arange(length)[:, None], np.arange(length)
    same = (ids[:, :, None] == ids[:, None]) | (columns < shared)
    mask = (columns <= rows) & (columns > rows - (window or length)) & same & (ids > 0)[:, :, None]
    return q, np.repeat(k, group, 2), np.repeat(v, group, 2), mask[:, None]


def exact_attention(operands: Any, gradient: np.ndarray, kv_heads: int) -> tuple[np.ndarray, ...]:
    """Return the result and the gradients of q, k and v by their definition."""
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
    "window": (300, 130, 0, 2, 1, 8, "float32"),
    "shared, heads one by one": (330, None, 7, 4, 2, 8, "float32"),
    "1001 tokens": (1001, None, 0, 2, 1, 8, "float32"),
    "bfloat16, window": (600, 250, 0, 4, 2, 64, "bfloat16"),
}


@pytest.mark.usefixtures("plain_kernel")
@pytest.mark.parametrize("case", tiered(CASES, quick=("window",)))
def test_parts_add_up(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, window, shared, heads, kv_heads, head_dim, dtype = CASES[case]
    if "one by one" in case:
        monkeypatch.setattr(attention_packed, "_SMALL", 1)
        monkeypatch.setattr(attention_packed, "_AT_ONCE", 1)
    generator, ids = np.random.default_rng(0), documents(length)
    if shared:
        ids[:, :shared] = ids[:, shared : shared + 1]
    q, k, v, weight = (
        jnp.asarray(generator.standard_normal((2, length, n, head_dim), np.float32), dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    weight = jnp.where((ids > 0)[..., None, None], weight, 0)  # no loss is learned on padding

    def attend(q: Any, k: Any, v: Any) -> Any:
        return packed_attention(q, k, v, jnp.asarray(ids), window=window, scale=head_dim**-0.5, shared=shared)

    out, gradients = value_and_pullback(attend, (q, k, v), lambda _: weight)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    operands = exact_operands(q, k, v, ids, window, shared)
    expected = exact_attention(operands, np.asarray(weight, np.float64), kv_heads)
    found = (np.where((ids > 0)[..., None, None], np.asarray(out, np.float64), 0), *gradients)
    for ours, wanted in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - wanted) / np.linalg.norm(wanted)
        assert error < (4e-3 if dtype == "bfloat16" else 2e-6)


@pytest.mark.usefixtures("plain_kernel")
@pytest.mark.integration
def test_groups_of_longlora() -> None:
    """On a GPU's target: the numbers of XLA's attention, to which both round in bfloat16."""
    generator, ids = np.random.default_rng(0), jnp.asarray(documents(500))
    q, k, v = (jnp.asarray(generator.standard_normal((2, 500, n, 28), np.float32), "bfloat16") for n in (4, 2, 2))

    def attend(target: AttentionTarget) -> Any:
        def function(q: Any, k: Any, v: Any) -> Any:
            return shifted_group_attention(q, k, v, 2, segment_ids=ids, target=target)

        return value_and_pullback(function, (q, k, v), lambda _: jnp.where((ids > 0)[..., None, None], q, 0))

    (found, found_gradients), (wanted, gradients) = attend(HOPPER), attend(AttentionTarget())
    found, wanted = (jnp.where((ids > 0)[..., None, None], x, 0) for x in (found, wanted))
    for ours, theirs in zip((found, *found_gradients), (wanted, *gradients), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.linalg.norm(ours - theirs) < 8e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_is_told_what_jax_tells_it(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets, configuration, operands and layouts of both calls, letter by letter."""
    from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn

    monkeypatch.setattr(jax_cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(jax_cudnn, "check_compute_capability", lambda _: True)

    def theirs(q: Any, k: Any, v: Any, queries: Any, keys: Any, gradient: Any) -> Any:
        def attend(*x: Any) -> Any:
            lengths = {"query_seq_lengths": queries, "key_value_seq_lengths": keys}
            return jax.nn.dot_product_attention(*x, scale=0.3, is_causal=causal, implementation="cudnn", **lengths)

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(gradient)

    def ours(q: Any, k: Any, v: Any, queries: Any, keys: Any, gradient: Any) -> Any:
        out, logs = flash_attention(q, k, v, (queries, keys), scale=0.3, causal=causal)
        return out, flash_gradients(q, k, v, (out, logs, gradient), (queries, keys), scale=0.3, causal=causal)

    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 128, 4, 64), (2, 256, 2, 64)))
    numbers = jax.ShapeDtypeStruct((2,), jnp.int32)

    def calls(function: Any) -> list[str]:
        lowered = jax.jit(function).trace(q, k, k, numbers, numbers, q).lower(lowering_platforms=("cuda",))
        found = re.findall(r"custom_call (@__cudnn.*)", lowered.as_text())
        return [re.sub(r"%(?!arg)\w+(#\d)?", "%", call) for call in found]

    assert calls(ours) == calls(theirs)
    assert [call.split("(")[0] for call in calls(ours)] == ["@__cudnn$fmhaSoftmax", "@__cudnn$fmhaSoftmaxBackward"]


@pytest.mark.parametrize(("length", "window"), [(1024, None), (8192, 4096)])
def test_nothing_grows_with_the_square(length: int, window: int | None) -> None:
    """No array of the program, forward or backward, is larger than the queries or the scores of the leaves."""

    def loss(q: Any, k: Any, v: Any, ids: Any) -> Any:
        return causal_attention(q, k, v, segment_ids=ids, window=window, target=HOPPER).astype(jnp.float32).sum()

    q, ids = jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, length), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q, ids)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    sizes = [np.prod([*map(int, dims.split("x"))]) for dims in re.findall(r"tensor<((?:\d+x)*\d+)x[a-z]+\d+>", text)]
    assert max(sizes) <= 2 * length * 128 * 129 / 128
    assert len(re.findall(r"call @__cudnn\$fmhaSoftmaxBackward\(", text)) == np.log2(length / 128)
    assert "ScaleBias" not in text


def test_the_heads_of_long_rows_are_computed_a_few_at_a_time() -> None:
    assert heads_at_once(8192, 32, 8, 128, 2) == 8
    assert heads_at_once(32768, 32, 8, 128, 2) == 1
    assert heads_at_once(16384, 32, 32, 128, 2) == 8
    assert heads_at_once(2**20, 12, 3, 128, 2) == 1
