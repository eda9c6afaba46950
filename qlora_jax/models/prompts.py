"""Virtual tokens in a decoder-only model (peft.prompt says what they are).

    embeddings    x' = [e; x], positions 0 … n - 1 and then the tokens' own from n on; what comes of e is dropped in the end
    prefix        x stays, positions count from n on, and each layer's keys and values have n more before them

Rows that hold several documents share them: virtual tokens see nothing but each other, so that they are the same before
every document. A window that counts tokens of the row would see fewer of them from the second document than from the
first: that is refused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.models.config import DecoderConfig
from qlora_jax.peft import Prompt
from qlora_jax.peft.prompt import EMBEDDING, attribute_of


@dataclasses.dataclass(frozen=True)
class Prompted:
    """The inputs of the layers.

    Attributes:
        x: `[b, t, hidden_size]`, of virtual embeddings and tokens.
        positions: int32 `[b, t]`, of these.
        segment_ids: int32, of all keys, or None.
        prefix: keys and values of each layer, `[layers, n, kv_heads, head_dim]`, or None.
        virtual_tokens: how many keys come before those of tokens.
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
    """The inputs of the layers for embedded tokens `[b, t, hidden_size]`.

    Raises:
        ValueError: documents that share a row, and a window.
    """
    if prompt is None:
        return Prompted(x, positions, segment_ids)
    n, batch = prompt.virtual_tokens, x.shape[0]
    if segment_ids is not None:
        check_documents(config, n, segment_ids.shape[1])
        segment_ids = jnp.pad(segment_ids, ((0, 0), (n, 0)), constant_values=1)
    # A number after those of the layers and the noise, which are split(key, layers) and fold_in(key, layers).
    key = None if key is None else jax.random.fold_in(key, config.num_hidden_layers + 1)
    if prompt.is_prefix:
        prefix = prompt.keys_and_values(config.num_hidden_layers, config.num_key_value_heads, key)
        return Prompted(x, positions + n, segment_ids, prefix, n)
    first = jnp.broadcast_to(jnp.arange(n, dtype=positions.dtype), (batch, n))
    x = jnp.concatenate([prompt.embeddings(batch, x.dtype, key), x], axis=1)
    return Prompted(x, jnp.concatenate([first, positions + n], axis=1), segment_ids, None, n)


def check_documents(config: DecoderConfig, virtual_tokens: int, length: int) -> None:
    """Raises ValueError where rows of `length` tokens may not hold several documents beside virtual tokens."""
    longest = virtual_tokens + length
    windows = [kind.window for kind in config.kinds if kind.window is not None and kind.window < longest]
    if windows:
        raise ValueError(
            f"virtual tokens in a {config.family} with a window of {windows[0]} tokens: expected one document a row "
            "(packing off), found rows of several"
        )


def start_from_tokens(model: Any, tokens: np.ndarray) -> Any:
    """The same model, whose virtual embeddings start as those of `tokens`, int32 `[rows]`; other arrays are shared."""
    graphdef, state = nnx.split(model)
    started = nnx.merge(graphdef, state)
    decoder = isinstance(started.config, DecoderConfig)
    table, scale = (started.embed_tokens, started.config.embedding_scale) if decoder else (started.shared, 1.0)
    values = table(jnp.asarray(tokens)).astype(jnp.float32) * scale
    setattr(started.prompt, attribute_of(EMBEDDING), nnx.LoRAParam(values))
    return started
