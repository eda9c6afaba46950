"""The layer of a decoder-only language model, with options for the differences between families.

    Llama and most:   x = x + attention(norm(x));  x = x + feed_forward(norm(x))
    Gemma 2 and 3:    x = x + norm(attention(norm(x)));  x = x + norm(feed_forward(norm(x)))
    GPT-NeoX:         x = x + attention(norm(x)) + feed_forward(norm'(x))

Attention is grouped-query attention with rotary positions (or none). The feed-forward is down(f(gate(x)) * up(x)) or
down(f(up(x))). The linear layers have Llama's names; the parameter mappings translate the names of other families'
checkpoints. The computations after attention, which act on each token independently, can run in chunks (`chunks`).
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.models.chunks import over_chunks
from qlora_jax.models.config import DecoderConfig, Fused
from qlora_jax.nn import Activation, LayerContext, LayerNorm, Linear, RMSNorm, activate, glu, rotate, with_whole_features
from qlora_jax.nn.context import Contexts

Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
_MOST_LINEAR = 7  # the most linear layers in a decoder layer; each gets its own context


class MakeLinear(Protocol):
    """A function that creates a linear layer by its name within the decoder layer, with the model's storage and adapter."""

    def __call__(self, name: str, inputs: int, outputs: int, *, use_bias: bool) -> Linear: ...


def make_norm(config: DecoderConfig, features: int, dtype: DTypeLike) -> RMSNorm | LayerNorm:
    """Return a norm of the family's kind."""
    if config.norm == "layer":
        return LayerNorm(features, eps=config.norm_eps, dtype=dtype)
    return RMSNorm(features, eps=config.norm_eps, offset=config.norm == "rms+1", dtype=dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary position embedding."""

    def __init__(self, config: DecoderConfig, linear: MakeLinear, dtype: DTypeLike) -> None:
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        hidden, inner, kv = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.fused: Fused = config.fused
        if config.fused == "no":
            self.q_proj = linear("self_attn.q_proj", hidden, inner, use_bias=config.qkv_bias)
            self.k_proj = linear("self_attn.k_proj", hidden, kv, use_bias=config.qkv_bias)
            self.v_proj = linear("self_attn.v_proj", hidden, kv, use_bias=config.qkv_bias)
        elif config.fused == "heads":
            self.query_key_value = linear("self_attn.query_key_value", hidden, inner + 2 * kv, use_bias=config.qkv_bias)
        else:
            self.qkv_proj = linear("self_attn.qkv_proj", hidden, inner + 2 * kv, use_bias=config.qkv_bias)
        self.o_proj = linear("self_attn.o_proj", inner, hidden, use_bias=config.o_bias)
        self.q_norm = make_norm(config, self.head_dim, dtype) if config.query_key_norm else None
        self.k_norm = make_norm(config, self.head_dim, dtype) if config.query_key_norm else None

    def __call__(self, x: Array, cosine: Array, sine: Array, attend: Attend, contexts: Contexts) -> tuple[Array, Any]:
        q, k, v = self._project(x, contexts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended, cache = attend(rotate(q, cosine, sine), rotate(k, cosine, sine), v)
        return self.o_proj(attended.reshape(*x.shape[:2], -1), contexts[3]), cache

    def _project(self, x: Array, contexts: Contexts) -> tuple[Array, Array, Array]:
        def heads(y: Array, count: int) -> Array:
            return y.reshape(*y.shape[:2], count, self.head_dim)

        if self.fused == "no":
            return (
                heads(self.q_proj(x, contexts[0]), self.heads),
                heads(self.k_proj(x, contexts[1]), self.kv_heads),
                heads(self.v_proj(x, contexts[2]), self.kv_heads),
            )
        if self.fused == "heads":
            y = heads(self.query_key_value(x, contexts[0]), 3 * self.heads)
            y = y.reshape(*y.shape[:2], self.heads, 3, self.head_dim)
            return y[..., 0, :], y[..., 1, :], y[..., 2, :]
        y = heads(self.qkv_proj(x, contexts[0]), self.heads + 2 * self.kv_heads)
        q, k, v = jnp.split(y, (self.heads, self.heads + self.kv_heads), axis=2)
        return q, k, v


class FeedForward(nnx.Module):
    """The feed-forward network: down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, linear: MakeLinear) -> None:
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation: Activation = config.activation
        self.glu, self.fused = config.glu, config.glu and config.fused == "blocks"
        if self.fused:
            self.gate_up_proj = linear("mlp.gate_up_proj", hidden, 2 * inner, use_bias=bias)
        else:
            if self.glu:
                self.gate_proj = linear("mlp.gate_proj", hidden, inner, use_bias=bias)
            self.up_proj = linear("mlp.up_proj", hidden, inner, use_bias=bias)
        self.down_proj = linear("mlp.down_proj", inner, hidden, use_bias=bias)

    def __call__(self, x: Array, contexts: Contexts) -> Array:
        if self.fused:
            gate, up = jnp.split(self.gate_up_proj(x, contexts[0]), 2, axis=-1)
            inner = glu(self.activation, gate, up)
        elif self.glu:
            inner = glu(self.activation, self.gate_proj(x, contexts[0]), self.up_proj(x, contexts[1]))
        else:
            inner = activate(self.activation, self.up_proj(x, contexts[1]))
        return self.down_proj(inner, contexts[2])


class DecoderLayer(nnx.Module):
    """One decoder layer; in the model its parameters have a leading layer axis."""

    def __init__(self, config: DecoderConfig, linear: MakeLinear, dtype: DTypeLike) -> None:
        def norm() -> RMSNorm | LayerNorm:
            return make_norm(config, config.hidden_size, dtype)

        self.parallel = config.parallel
        self.input_layernorm = norm()
        self.self_attn = Attention(config, linear, dtype)
        self.post_attention_layernorm = norm()
        self.mlp = FeedForward(config, linear)
        self.pre_feedforward_layernorm = norm() if config.post_norms else None
        self.post_feedforward_layernorm = norm() if config.post_norms else None

    def __call__(
        self, x: Array, cosine: Array, sine: Array, attend: Attend, context: LayerContext, chunks: int = 1
    ) -> tuple[Array, Any]:
        """Return the layer's output `[b, t, hidden_size]` and the second result of `attend`.

        Args:
            x: `[b, t, hidden_size]`.
            cosine, sine: rotations of the positions, `[b, t, r / 2]`.
            attend: maps rotated queries, rotated keys and values to the attention's result and a second value.
            context: the random key of the adapters' dropout and the adapter ids of the rows.
            chunks: number of chunks of tokens in which the feed-forward runs.
        """
        x, contexts = with_whole_features(x), context.split(_MOST_LINEAR)
        attended, cache = self.self_attn(self.input_layernorm(x), cosine, sine, attend, contexts[:4])
        if self.parallel:
            return with_whole_features(attended + over_chunks(self._add_feed_forward, x, contexts[4:], chunks)), cache
        if self.post_feedforward_layernorm is not None:
            attended = self.post_attention_layernorm(attended)
        return with_whole_features(over_chunks(self._add_feed_forward, x + attended, contexts[4:], chunks)), cache

    def _add_feed_forward(self, x: Array, contexts: Contexts) -> Array:
        """Return x plus the feed-forward of x, which acts on each token independently."""
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            return x + self.mlp(self.post_attention_layernorm(x), contexts)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x), contexts))
