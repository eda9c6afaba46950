"""T5, an encoder-decoder (Raffel et al. 2020): v1.0, v1.1 and Flan-T5.

    encoder   x = embed(sources);    for each layer: x = x + attention(norm(x)); x = x + feed_forward(norm(x))
    decoder   y = embed(inputs);     for each layer: y = y + attention(norm(y)); y = y + attention(norm(y), norm(x));
                                                     y = y + feed_forward(norm(y))
    logits    head(norm(y)), or shared(norm(y) * hidden_size ** -0.5) if the output head is tied to the embedding

Scores are not scaled. The only position information is a bias on the scores of self-attention, which depends on the distance
of the tokens; the layers of a stack share it. The length is not limited. T5's own dropout is omitted, because only an
adapter trains, which has its own dropout.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qlora_jax.models.origin import Origin
from qlora_jax.models.shape import method_for
from qlora_jax.models.stack import Remat, by_layer, rematerialise, scanned_layers, storage_by_stack
from qlora_jax.models.t5_config import T5Config
from qlora_jax.models.t5_layers import SourceMask, T5Layer, T5Stack, layer_contexts
from qlora_jax.models.trainable import adapters_of, add_deltas, trainable_base
from qlora_jax.nn import (
    CPU,
    AttentionTarget,
    Embedding,
    LayerContext,
    Linear,
    VocabularyMatrix,
    biased_attention,
    checkpoint_name,
    gather,
    relative_attention,
    split_heads,
    with_prefix,
)
from qlora_jax.nn.context import AdapterIds
from qlora_jax.peft import Method
from qlora_jax.peft.prompt import cross_order
from qlora_jax.quant import EmbeddingStorage, Quantization


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seq2SeqCache:
    """The keys and values that decoding reads.

    Attributes:
        keys, values: those of past targets, `[layers, b, capacity, heads, head_dim]`.
        source_keys, source_values: those of the encoded sources, `[layers, b, s, heads, head_dim]`.
        source_mask: bool `[b, s]`, false for padding.
        length: int32 scalar, the number of targets so far.
    """

    keys: Array
    values: Array
    source_keys: Array
    source_values: Array
    source_mask: Array
    length: Array


class T5(nnx.Module):
    """An encoder-decoder of the T5 family.

    Attributes:
        quantization, embedding_storage: how the model was asked to store its linear layers, and its embedding and head.
        method: the method of fine-tuning that the model was made with, as `method_for` completed it; None: none.
        origin: the checkpoint of the model, and what loading changed; None for a model with random weights.
        trained: the parameters of the base that train in addition to the adapters of linear layers.
        prompt: the virtual tokens before the sources, or their keys and values in the decoder; None: no virtual tokens.
        remat: which residuals the backward pass of training saves; see `CausalLM`.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        quantization: Quantization | None = None,
        embedding_storage: EmbeddingStorage = "none",
        method: Method | None = None,
        dtype: DTypeLike = jnp.float32,
        attention: AttentionTarget = CPU,
        remat: Remat = "full",
        dense_modules: Collection[str] = (),
        rngs: nnx.Rngs,
    ) -> None:
        """Create a model with random weights; under `nnx.eval_shape` this needs no memory.

        Args:
            config: the sizes and options of the model.
            quantization: storage of the linear layers; None: dense.
            embedding_storage: storage of the embedding and the output head.
            method: the method of fine-tuning, which defines the adapters; None: no adapters.
            dtype: dtype of activations and of dense weights.
            attention: has no effect, because XLA computes attention with a bias on every platform.
            remat: which residuals are saved; see `CausalLM`.
            dense_modules: the full names of linear layers that stay dense; all layers of a stack stay dense with them.
            rngs: random number generators; the stream `params` is used.

        Raises:
            OptionError: a target or a pattern of the method matches nothing, or an embedding trains in full but is
                quantised.
        """
        method = method_for(method, config)
        self.trainable = trainable = trainable_base(
            method, config.parameter_mappings, vocabulary=config.vocab_size, embeddings=False
        )
        adapters = adapters_of(method, config.parameter_mappings, embeddings=False)
        storage = storage_by_stack(config.parameter_mappings, quantization, dense_modules, mixed=False)

        def make_stack(side: str, layers: int, *, cross: bool) -> T5Stack:
            def make_layer(layer_rngs: nnx.Rngs, layer: Array) -> T5Layer:
                def linear(name: str, inputs: int, outputs: int, *, use_bias: bool) -> Linear:
                    return Linear(
                        inputs,
                        outputs,
                        use_bias=use_bias,
                        quantization=storage[f"{side}.layers.{name}"],
                        adapter=adapters.get(f"{side}.layers.{name}"),
                        layer=layer,
                        dtype=dtype,
                        rngs=layer_rngs,
                    )

                return T5Layer(config, linear, dtype, cross=cross)

            return T5Stack(config, make_layer, layers, dtype, rngs)

        self.encoder = make_stack("encoder", config.num_layers, cross=False)
        self.decoder = make_stack("decoder", config.num_decoder_layers, cross=True)
        self.shared = Embedding(config.vocab_size, config.hidden_size, storage=embedding_storage, dtype=dtype, rngs=rngs)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            self.lm_head = Embedding(
                config.vocab_size, config.hidden_size, storage=embedding_storage, dtype=dtype, rngs=rngs
            )
        add_deltas(self, trainable)
        self.prompt = None if method is None else method.make_prompt(rngs)
        self.config = config
        self.quantization = quantization
        self.embedding_storage: EmbeddingStorage = embedding_storage
        self.method = method
        self.origin: Origin | None = None
        self.attention: AttentionTarget = attention
        self.remat: Remat = remat

    def __call__(
        self,
        sources: Int[Array, "b s"],
        inputs: Int[Array, "b t"],
        *,
        source_mask: SourceMask = None,
        key: Array | None = None,
        adapter_ids: AdapterIds = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits `[b, t, vocabulary]` for int32 sources `[b, s]` and inputs of the decoder `[b, t]`."""
        keys = (None, None) if key is None else jax.random.split(key)
        encoded = self.encode(sources, source_mask, key=keys[0], adapter_ids=adapter_ids)
        return self.logits(self.hidden(inputs, encoded, source_mask, key=keys[1], adapter_ids=adapter_ids))

    def encode(
        self,
        sources: Int[Array, "b s"],
        source_mask: SourceMask = None,
        *,
        key: Array | None = None,
        adapter_ids: AdapterIds = None,
    ) -> Float[Array, "b n d"]:
        """Return the hidden states of the sources, `[b, s, hidden_size]`, or `[b, n + s, hidden_size]` with virtual tokens.

        Args:
            sources: int32 `[b, s]`.
            source_mask: `[b, s]`, 0 for padding; None: no padding.
            key: random key; if given, the adapter's dropout is applied.
            adapter_ids: int32 `[b]`, the slot of each row in a bank of adapters; see `LayerContext`.
        """
        embedded = self.shared(sources)
        if self.prompt is not None and not self.prompt.is_prefix:
            own = None if key is None else jax.random.fold_in(key, self.config.num_layers + 1)
            embedded = jnp.concatenate([self.prompt.embeddings(len(sources), embedded.dtype, own), embedded], axis=1)
        count, mask = embedded.shape[1], _mask(embedded, source_mask)
        bias = self.encoder.distance_bias(count, count, bidirectional=True)
        graph, layers = nnx.split(self.encoder.layers)
        layers, layer_of = scanned_layers(layers)

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            return relative_attention(q, k, v, mask, bias, scale=1.0, target=self.attention), None

        def run_layer(x: Array, inputs: tuple[Any, Array | None]) -> tuple[Array, None]:
            state, layer_key = inputs
            contexts, layer = layer_contexts(LayerContext(layer_key, adapter_ids)), nnx.merge(graph, gather(layer_of(state)))
            return layer(checkpoint_name(x, "residual"), attend, None, contexts)[0], None

        keys = None if key is None else jax.random.split(key, self.config.num_layers)
        x, _ = jax.lax.scan(rematerialise(run_layer, self.remat), embedded, (layers, keys))
        return self.encoder.norm(x)

    def hidden(
        self,
        inputs: Int[Array, "b t"],
        encoded: Float[Array, "b n d"],
        source_mask: SourceMask = None,
        *,
        key: Array | None = None,
        adapter_ids: AdapterIds = None,
    ) -> Float[Array, "b t d"]:
        """Return the decoder's last hidden states `[b, t, hidden_size]`, scaled for the output head.

        Args:
            inputs: int32 `[b, t]`, the decoder's inputs. Padding must be at the end, where no other token attends to it.
            encoded: the result of `encode` for the sources.
            source_mask: the mask that `encode` got.
            key: random key; if given, the adapter's dropout is applied.
            adapter_ids: as in `encode`.
        """
        prefix, n = self._prefix(key), 0 if self.prompt is None or not self.prompt.is_prefix else self.prompt.virtual_tokens
        count, mask = inputs.shape[1], _mask(encoded, source_mask)
        bias, every = self.decoder.distance_bias(count, n + count, bidirectional=False), jnp.ones((1, n + count), bool)
        graph, layers = nnx.split(self.decoder.layers)
        layers, layer_of = scanned_layers(layers)

        def run_layer(x: Array, inputs: tuple[Any, Array | None, Any]) -> tuple[Array, None]:
            layer, before = nnx.merge(graph, gather(layer_of(inputs[0]))), inputs[2]
            contexts = layer_contexts(LayerContext(inputs[1], adapter_ids))
            k, v = layer.keys_and_values_of(encoded, contexts)

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
                if before is not None:
                    _, k, v = with_prefix(q, k, v, before)
                return relative_attention(q, k, v, every, bias, scale=1.0, before=n, target=self.attention), None

            def attend_sources(q: Array) -> Array:
                return relative_attention(q, k, v, mask, None, scale=1.0, target=self.attention)

            return layer(checkpoint_name(x, "residual"), attend, attend_sources, contexts)[0], None

        keys = None if key is None else jax.random.split(key, self.config.num_decoder_layers)
        x, _ = jax.lax.scan(rematerialise(run_layer, self.remat), self.shared(inputs), (layers, keys, prefix))
        return self._scale_for_head(self.decoder.norm(x))

    def init_cache(
        self, encoded: Float[Array, "b n d"], source_mask: SourceMask, capacity: int, *, adapter_ids: AdapterIds = None
    ) -> Seq2SeqCache:
        """Return a cache for `capacity` targets per row that contains only the virtual tokens, if there are any.

        Args:
            encoded: the result of `encode` for the sources.
            source_mask: the mask that `encode` got.
            capacity: number of targets.
            adapter_ids: as in `encode`.
        """
        config, (batch, length), prefix = self.config, encoded.shape[:2], self._prefix(None)
        graph, layers = nnx.split(self.decoder.layers)
        layers, layer_of = scanned_layers(layers)
        contexts = layer_contexts(LayerContext(adapter_ids=adapter_ids))

        def run_layer(_: None, state: Any) -> tuple[None, tuple[Array, Array]]:
            return None, nnx.merge(graph, gather(layer_of(state))).keys_and_values_of(encoded, contexts)

        _, (source_keys, source_values) = jax.lax.scan(run_layer, None, layers)
        n = 0 if prefix is None else prefix[0].shape[1]
        shape = (config.num_decoder_layers, batch, n + capacity, config.num_heads, config.head_dim)
        keys, values = (split_heads(jnp.zeros(shape, encoded.dtype), 3) for _ in range(2))  # two, because each is donated
        if prefix is not None:
            keys, values = (
                x.at[:, :, :n].set(before[:, None].astype(x.dtype)) for x, before in zip((keys, values), prefix, strict=True)
            )
        mask = jnp.broadcast_to(_mask(encoded, source_mask), (batch, length))
        return Seq2SeqCache(keys, values, source_keys, source_values, mask, jnp.asarray(n, jnp.int32))

    def decode(
        self, tokens: Int[Array, " b"], cache: Seq2SeqCache, *, adapter_ids: AdapterIds = None
    ) -> tuple[Float[Array, "b v"], Seq2SeqCache]:
        """Process the decoder's next input, int32 `[b]`; return (logits `[b, vocabulary]`, the cache including it)."""
        length, slots = cache.length, jnp.arange(cache.keys.shape[2])
        bias = self.decoder.bias(length[None], slots, bidirectional=False)
        mask, source_mask = (slots <= length)[None, None], cache.source_mask[:, None]
        graph, layers = nnx.split(self.decoder.layers)
        scanned, layer_of = by_layer(layers)
        contexts = layer_contexts(LayerContext(adapter_ids=adapter_ids))

        def run_layer(carry: tuple[Array, Array, Array], inputs: tuple[Any, ...]) -> tuple[Any, None]:
            x, past_keys, past_values = carry
            state, layer, source_keys, source_values = inputs

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
                start = (layer, 0, length, 0, 0)
                keys = jax.lax.dynamic_update_slice(past_keys, k[None].astype(past_keys.dtype), start)
                values = jax.lax.dynamic_update_slice(past_values, v[None].astype(past_values.dtype), start)
                return biased_attention(q, keys[layer], values[layer], mask, bias, scale=1.0), (keys, values)

            def attend_sources(q: Array) -> Array:
                return biased_attention(q, source_keys, source_values, source_mask, None, scale=1.0)

            merged = nnx.merge(graph, layer_of(state, layer))
            x, (keys, values) = merged(x, attend, attend_sources, contexts)
            return (x, keys, values), None

        start = (self.shared(tokens)[:, None], cache.keys, cache.values)
        inputs = (scanned, jnp.arange(self.config.num_decoder_layers), cache.source_keys, cache.source_values)
        (x, keys, values), _ = jax.lax.scan(run_layer, start, inputs)
        logits = self.logits(self._scale_for_head(self.decoder.norm(x[:, -1])))
        return logits, dataclasses.replace(cache, keys=keys, values=values, length=length + 1)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Return the logits `[..., vocabulary]` of hidden states `[..., hidden_size]` that `hidden` returned."""
        return self._head().logits(hidden)

    @property
    def logit_cap(self) -> None:
        """The cap of the logits; T5 has none."""
        return None

    @property
    def head(self) -> VocabularyMatrix:
        """The output head, `[vocabulary, hidden_size]`."""
        return self._head().matrix

    def _prefix(self, key: Array | None) -> tuple[Array, Array] | None:
        """Return the prefix keys and values of the decoder, `[decoder layers, n, heads, head_dim]` each, or None."""
        if self.prompt is None or not self.prompt.is_prefix:
            return None
        config = self.config
        keys, values = self.prompt.keys_and_values(config.num_layers, config.num_heads, key)
        order = jnp.asarray(cross_order(config.num_layers, config.num_decoder_layers))
        return keys[order], values[order]

    def _head(self) -> Embedding:
        return self.shared if self.lm_head is None else self.lm_head

    def _scale_for_head(self, x: Array) -> Array:
        """Scale x if the head is tied: an embedding of unit variance needs smaller inputs when it is used as output head."""
        return x * self.config.hidden_size**-0.5 if self.lm_head is None else x


def _mask(rows: Array, mask: Array | None) -> Array:
    """Return the mask of rows `[b, s, …]`, bool `[b or 1, s]`; virtual tokens are added as visible."""
    if mask is None:
        return jnp.ones((1, rows.shape[1]), bool)
    virtual = rows.shape[1] - mask.shape[1]
    return jnp.pad(mask.astype(bool), ((0, 0), (virtual, 0)), constant_values=True)
