"""The kinds of attention of a decoder in its scan over layers.

If layers differ in their attention (window, position embedding), the scanned program contains every kind, and the index of a
layer's kind selects one at run time.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32, Int

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn import AttentionTarget, causal_attention, shifted_group_attention
from qlora_jax.quant import by_platform


def layer_kinds(config: DecoderConfig) -> Int[Array, " layers"] | None:
    """Return the index of each layer's kind of attention, int32, or None if all layers have the same kind."""
    return None if len(config.kinds) == 1 else jnp.asarray(np.asarray(config.layer_kinds, np.int32))


def rotations_of(
    config: DecoderConfig, positions: Int[Array, "b t"], lengths: Int[Array, "b t"] | None = None
) -> tuple[Float32[Array, "kinds b t r"], Float32[Array, "kinds b t r"]]:
    """Return (cosine, sine) of the positions for each kind of attention; (1, 0) for a kind without position embedding.

    Args:
        config: the configuration of the model.
        positions: int32 `[b, t]`.
        lengths: int32 `[b, t]` or `[b, 1]`, the lengths of the texts, for positions that do not show them; see `nn.rope`.
    """
    ropes = [kind.rope for kind in config.kinds]
    some = next(rope for rope in ropes if rope is not None)
    shape = (*positions.shape, some.head_dim // 2)
    rotations = [(jnp.ones(shape), jnp.zeros(shape)) if rope is None else rope(positions, lengths) for rope in ropes]
    cosines, sines = zip(*rotations, strict=True)
    return jnp.stack(cosines), jnp.stack(sines)


def cache_lasts(config: DecoderConfig, length: int) -> int | None:
    """Return the length up to which the cached keys of a text of `length` tokens are right when it grows; None: always."""
    lasts = [kind.rope.lasts(length) for kind in config.kinds if kind.rope is not None]
    return min((last for last in lasts if last is not None), default=None)


def of_kind(rotations: tuple[Array, Array], kind: Array | None) -> tuple[Array, Array]:
    """Return the (cosine, sine) of one kind, `[b, t, r]` each; None: the only kind."""
    cosine, sine = rotations
    return (cosine[0], sine[0]) if kind is None else (cosine[kind], sine[kind])


def with_window(
    attend: Callable[..., Array], config: DecoderConfig, kind: Array | None, q: Array, k: Array, v: Array
) -> Array:
    """Return `attend(q, k, v, window=…)` for the window of a layer's kind; None: the only kind.

    The index `kind` is known at run time, the list of kinds at compile time: each window has a branch of its own.
    """
    windows = list(dict.fromkeys(kind.window for kind in config.kinds))
    if kind is None or len(windows) == 1:
        return attend(q, k, v, window=windows[0])
    choice = np.asarray([windows.index(kind.window) for kind in config.kinds], np.int32)
    branches = [partial(attend, window=window) for window in windows]

    def attended(index: Array, q: Array, k: Array, v: Array) -> Array:
        return jax.lax.switch(index, branches, q, k, v)

    def between_barriers(*operands: Array) -> Array:
        return jax.lax.optimization_barrier(attended(*jax.lax.optimization_barrier(operands)))

    # Without the barriers, libtpu 0.0.42 cannot order the instructions around the branches on several v5e or v6e chips with
    # heads of 64, and refuses the program with an internal error.
    return by_platform(jnp.asarray(choice)[kind], q, k, v, tpu=between_barriers, default=attended)


def attend_of_kind(
    config: DecoderConfig,
    target: AttentionTarget,
    kind: Array | None,
    qkv: tuple[Array, Array, Array],
    documents: tuple[Array | None, int],
    groups: int,
) -> Array:
    """Return the causal attention of a layer's kind, `[b, t, heads, head_dim]`.

    Args:
        config: the configuration of the model.
        target: the device whose kernel computes attention.
        kind: the index of the kind; None: the only kind.
        qkv: queries, keys and values.
        documents: the segment ids of packed documents or None, and the number of first keys that all documents share.
        groups: the number of groups of LongLoRA's attention.
    """
    segment_ids, shared = documents
    attend = partial(
        partial(causal_attention, shared=shared) if groups == 1 else partial(shifted_group_attention, groups=groups),
        segment_ids=segment_ids,
        scale=config.score_scale,
        cap=config.score_cap,
        target=target,
    )
    return with_window(attend, config, kind, *qkv)
