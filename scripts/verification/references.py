"""What results on a device are compared with: NumPy in float64, from the stored codes and the rounded operands.

The error is relative and of the whole array, |found - expected| / |expected| in the Euclidean norm, because single values
of a sum may be near 0. `LIMITS` are those of the kernels on a CPU and in interpret mode: float32 sums of some hundred
products, and a bfloat16 result, which alone is rounded by up to 2e-3 of each value.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qlora_jax.quant import SCALE_BLOCK_SIZE, QuantizedTensor, codebook, dynamic_map

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3}


def relative_error(found: Any, expected: np.ndarray) -> float:
    """Return the relative error of an array in the Euclidean norm."""
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


def dense_matrix(q: QuantizedTensor) -> np.ndarray:
    """Return the float64 matrix `[in, out]` that the codes and scales of `q`, one matrix, stand for."""
    rows, columns = q.shape
    codes, scales = np.asarray(q.codes), np.asarray(q.scales)
    values = np.asarray(codebook(q.data_type), np.float64)
    in_blocks = scales.T.reshape(-1) if q.flat_shape is None else scales  # in the order of the blocks
    if q.scale_absmax is None or q.scale_offset is None:
        in_blocks = in_blocks.astype(np.float64)
    else:
        groups = np.asarray(q.scale_absmax, np.float64)[np.arange(in_blocks.size) // SCALE_BLOCK_SIZE]
        in_blocks = np.asarray(dynamic_map(), np.float64)[in_blocks] * groups + float(q.scale_offset)
    if q.flat_shape is None:  # [in/2, out]: the first half of the rows is in the high nibbles
        unpacked = values[np.concatenate([codes >> 4, codes & 15])]
        return unpacked * np.repeat(in_blocks.reshape(columns, -1).T, q.block_size, axis=0)
    unpacked = values[np.concatenate([codes >> 4, codes & 15], axis=1)] * in_blocks[:, None]
    return unpacked.reshape(-1)[: rows * columns].reshape(columns, rows).T


def rounding_error(found: np.ndarray, exact: np.ndarray, table: np.ndarray, absmax: np.ndarray) -> float:
    """Return by how much the stored values are farther from the exact ones than the nearest of the table, of absmax.

    Args:
        found: what the codes stand for, `[n, block]`.
        exact: what was quantised, `[n, block]`.
        table: the values of the codes.
        absmax: the scale of each block, `[n]`.
    """
    absmax = np.asarray(absmax, np.float64)[:, None]
    nearest = np.abs((exact / absmax)[..., None] - np.asarray(table, np.float64)).min(-1)
    return float((np.abs(found / absmax - exact / absmax) - nearest).max())


def causal_mask(length: int, segments: np.ndarray | None = None, window: int | None = None, shared: int = 0) -> np.ndarray:
    """Return bool `[b or 1, t, t]`: which keys each query attends to, as `nn.causal_attention` describes it."""
    queries, keys = np.arange(length)[:, None], np.arange(length)
    mask = ((keys <= queries) & (keys > queries - (window or length)))[None]
    if segments is None:
        return mask
    same = (segments[:, :, None] == segments[:, None, :]) | (keys < shared)
    return mask & same & (segments > 0)[:, None, :]


def attention(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, mask: np.ndarray, gradient: ArrayLike, cap: float | None = None
) -> dict[str, np.ndarray]:
    """Return the result of attention and the gradients of q, k and v, all in float64.

    Args:
        q: `[b, t, heads, d]`.
        k, v: `[b, s, kv_heads, d]`.
        mask: bool `[b or 1, t, s]`; the result of a query without keys is 0.
        gradient: the gradient of the result, `[b, t, heads, d]`.
        cap: scores become cap * tanh(score / cap); None: no cap.
    """
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    (batch, _, heads, d), kv_heads = q.shape, k.shape[2]
    group, scale = heads // kv_heads, d**-0.5
    k_all, v_all = (np.repeat(x, group, axis=2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k_all) * scale
    bent = scores if cap is None else cap * np.tanh(scores / cap)
    seen = np.where(mask[:, None], bent, -np.inf)
    highest = seen.max(-1, keepdims=True)
    weights = np.exp(seen - np.where(np.isfinite(highest), highest, 0.0))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    d_weights = np.einsum("bthd,bshd->bhts", gradient, v_all)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    if cap is not None:
        d_scores = d_scores * (1 - (bent / cap) ** 2)

    def of_groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, -1, kv_heads, group, d).sum(3)

    return {
        "result": np.einsum("bhts,bshd->bthd", weights, v_all),
        "gradient of q": np.einsum("bhts,bshd->bthd", d_scores, k_all),
        "gradient of k": of_groups(np.einsum("bhts,bthd->bshd", d_scores, q)),
        "gradient of v": of_groups(np.einsum("bhts,bthd->bshd", weights, gradient)),
    }
