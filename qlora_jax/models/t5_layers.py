"""The layers of T5 (attention with unscaled scores, a feed-forward with or without a gate), and its two stacks of layers."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Shaped

from qlora_jax.models.decoder import Attend, MakeLinear
from qlora_jax.models.stack import stack
from qlora_jax.models.t5_config import T5Config
from qlora_jax.nn import (
    Activation,
    Embedding,
    LayerContext,
    RMSNorm,
    activate,
    glu,
    relative_position_bias,
    with_whole_features,
)
from qlora_jax.nn.context import Contexts

SourceMask = Shaped[Array, "b s"] | None  # 0 for padding; None: no padding
_MOST_LINEAR = 11  # linear layers in a layer of the decoder; each gets its own context
_CROSS = slice(4, 8)  # the indices of the linear layers of cross-attention


class T5Attention(nnx.Module):
    """The linear layers of self-attention or cross-attention."""

    def __init__(self, config: T5Config, linear: MakeLinear, name: str) -> None:
        hidden, inner = config.hidden_size, config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.q = linear(f"{name}.q", hidden, inner, use_bias=False)
        self.k = linear(f"{name}.k", hidden, inner, use_bias=False)
        self.v = linear(f"{name}.v", hidden, inner, use_bias=False)
        self.o = linear(f"{name}.o", inner, hidden, use_bias=False)

    def queries(self, x: Array, contexts: Contexts) -> Array:
        """Return the queries `[b, t, heads, head_dim]` of x `[b, t, hidden]`; `contexts` are those of q, k, v and o."""
        return self._heads(self.q(x, contexts[0]))

    def keys_and_values(self, x: Array, contexts: Contexts) -> tuple[Array, Array]:
        """Return the keys and values, each `[b, s, heads, head_dim]`, of x `[b, s, hidden]`."""
        return self._heads(self.k(x, contexts[1])), self._heads(self.v(x, contexts[2]))

    def output(self, attended: Array, contexts: Contexts) -> Array:
        """Return the output projection `[b, t, hidden]` of the attention's result `[b, t, heads, head_dim]`."""
        return self.o(attended.reshape(*attended.shape[:2], -1), contexts[3])

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


class T5FeedForward(nnx.Module):
    """The feed-forward network: down(f(gate(x)) * up(x)), or down(f(up(x))) without a gate."""

    def __init__(self, config: T5Config, linear: MakeLinear) -> None:
        hidden, inner = config.hidden_size, config.intermediate_size
        self.activation: Activation = config.activation
        self.gate = linear("feed_forward.gate", hidden, inner, use_bias=False) if config.glu else None
        self.up = linear("feed_forward.up", hidden, inner, use_bias=False)
        self.down = linear("feed_forward.down", inner, hidden, use_bias=False)

    def __call__(self, x: Array, contexts: Contexts) -> Array:
        up = self.up(x, contexts[0])
        if self.gate is None:
            return self.down(activate(self.activation, up), contexts[2])
        return self.down(glu(self.activation, self.gate(x, contexts[1]), up), contexts[2])


class T5Layer(nnx.Module):
    """One layer of a stack; in the model its parameters have a leading layer axis."""

    def __init__(self, config: T5Config, linear: MakeLinear, dtype: DTypeLike, *, cross: bool) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)

        self.self_attention, self.self_attention_norm = T5Attention(config, linear, "self_attention"), norm()
        self.cross_attention = T5Attention(config, linear, "cross_attention") if cross else None
        self.cross_attention_norm = norm() if cross else None
        self.feed_forward, self.feed_forward_norm = T5FeedForward(config, linear), norm()

    def __call__(
        self, x: Array, attend: Attend, attend_sources: Callable[[Array], Array] | None, contexts: Contexts
    ) -> tuple[Array, Any]:
        """Return the layer's output `[b, t, hidden_size]` and the second result of `attend`.

        Args:
            x: `[b, t, hidden_size]`.
            attend: maps queries, keys and values of the sequence to the result of self-attention and a second value.
            attend_sources: maps queries to the result of cross-attention to the sources; None in the encoder.
            contexts: those of the linear layers, as `layer_contexts` makes them.
        """
        x = with_whole_features(x)
        attention, normed = self.self_attention, self.self_attention_norm(x)
        attended, cache = attend(attention.queries(normed, contexts), *attention.keys_and_values(normed, contexts))
        x = x + attention.output(attended, contexts)
        if self.cross_attention is not None and self.cross_attention_norm is not None and attend_sources is not None:
            attention, cross_contexts = self.cross_attention, contexts[_CROSS]
            attended = attend_sources(attention.queries(self.cross_attention_norm(x), cross_contexts))
            x = x + attention.output(attended, cross_contexts)
        return with_whole_features(x + self.feed_forward(self.feed_forward_norm(x), contexts[_CROSS.stop :])), cache

    def keys_and_values_of(self, encoded: Array, contexts: Contexts) -> tuple[Array, Array]:
        """Return the keys and values of cross-attention, `[b, s, heads, head_dim]`, for encoded sources."""
        if self.cross_attention is None:
            raise ValueError("expected a layer of the decoder, found one of the encoder")
        return self.cross_attention.keys_and_values(encoded, contexts[_CROSS])


class T5Stack(nnx.Module):
    """The layers of the encoder or of the decoder, the relative position bias that they share, and the final norm."""

    def __init__(
        self,
        config: T5Config,
        make_layer: Callable[[nnx.Rngs, Array], T5Layer],
        layers: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.layers = stack(make_layer, layers, rngs)
        self.relative_attention_bias = Embedding(config.relative_buckets, config.num_heads, dtype=dtype, rngs=rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.max_distance = config.relative_max_distance

    def bias(self, queries: Array, keys: Array, *, bidirectional: bool) -> Array:
        """Return the bias of the scores, float32 `[heads, t, s]`, for the positions of queries `[t]` and keys `[s]`."""
        buckets = self.relative_attention_bias(jnp.arange(self.relative_attention_bias.matrix.shape[0]))
        return relative_position_bias(buckets, queries, keys, bidirectional=bidirectional, max_distance=self.max_distance)

    def distance_bias(self, queries: int, keys: int, *, bidirectional: bool) -> Array:
        """Return the bias of each distance, float32 `[heads, t + s - 1]`, for t queries at the last of s positions."""
        distances = jnp.arange(1 - keys, queries)
        return self.bias(jnp.zeros(1, jnp.int32), distances, bidirectional=bidirectional)[:, 0]


def layer_contexts(context: LayerContext) -> Contexts:
    """Return the context of each linear layer of a layer."""
    return context.split(_MOST_LINEAR)
