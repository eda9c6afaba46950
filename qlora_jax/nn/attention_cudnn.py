"""cuDNN's flash attention with numbers of valid queries and keys, and with the softmax's statistics as a result.

Both passes are the custom calls that XLA hands to cuDNN, written as JAX's own cuDNN attention writes them. Its public
function (`jax.nn.dot_product_attention`) cannot be used, because it returns the statistics in the dtype of the queries, and
because its backward pass takes the result of its own forward pass only. Here the backward pass takes any result and any
statistics. Given those of a softmax over more keys than those of the call, it returns the gradients that come from the keys
of the call, since each score's gradient depends on the other scores through these two alone (FlashAttention, Dao et al.
2022, section B.2). `attention_packed` adds up attention from such parts.

    call        operands                                                          results
    forward     q, k, v, valid queries, valid keys                                out, statistics
    backward    q, k, v, statistics, gradient, out, valid queries, valid keys     dq, dk, dv

Each call has one more result, its workspace, whose size XLA asks cuDNN for. `scripts/verify_device.py` compares all this
with NumPy on a GPU.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32

_TYPES = {"bfloat16": "BF16", "float16": "F16"}
# XLA reads strings where protocol buffers have 64-bit integers.
_ROW_MAJOR = {
    "dim_level_types": [],
    "dim_unique": [],
    "dim_ordered": [],
    "minor_to_major": ["3", "2", "1", "0"],
    "tiles": [],
    "element_size_in_bits": "0",
    "memory_space": "0",
    "index_primitive_type": "PRIMITIVE_TYPE_INVALID",
    "pointer_primitive_type": "PRIMITIVE_TYPE_INVALID",
    "dynamic_shape_metadata_prefix_bytes": "0",
}
_ALGORITHM = {
    "algo_id": "0",
    "math_type": "TENSOR_OP_MATH",
    "tuning_knobs": {"17": "1", "24": "0"},
    "is_cudnn_frontend": True,
    "workspace_size": "0",
}
# (contracted axes, axes of the batch) of each product's two operands: queries and results `[b, t, heads, d]`, scores
# `[b, heads, t, s]`.
_FORWARD_PRODUCTS = {
    "bmm1": ((3, 3), ((0, 2), (0, 2))),
    "bmm2": ((3, 1), ((0, 1), (0, 2))),
}
_BACKWARD_PRODUCTS = {
    "bmm1_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm1_grad_gemm2": ((3, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm1": ((2, 1), ((0, 1), (0, 2))),
    "bmm2_grad_gemm2": ((3, 3), ((0, 2), (0, 2))),
}


def flash_attention(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    lengths: tuple[Int32[Array, " b"], Int32[Array, " b"]],
    *,
    scale: float,
    causal: bool,
) -> tuple[Float[Array, "b t heads d"], Float32[Array, "b heads t"]]:
    """Return (result, logarithm of the softmax's normalizer) of the first queries to the first keys of each row.

    Args:
        q: `[b, t, heads, d]`, bfloat16 or float16; d is a multiple of 8.
        k: `[b, s, kv_heads, d]`.
        v: `[b, s, kv_heads, d]`.
        lengths: (valid queries, valid keys), int32 `[b]` each, at least 1: some versions of cuDNN take no 0.
        scale: factor on the scores q·k.
        causal: whether query i attends to the keys 0 … i only.

    Returns:
        `[b, t, heads, d]` in the dtype of q and float32 `[b, heads, t]`, both undefined for queries that are not valid.
    """
    statistics = jax.ShapeDtypeStruct((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
    config = _config(q, k, scale, causal, backward=False)
    results = _call("__cudnn$fmhaSoftmax", (q, k, v, *lengths), [q], [statistics], config)
    return results[0], results[1]


def flash_gradients(
    q: Float[Array, "b t heads d"],
    k: Float[Array, "b s kv_heads d"],
    v: Float[Array, "b s kv_heads d"],
    saved: tuple[Float[Array, "b t heads d"], Float32[Array, "b heads t"], Float[Array, "b t heads d"]],
    lengths: tuple[Int32[Array, " b"], Int32[Array, " b"]],
    *,
    scale: float,
    causal: bool,
) -> tuple[Float[Array, "b t heads d"], Float[Array, "b s kv_heads d"], Float[Array, "b s kv_heads d"]]:
    """Return the gradients of q, k and v that come from the scores of `flash_attention`, in their dtypes.

    Args:
        q, k, v: as in `flash_attention`.
        saved: (result, logarithm of the normalizer, gradient of the result) of a softmax over these and maybe more keys.
        lengths: as in `flash_attention`.
        scale: factor on the scores.
        causal: as in `flash_attention`.

    Returns:
        Three arrays, undefined for queries and keys that are not valid.
    """
    out, statistics, gradient = saved
    operands = (q, k, v, statistics, gradient, out, *lengths)
    config = _config(q, k, scale, causal, backward=True)
    results = _call("__cudnn$fmhaSoftmaxBackward", operands, [q, k, v], [], config)
    return results[0], results[1], results[2]


def _call(
    name: str, operands: tuple[Array, ...], like: list[Array], more: list[jax.ShapeDtypeStruct], config: str
) -> list[Any]:
    """Call cuDNN; return the results, of which the first have the shapes of the arrays `like`, and the next those of `more`.

    For XLA the first are `[b, heads, t, d]`, in memory as `[b, t, heads, d]`.
    """
    shapes = [jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in like]
    shapes = [*shapes, *more, jax.ShapeDtypeStruct((0,), jnp.uint8)]  # the workspace, which XLA replaces
    call = jax.ffi.ffi_call(
        name,
        shapes,
        output_layouts=[(0, 2, 1, 3) if len(x.shape) == 4 else None for x in shapes],
        custom_call_api_version=2,
        legacy_backend_config=config,
    )
    results: Any = call(*operands)
    return [x.swapaxes(1, 2) if x.ndim == 4 else x for x in results]


def _config(q: Array, k: Array, scale: float, causal: bool, *, backward: bool) -> str:
    """Return the JSON that tells XLA what to ask of cuDNN (its `CudnnfMHABackendConfig`)."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    products = {
        f"{name}_dot_dimension_numbers": {
            "lhs_contracting_dimensions": [str(contracted[0])],
            "rhs_contracting_dimensions": [str(contracted[1])],
            "lhs_batch_dimensions": [str(axis) for axis in axes[0]],
            "rhs_batch_dimensions": [str(axis) for axis in axes[1]],
        }
        for name, (contracted, axes) in (_BACKWARD_PRODUCTS if backward else _FORWARD_PRODUCTS).items()
    }
    config = {
        "algorithm": _ALGORITHM,
        "fmha_scale": scale,
        "intermediate_tensor_shape": {
            "element_type": _TYPES[q.dtype.name],
            "dimensions": [str(size) for size in (batch, heads, queries, keys)],
            "tuple_shapes": [],
            "layout": _ROW_MAJOR,
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "PADDING_CAUSAL" if causal else "PADDING",
        **products,
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config})
