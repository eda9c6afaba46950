"""JAX's splash attention, a Pallas kernel for TPUs, on each device's own rows."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from qlora_jax.nn.attention_target import SPLASH_TILES
from qlora_jax.nn.parallel import shard_rows

_WIDE = 1024  # bytes of a head; with more, the largest tiles do not fit into the memory of a core


def splash_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b t kv_heads d"],
    v: Float[Array, "b t kv_heads d"],
    segment_ids: Int[Array, "b t"] | None,
    window: int | None,
    scale: float,
    cap: float | None,
) -> Float[Array, "b t heads d"]:
    """Return causal attention, `[b, t, heads, d]`; see `attention.causal_attention` for the arguments.

    t must be a multiple of 128, and d of 64.
    """
    # The modules are imported here, because they import the TPU's part of Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    largest = SPLASH_TILES[0] if q.shape[-1] * q.dtype.itemsize <= _WIDE else SPLASH_TILES[0] // 2
    block = next(tile for tile in SPLASH_TILES if tile <= largest and length % tile == 0)
    shape = (length, length)
    one_head = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    mask = masks.MultiHeadMask([one_head] * heads)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    attend = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, attn_logits_soft_cap=cap)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * scale, k, v))
    segments = None if segment_ids is None else kernel.SegmentIds(segment_ids, segment_ids)
    return jnp.swapaxes(shard_rows(jax.vmap(attend))(q, k, v, segments), 1, 2)
