"""Shifted sparse attention, S²-Attn (LongLoRA, Chen et al. 2023): a cheaper attention for training on long sequences.

    tokens            | 0 ......... | G ......... | 2G ........ | 3G ........ |       groups of G tokens
    half of the heads | group 0     | group 1     | group 2     | group 3     |       attend within these groups
    the other half    | a    | group 0'    | group 1'    | group 2'    | b    |       attend within groups shifted by G / 2

Each token attends to the earlier tokens of its group. Tokens on both sides of a border of one half of the heads belong to
one group of the other half. The authors roll the sequence by half a group, so that its two ends, a and b, share a group and
have to be separated by a mask. Here each end is a group of length G / 2, so no mask is needed and no product is wasted.

The groups are passed to the kernels of `attention` as rows of the batch, so that flash attention works as usual. The cost is
that of length x G scores instead of length x length. Positions are those of the whole sequence, because rotary
embeddings are applied before. At inference, a model trained in this way attends to all tokens.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qlora_jax.errors import OptionError
from qlora_jax.nn.attention import causal_attention
from qlora_jax.nn.attention_target import CPU, AttentionTarget

Parts = tuple[Array, Array, Array, Array | None]  # queries, keys, values, segments


def shifted_group_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads d"],
    groups: int,
    *,
    segment_ids: Int[Array, "b t"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    target: AttentionTarget = CPU,
) -> Float[Array, "b t heads d"]:
    """Compute causal attention within groups; see `causal_attention` for the other arguments.

    Args:
        q: `[b, t, heads, d]`.
        k: `[b, t, kv_heads, d]`.
        v: `[b, t, kv_heads, d]`.
        groups: number of groups in the sequence. If t is not a multiple of 2 groups, the last group is shorter.

    Returns:
        `[b, t, heads, d]` in the dtype of q.

    Raises:
        OptionError: fewer than two groups, or only one head, which cannot be halved.
    """
    length, heads = q.shape[1:3]
    if groups < 2 or heads < 2:
        raise OptionError(f"groups, heads: expected at least 2 of each, found {groups} and {heads}")
    half, shared = heads // 2, heads // k.shape[2]
    if half % shared:  # the query heads of one key head belong to both halves
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
        shared = 1
    end = -(-length // (2 * groups))  # half a group
    size, total = 2 * end, 2 * end * groups
    padded = ((0, 0), (0, total - length))  # after all tokens, so that no token attends to it
    q, k, v = (jnp.pad(x, (*padded, (0, 0), (0, 0))) for x in (q, k, v))
    segments = None if segment_ids is None else jnp.pad(segment_ids, padded)

    def attend(parts: Parts, size: int) -> Array:
        """Compute attention within consecutive groups of this size."""
        q, k, v, segments = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), parts)
        out = causal_attention(q, k, v, segment_ids=segments, window=window, scale=scale, cap=cap, target=target)
        return out.reshape(parts[0].shape)

    def select(parts: Parts, *ranges: tuple[int, int]) -> Parts:
        return jax.tree.map(lambda x: jnp.concatenate([x[:, start:stop] for start, stop in ranges], axis=1), parts)

    first = (q[:, :, :half], k[:, :, : half // shared], v[:, :, : half // shared], segments)
    second = (q[:, :, half:], k[:, :, half // shared :], v[:, :, half // shared :], segments)
    ends = attend(select(second, (0, end), (total - end, total)), end)
    inner = attend(select(second, (end, total - end)), size)
    shifted = jnp.concatenate([ends[:, :end], inner, ends[:, end:]], axis=1)
    return jnp.concatenate([attend(first, size), shifted], axis=2)[:, :length]
