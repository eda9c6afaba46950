"""Shifted sparse attention, S²-Attn (LongLoRA, Chen et al. 2023): cheap attention to train a model on long sequences with.

    tokens            | 0 ......... | G ......... | 2G ........ | 3G ........ |       groups of G tokens
    half of the heads | group 0     | group 1     | group 2     | group 3     |       see their own group alone
    the other half    | a    | group 0'    | group 1'    | group 2'    | b    |       the same, groups half a group later

Each token sees what comes before it in its group; what crosses a border of one half of the heads lies within a group of the
other. The authors roll the sequence by half a group, so that its two ends, a and b, share a group and a mask has to keep one
from the other. Here both ends are groups of half the length: nothing wraps that could leak, and no product is made for a
mask to throw away.

Groups are rows of a batch to the kernels of `attention`, so that flash attention works as it does without groups. The cost
is that of length x G scores in place of length x length, and less by the ends. Positions stay those of the sequence: the
rotation comes before. The model that was so trained sees all tokens at inference.
"""

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.nn.attention import AttentionImplementation, causal_attention

Parts = tuple[Array, Array, Array, Array | None]  # queries, keys, values, segments


def shifted_group_attention(
    q: Array,
    k: Array,
    v: Array,
    groups: int,
    *,
    segment_ids: Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    implementation: AttentionImplementation = "xla",
) -> Array:
    """Causal attention within groups; the arguments are those of `causal_attention` but for one.

    Args:
        groups: how many groups the sequence makes. Where it is no multiple of twice that, the last group is shorter.

    Returns:
        `[b, t, heads, d]` in the dtype of q.

    Raises:
        ValueError: less than two groups, or one head only, which cannot be two halves.
    """
    length, heads = q.shape[1:3]
    if groups < 2 or heads < 2:
        raise ValueError(f"groups, heads: expected at least 2 of each, found {groups} and {heads}")
    half, shared = heads // 2, heads // k.shape[2]
    if half % shared:  # the halves meet within the query heads of one key head
        k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
        shared = 1
    end = -(-length // (2 * groups))  # half a group
    size, total = 2 * end, 2 * end * groups
    padded = ((0, 0), (0, total - length))  # behind all tokens, which do not see it
    q, k, v = (jnp.pad(x, (*padded, (0, 0), (0, 0))) for x in (q, k, v))
    segments = None if segment_ids is None else jnp.pad(segment_ids, padded)

    def attend(parts: Parts, size: int) -> Array:
        """Attention within groups of that size, which lie one after another."""
        q, k, v, segments = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[2:]), parts)
        out = causal_attention(
            q, k, v, segment_ids=segments, window=window, scale=scale, cap=cap, implementation=implementation
        )
        return out.reshape(parts[0].shape)

    def cut(parts: Parts, *places: tuple[int, int]) -> Parts:
        return jax.tree.map(lambda x: jnp.concatenate([x[:, start:stop] for start, stop in places], axis=1), parts)

    near = (q[:, :, :half], k[:, :, : half // shared], v[:, :, : half // shared], segments)
    late = (q[:, :, half:], k[:, :, half // shared :], v[:, :, half // shared :], segments)
    ends = attend(cut(late, (0, end), (total - end, total)), end)
    inner = attend(cut(late, (end, total - end)), size)
    shifted = jnp.concatenate([ends[:, :end], inner, ends[:, end:]], axis=1)
    return jnp.concatenate([attend(near, size), shifted], axis=2)[:, :length]
