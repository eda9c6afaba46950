"""Virtual tokens in a decoder-only model (see peft.prompt).

    embeddings    x' = [e; x]; e has the positions 0 … n - 1, those of the tokens count from n on; the outputs for e are
                  removed at the end
    prefix        x is unchanged, positions count from n on, and n keys and values are put before those of each layer

The documents of a packed row share the virtual tokens: these attend only to each other, so they are the same for every
document. In a model with an attention window, tokens of a later document would have fewer virtual tokens within their window
than tokens of the first document, so this combination is an error.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.models.config import DecoderConfig
from qlora_jax.peft import Prompt
from qlora_jax.peft.prompt import EMBEDDING, attribute_of


@dataclasses.dataclass(frozen=True)
class Prompted:
    """The inputs of the layers, including virtual tokens.

    Attributes:
        x: `[b, t, hidden_size]`, the embeddings of virtual tokens (if any) and tokens.
        positions: int32 `[b, t]`, their positions.
        segment_ids: int32 `[b, keys]`, or None.
        prefix: keys and values for each layer, `[layers, n, kv_heads, head_dim]` each, or None.
        virtual_tokens: number of keys before those of the tokens.
    """

    x: Array
    positions: Array
    segment_ids: Array | None
    prefix: tuple[Array, Array] | None = None
    virtual_tokens: int = 0


def with_prompt(
    prompt: Prompt | None,
    config: DecoderConfig,
    x: Array,
    positions: Array,
    segment_ids: Array | None,
    key: Array | None,
) -> Prompted:
    """Return the inputs of the layers.

    Args:
        prompt: the virtual tokens, or None.
        config: the configuration of the model.
        x: `[b, t, hidden_size]`, the embedded tokens.
        positions: int32 `[b, t]`.
        segment_ids: int32 `[b, t]`, or None.
        key: random key of the dropout in the prompt's encoder, or None.

    Raises:
        OptionError: packed documents together with an attention window.
    """
    if prompt is None:
        return Prompted(x, positions, segment_ids)
    n, batch = prompt.virtual_tokens, x.shape[0]
    if segment_ids is not None:
        check_documents(config, n, segment_ids.shape[1])
        segment_ids = jnp.pad(segment_ids, ((0, 0), (n, 0)), constant_values=1)
    # The keys of the layers and of NEFTune's noise are split(key, layers) and fold_in(key, layers); this one differs.
    key = None if key is None else jax.random.fold_in(key, config.num_hidden_layers + 1)
    if prompt.is_prefix:
        prefix = prompt.keys_and_values(config.num_hidden_layers, config.num_key_value_heads, key)
        return Prompted(x, positions + n, segment_ids, prefix, n)
    first = jnp.broadcast_to(jnp.arange(n, dtype=positions.dtype), (batch, n))
    x = jnp.concatenate([prompt.embeddings(batch, x.dtype, key), x], axis=1)
    return Prompted(x, jnp.concatenate([first, positions + n], axis=1), segment_ids, None, n)


def check_documents(config: DecoderConfig, virtual_tokens: int, length: int) -> None:
    """Raise OptionError if rows of `length` tokens must not contain several documents beside virtual tokens."""
    longest = virtual_tokens + length
    windows = [kind.window for kind in config.kinds if kind.window is not None and kind.window < longest]
    if windows:
        raise OptionError(
            f"virtual tokens in a {config.family} with a window of {windows[0]} tokens: expected one document a row "
            "(packing off), found rows of several"
        )


def initialize_from_tokens(model: Any, tokens: np.ndarray) -> Any:
    """Return the model with its virtual tokens initialized with the embeddings of `tokens`; other arrays are shared.

    Args:
        model: a model with a prompt.
        tokens: int32 `[rows]`.
    """
    graphdef, state = nnx.split(model)
    initialized = nnx.merge(graphdef, state)
    decoder = isinstance(initialized.config, DecoderConfig)
    embed, scale = (initialized.embed_tokens, initialized.config.embedding_scale) if decoder else (initialized.shared, 1.0)
    values = embed(jnp.asarray(tokens)).astype(jnp.float32) * scale
    setattr(initialized.prompt, attribute_of(EMBEDDING), nnx.LoRAParam(values))
    return initialized
