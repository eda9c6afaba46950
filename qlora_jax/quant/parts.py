"""Matrices that are packed in parts, so that several devices can each hold some of the rows.

In the column layout, rows j and j + in/2 share a byte. A contiguous range of the bytes therefore holds two ranges of rows
that are far apart. A matrix in n parts is packed part by part instead:

    part p      rows p in/n … (p + 1) in/n of the matrix
    its bytes   codes[p in/2n … (p + 1) in/2n]: row j of the part in the high nibble, row j + in/2n in the low one

So contiguous bytes hold contiguous rows, and a device that holds one part dequantises its rows alone. The values of the
codes, and the scales with their order, are those of the same matrix in one part. Only memory has this layout, never a file.
"""

import dataclasses

import jax

from qlora_jax.quant.tensor import QuantizedTensor, unpack

__all__ = ["can_split_rows", "with_parts"]


def can_split_rows(q: QuantizedTensor, parts: int) -> bool:
    """Return whether the rows of a matrix (or of a stack) can be packed in so many parts without splitting a block."""
    return q.flat_shape is None and q.shape[-2] % (parts * q.block_size) == 0


def with_parts(q: QuantizedTensor, parts: int) -> QuantizedTensor:
    """Return the matrix, or the stack of matrices, with the same codes packed in `parts` parts.

    Raises:
        ValueError: a part would split a block.
    """
    if parts == q.parts:
        return q
    if not can_split_rows(q, parts):
        raise ValueError(f"with_parts: expected rows that are multiples of {parts} x {q.block_size}, found {q.shape[-2]}")

    def repack(one: QuantizedTensor) -> jax.Array:
        codes = unpack(one).reshape(parts, 2, -1, one.codes.shape[-1])
        return ((codes[:, 0] << 4) | codes[:, 1]).reshape(one.codes.shape)

    for _ in q.codes.shape[:-2]:
        repack = jax.vmap(repack)
    return dataclasses.replace(q, codes=repack(q), parts=parts)
