"""Shifted sparse attention: who sees whom, over every pair; equal to dense attention with that mask; what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from flax import nnx

from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import AttentionTarget, causal_attention, shifted_group_attention
from qlora_jax.train import language_model_loss

CONFIG: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def build() -> CausalLM:
    def make() -> CausalLM:
        return CausalLM(llama_config(CONFIG), rngs=nnx.Rngs(0))

    return nnx.merge(nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: nnx.state(make()))())


def reach(length: int, size: int, segments: np.ndarray | None = None, window: int | None = None) -> np.ndarray:
    """bool `[2, t, s]`: whether token t sees token s in the plain and in the shifted half of the heads, by the definition:
    the same group, or after a shift by half a group the same group with both tokens on one side of the wrap."""
    place = np.arange(length)
    late = (place + size // 2) // size  # the end of the shifted sequence is no group with its start
    seen = np.stack([group[:, None] == group[None, :] for group in (place // size, late)])
    seen &= place[:, None] >= place[None, :]
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    return seen if segments is None else seen & (segments[:, None] == segments[None, :])


def random_qkv(length: int, heads: int, kv_heads: int) -> list[jax.Array]:
    draws = np.random.default_rng(0)
    return [jnp.asarray(draws.standard_normal((2, length, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(
    ("length", "groups", "heads", "kv_heads", "window", "packed"),
    [
        (16, 4, 4, 2, None, False),
        (16, 4, 4, 2, None, True),
        (16, 2, 4, 4, 3, False),
        (14, 4, 6, 2, None, True),  # no multiple of twice the groups; the halves meet at a key head
        (16, 4, 9, 3, None, False),  # they do not
        (16, 4, 4, 1, None, False),
    ],
)
def test_equals_dense_attention_with_the_mask(
    length: int, groups: int, heads: int, kv_heads: int, window: int | None, packed: bool
) -> None:
    q, k, v = random_qkv(length, heads, kv_heads)
    segments = np.where(np.arange(length) < 7, 1, 2) if packed else None
    ids = None if segments is None else jnp.broadcast_to(jnp.asarray(segments), (2, length))
    size = 2 * -(-length // (2 * groups))
    masks = reach(length, size, segments, window)
    seen = np.stack([masks[0 if head < heads // 2 else 1] for head in range(heads)])

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) * 8**-0.5
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return shifted_group_attention(q, k, v, groups, segment_ids=ids, window=window)

    out, gradients = value_and_pullback(ours, (q, k, v), jnp.sin)
    expected, expected_gradients = value_and_pullback(plain, (q, k, v), lambda _: jnp.sin(out))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_a_model_over_every_pair(packed: bool) -> None:
    """The loss of token t has a gradient at the embedding of token s exactly where a half of the heads lets t see s."""
    length, groups = 16, 4
    graph, state = nnx.split(build())
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (1, length)), jnp.int32)
    segments = np.where(np.arange(length) < 6, 1, 2)
    more: dict[str, Any] = {"segment_ids": jnp.asarray(segments)[None]} if packed else {}
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, length, 32)), jnp.float32)

    def losses(x: jax.Array) -> jax.Array:
        model = nnx.merge(graph, state)
        model._embed = lambda _: x  # pyright: ignore[reportAttributeAccessIssue]
        hidden = model.hidden(tokens, key=jax.random.key(0), attention_groups=groups, **more)
        logits = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.take_along_axis(logits, tokens[..., None], axis=-1)[0, :, 0]

    found = np.abs(np.asarray(jax.jit(jax.jacrev(losses))(x))[:, 0]).max(-1)  # [t, s]
    seen = reach(length, length // groups, segments if packed else None).any(0)
    assert (found[~seen] == 0).all()
    assert (found[seen] > 1e-6).all()


def test_the_loss_takes_groups_in_training_alone() -> None:
    """With the key of training or without: what asks for groups gets them; the plain loss is that of dense attention."""
    model = build()
    draws = np.random.default_rng(0)
    batch = {name: jnp.asarray(draws.integers(0, 31, (2, 16)), jnp.int32) for name in ("inputs", "targets")}
    batch["loss_mask"] = jnp.ones((2, 16))
    loss = jax.jit(language_model_loss, static_argnames="attention_groups")
    dense = loss(model, batch, None)
    assert loss(model, batch, None, attention_groups=1) == dense
    assert abs(loss(model, batch, None, attention_groups=4) - dense) > 1e-3


def test_compute_falls_with_the_groups() -> None:
    """Operations of the compiled gradient of attention: those of so many squares of a group, and two of half a group for the
    ends of the shifted half of the heads. XLA's attention takes 128 queries at a time, and the keys up to their last."""
    q, k, v = random_qkv(1024, 4, 4)

    def flops(groups: int) -> float:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            attend = causal_attention(q, k, v) if groups == 1 else shifted_group_attention(q, k, v, groups)
            return jnp.sin(attend).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v).compile().cost_analysis()["flops"]  # type: ignore

    def scores(tokens: int) -> int:
        return sum(min(128, tokens - start) * min(start + 128, tokens) for start in range(0, tokens, 128))

    dense = flops(1)
    for groups in (2, 4, 8):
        size = 1024 // groups
        expected = (groups * scores(size) + (groups - 1) * scores(size) + 2 * scores(size // 2)) / 2
        assert flops(groups) == pytest.approx(dense * expected / scores(1024), rel=0.05)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_kernels_take_the_groups(packed: bool) -> None:
    """Splash attention lowers for TPU, forward and back, with rows of a group each."""
    q = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        out = shifted_group_attention(q, k, v, 4, segment_ids=ids if packed else None, target=AttentionTarget("tpu"))
        return out.astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, kv, kv, ids).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 6, "forward and backward of the plain groups, the shifted ones and the ends"


def test_what_cannot_be_grouped() -> None:
    q, k, v = random_qkv(16, 1, 1)
    with pytest.raises(ValueError, match="expected at least 2 of each, found 4 and 1"):
        shifted_group_attention(q, k, v, 4)
    with pytest.raises(ValueError, match="expected at least 2 of each, found 1 and 4"):
        shifted_group_attention(*random_qkv(16, 4, 4), 1)
