"""A decoder-only language model: embedding, stacked layers, norm, output head.

    x = embed(tokens);  for each layer: x = layer(x);  logits = head(norm(x))

The layers are one module whose parameters are stacked along a first axis: the constructor is mapped with `jax.vmap`, and
`jax.lax.scan` runs the layers, so that compiling a model of 80 layers takes as long as compiling one layer. If layers differ
in their attention (window, position embedding), the program contains each kind of attention once, and each layer selects
its kind.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qlora_jax.errors import OptionError
from qlora_jax.models.attention_kinds import attend_of_kind, cache_lasts, layer_kinds, of_kind, rotations_of
from qlora_jax.models.chunks import chunk_count
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import DecoderLayer, make_norm
from qlora_jax.models.kv_cache import KVCache, View, cache_masks, empty_cache, with_first_tokens
from qlora_jax.models.neftune import neftune_noise
from qlora_jax.models.origin import Origin
from qlora_jax.models.prompts import with_prompt
from qlora_jax.models.shape import method_for, positions_left
from qlora_jax.models.stack import Remat, by_layer, rematerialise, scanned_layers, stack, storage_by_stack, with_dense_layers
from qlora_jax.models.trainable import EMBEDDING, HEAD, adapters_of, add_deltas, trainable_base
from qlora_jax.nn import (
    CPU,
    AttentionTarget,
    Delta,
    Embedding,
    LayerContext,
    Linear,
    VocabularyMatrix,
    cached_attention,
    checkpoint_name,
    fetch_to_device,
    gather,
    with_prefix,
)
from qlora_jax.nn.context import AdapterIds
from qlora_jax.nn.mesh import row_shards
from qlora_jax.peft import Method
from qlora_jax.quant import EmbeddingStorage, Quantization


class CausalLM(nnx.Module):
    """A decoder-only language model.

    Attributes:
        quantization, embedding_storage: how the model was asked to store its linear layers, and its embedding and head.
        method: the method of fine-tuning that the model was made with, as `method_for` completed it; None: none.
        origin: the checkpoint of the model, and what loading changed; None for a model with random weights.
        trained: the parameters of the base that train in addition to the adapters of linear layers.
        prompt: the virtual tokens, or their keys and values, that come before every row; None: no virtual tokens.
        head_delta, head_adapter: the trainable difference of an output head that is otherwise tied to the embedding, of all
            its values or of low rank, or None.
        attention: the device whose kernel computes causal attention.
        remat: which residuals the backward pass of training saves, and which it recomputes: "full" saves only the inputs of
            the layers, "offload" saves them in host memory, "dots" saves the results of all products, "none" saves
            everything.
    """

    def __init__(
        self,
        config: DecoderConfig,
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
            attention: the device whose kernel computes causal attention.
            remat: which residuals are saved; see the attribute.
            dense_modules: the full names of linear layers that stay dense although the others are quantised.
            rngs: random number generators; the stream `params` is used.

        Raises:
            OptionError: a target or a pattern of the method matches nothing, or an embedding trains in full but is
                quantised.
        """
        method = method_for(method, config)
        self.trainable = trainable = trainable_base(method, config.parameter_mappings, vocabulary=config.vocab_size)
        adapters = adapters_of(method, config.parameter_mappings)
        storage = storage_by_stack(config.parameter_mappings, quantization, dense_modules)

        def make_layer(layer_rngs: nnx.Rngs, layer: Array) -> DecoderLayer:
            def linear(name: str, inputs: int, outputs: int, *, use_bias: bool) -> Linear:
                return Linear(
                    inputs,
                    outputs,
                    use_bias=use_bias,
                    quantization=storage[f"layers.{name}"],
                    adapter=adapters.get(f"layers.{name}"),
                    layer=layer,
                    dtype=dtype,
                    rngs=layer_rngs,
                )

            return DecoderLayer(config, linear, dtype)

        self.layers = stack(make_layer, config.num_hidden_layers, rngs)
        with_dense_layers(self, config.parameter_mappings, dense_modules)
        rows = trainable.rows_of(EMBEDDING)
        sizes = (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embedding(
            *sizes, rows=rows, adapter=adapters.get("embed_tokens"), storage=embedding_storage, dtype=dtype, rngs=rngs
        )
        self.norm = make_norm(config, config.hidden_size, dtype)
        if config.tie_word_embeddings:
            self.lm_head = None
        else:
            rows = trainable.rows_of(HEAD)
            self.lm_head = Embedding(
                *sizes, rows=rows, adapter=adapters.get("lm_head"), storage=embedding_storage, dtype=dtype, rngs=rngs
            )
        self.head_delta: Delta | None = None
        own = adapters.get("lm_head") if config.tie_word_embeddings and not trainable.tied else None
        self.head_adapter = None if own is None else own.make(*sizes, rngs=rngs)
        self.prompt = None if method is None else method.make_prompt(rngs)
        add_deltas(self, trainable)
        self.config = config
        self.quantization = quantization
        self.embedding_storage: EmbeddingStorage = embedding_storage
        self.method = method
        self.origin: Origin | None = None
        self.attention: AttentionTarget = attention
        self.remat: Remat = remat

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        key: Array | None = None,
        adapter_ids: AdapterIds = None,
    ) -> Float[Array, "b t v"]:
        """Return the logits `[b, t, vocabulary]` of int32 tokens `[b, t]`; see `hidden` for the other arguments."""
        hidden = self.hidden(tokens, positions=positions, segment_ids=segment_ids, key=key, adapter_ids=adapter_ids)
        return self.logits(hidden)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        key: Array | None = None,
        adapter_ids: AdapterIds = None,
        neftune_alpha: float = 0.0,
        attention_groups: int = 1,
    ) -> Float[Array, "b t d"]:
        """Return the normalized last hidden states, `[b, t, hidden_size]`.

        Args:
            tokens: int32 `[b, t]`.
            positions: int32 `[b, t]`; None: 0, 1, 2 ….
            segment_ids: int32 `[b, t]`, for packed documents: 0 is padding, and tokens attend only to their own segment.
            key: random key; if given, dropout and the noise of NEFTune are applied.
            adapter_ids: int32 `[b]`, the slot of each row in a bank of adapters; see `LayerContext`.
            neftune_alpha: strength of NEFTune's noise on the embeddings; 0: no noise.
            attention_groups: number of groups of LongLoRA's attention (`nn.shifted`); 1: tokens attend to all earlier ones.

        Raises:
            OptionError: virtual tokens together with attention groups, or together with packed documents in a model whose
                attention has a window.
        """
        if self.prompt is not None and attention_groups > 1:
            raise OptionError(f"attention_groups: expected 1 with virtual tokens, found {attention_groups}")
        positions = self._positions(tokens) if positions is None else positions
        x = self._embed(tokens)
        if key is not None and neftune_alpha > 0:
            # split(key, n)[i] equals fold_in(key, i), so fold_in(key, n) differs from the keys of all layers.
            noise_key = jax.random.fold_in(key, self.config.num_hidden_layers)
            x = x + self.config.embedding_scale * neftune_noise(x, segment_ids, neftune_alpha, noise_key).astype(x.dtype)
        prompt = with_prompt(self.prompt, self.config, x, positions, segment_ids, key)
        rotations = rotations_of(self.config, prompt.positions)
        rows = (prompt.segment_ids, prompt.virtual_tokens)
        graph, layers = nnx.split(self.layers)
        layers, layer_of = scanned_layers(layers)
        chunks = chunk_count(prompt.x.shape[0] * prompt.x.shape[1] // row_shards(), self.remat)

        def run_layer(x: Array, inputs: tuple[Any, Array | None, Array | None, Any]) -> tuple[Array, None]:
            state, layer_key, kind, prefix = inputs
            context = LayerContext(layer_key, adapter_ids)
            state = layer_of(state)
            state = gather(state) if chunks == 1 else fetch_to_device(gather(state))

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
                length = q.shape[1]
                q, k, v = (q, k, v) if prefix is None else with_prefix(q, k, v, prefix)
                attended = attend_of_kind(self.config, self.attention, kind, (q, k, v), rows, attention_groups)
                return attended[:, -length:], None

            x, _ = nnx.merge(graph, state)(
                checkpoint_name(x, "residual"),
                *of_kind(rotations, kind),
                attend,
                context,
                chunks,
            )
            return x, None

        keys = None if key is None else jax.random.split(key, self.config.num_hidden_layers)
        inputs = (layers, keys, layer_kinds(self.config), prompt.prefix)
        x, _ = jax.lax.scan(rematerialise(run_layer, self.remat), prompt.x, inputs)
        return self.norm(x[:, -tokens.shape[1] :])

    def decode(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        cache: KVCache,
        *,
        lengths: Int[Array, " b"] | None = None,
        adapter_ids: AdapterIds = None,
        rows: Int[Array, " b"] | None = None,
        reach: int | None = None,
    ) -> tuple[Float[Array, "b v"], KVCache]:
        """Return (logits of each row's last token `[b, vocabulary]`, the cache including new tokens of each row).

        Args:
            tokens: int32 `[b, t]`, a prompt or a part of it, padded on the right, or one token per row.
            positions: int32 `[b, t]`, increasing by one from anywhere up to the row's past tokens; negative for padding. The
                slots of all t tokens, padding included, must be within the cache's capacity.
            cache: the keys and values of the tokens so far.
            lengths: int32 `[b]`, those of the whole prompts if `tokens` are only a part of them (`cache_lasts`); or None.
            adapter_ids: as in `hidden`.
            rows, reach: the rows of the cache, and the number of their first tokens that the new ones attend to; see `View`.
        """
        slots = jnp.where(positions < 0, positions, positions + self._virtual_tokens)
        totals = None if lengths is None else lengths[:, None] + self._virtual_tokens
        view = View(rows, cache.keys.shape[3] if reach is None else reach + self._virtual_tokens)
        x, cache = self._extended(self._embed(tokens), slots, cache, view, totals, adapter_ids)
        last = jnp.maximum(jnp.sum(positions >= 0, axis=1) - 1, 0)
        return self.logits(self.norm(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])), cache

    def _extended(
        self, x: Array, slots: Array, cache: KVCache, view: View, lengths: Array | None = None, ids: AdapterIds = None
    ) -> tuple[Array, KVCache]:
        """Return the last layer's output `[b, t, hidden_size]` for embedded tokens x, and the cache including them."""
        config, first = self.config, slots[:, 0]
        rotations = rotations_of(self.config, jnp.maximum(slots, 0), lengths)
        mask_of = cache_masks(config, view.reach, slots)
        graph, layers = nnx.split(self.layers)
        scanned, layer_of = by_layer(layers)
        context = LayerContext(adapter_ids=ids)

        def run_layer(carry: tuple[Array, KVCache], inputs: tuple[Any, Array, Array | None]) -> tuple[Any, None]:
            (x, past), (state, layer, kind) = carry, inputs

            def attend(q: Array, k: Array, v: Array) -> tuple[Array, KVCache]:
                extended, own = view.extended(past, k, v, layer, first)
                scaled = partial(cached_attention, scale=config.score_scale, cap=config.score_cap)
                return scaled(q, own.keys, own.values, partial(mask_of, kind)), extended

            return nnx.merge(graph, layer_of(state, layer))(x, *of_kind(rotations, kind), attend, context), None

        inputs = (scanned, jnp.arange(config.num_hidden_layers), layer_kinds(self.config))
        return jax.lax.scan(run_layer, (x, cache), inputs)[0]

    def cache_lasts(self, length: int) -> int | None:
        """Return the length up to which the cache of a row of `length` tokens is right; None: always. See `nn.rope`."""
        last = cache_lasts(self.config, length + self._virtual_tokens)
        return None if last is None else last - self._virtual_tokens

    def init_cache(self, batch_size: int, capacity: int, lengths: Int[Array, " b"] | None = None) -> KVCache:
        """Return a cache for `capacity` tokens per row that contains only the virtual tokens, if there are any.

        Args:
            batch_size: the number of rows.
            capacity: the most tokens of a row.
            lengths: int32 `[b]`, the tokens of each row's prompt, for frequencies that depend on the length; None: short.
        """
        config, dtype = self.config, self.embed_tokens.weight.dtype
        if self.prompt is None:
            return empty_cache(config, dtype, batch_size, capacity)
        n = self.prompt.virtual_tokens
        cache = empty_cache(config, dtype, batch_size, n + capacity)
        if self.prompt.is_prefix:
            prefix = self.prompt.keys_and_values(config.num_hidden_layers, config.num_key_value_heads)
            keys, values = (x.swapaxes(1, 2)[:, None] for x in prefix)
        else:  # attention is causal, so the keys and values of virtual tokens do not depend on later tokens
            # All rows have the same, unless their lengths decide on the rotations.
            rows = 1 if lengths is None or cache_lasts(config, 1) is None else batch_size
            positions = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (rows, n))
            totals = None if rows == 1 or lengths is None else lengths[:, None] + n
            embedded = self.prompt.embeddings(rows, dtype)
            _, one = self._extended(embedded, positions, empty_cache(config, dtype, rows, n), View(None, n), totals)
            keys, values = one.keys, one.values
        return with_first_tokens(cache, keys, values)

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Return the logits `[..., vocabulary]` of normalized hidden states `[..., hidden_size]`."""
        logits, cap = self.head.logits(hidden), self.logit_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def logit_cap(self) -> float | None:
        """The cap of the logits, which become cap * tanh(logits / cap); None: no cap."""
        return self.config.logit_cap

    @property
    def head(self) -> VocabularyMatrix:
        """The output head, `[vocabulary, hidden_size]`."""
        if self.lm_head is not None:
            return self.lm_head.matrix
        embedding = self.embed_tokens.matrix
        if self.trainable.tied:
            return embedding
        low_rank = None if self.head_adapter is None else self.head_adapter.low_rank()
        delta, rows = (None if self.head_delta is None else self.head_delta[...]), embedding.rows
        return VocabularyMatrix(embedding.weight, delta if rows is None else embedding.delta, rows, low_rank)

    def _embed(self, tokens: Array) -> Array:
        x = self.embed_tokens(tokens)
        return x if self.config.embedding_scale == 1 else x * jnp.asarray(self.config.embedding_scale, x.dtype)

    @property
    def max_positions(self) -> int | None:
        """The largest number of tokens in a row, without virtual ones, that the positions allow; None: no limit."""
        return positions_left(self.config, None if self.prompt is None else self.prompt.method)

    @property
    def _virtual_tokens(self) -> int:
        return 0 if self.prompt is None else self.prompt.virtual_tokens

    @staticmethod
    def _positions(tokens: Array) -> Array:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
