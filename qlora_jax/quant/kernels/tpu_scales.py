"""The scales of a 4-bit matrix in a TPU kernel.

With double quantisation they are uint8 codes `[K/block, N]`, whose values are computed by a closed form. Each group of 256
scales in the order of the blocks, `n K/block + r`, has one absmax; a group consists of some columns or a part of one. A
column belongs to at most `spans` groups. Therefore the kernel gets `[spans, N]`, the absmax of each group of a column, and
row r of column n uses the entry (n K/block mod 256 + r) // 256. This is 0.1 to 0.2 % of the packed bytes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qlora_jax.quant.codebooks import SCALE_BLOCK_SIZE
from qlora_jax.quant.dynamic import dynamic_values
from qlora_jax.quant.kernels.operands import Static
from qlora_jax.quant.tensor import QuantizedTensor


def scale_operands(w: QuantizedTensor, index: Array, tile: int, column: Any) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Return the kernel's operands for the scales and their block specs.

    Args:
        w: a stack of matrices.
        index: int32 `[1]`, the index of the matrix.
        tile: number of columns in a tile.
        column: function that maps a grid step to the index of its tile of columns.
    """
    rows = w.scales.shape[1]
    arrays, specs = [w.scales], [pl.BlockSpec((1, rows, tile), lambda *i: (i[-1][0], 0, column(*i)))]
    if w.scale_absmax is not None and w.scale_offset is not None:
        absmax = spread_absmax(w.scale_absmax[index[0]], rows, w.shape[-1])
        arrays += [absmax, w.scale_offset[index[0]].reshape(1, 1)]
        specs.append(pl.BlockSpec((absmax.shape[0], tile), lambda *i: (0, column(*i))))
        specs.append(pl.BlockSpec(memory_space=pltpu.SMEM))
    return arrays, specs


def spread_absmax(absmax: Array, rows: int, columns: int) -> Array:
    """Return `[spans, columns]` from float32 `[groups]`: the absmax of a column's first group, of its second, and so on.

    The assignment of groups to columns repeats every `period` columns, or `step` groups. The values are selected by a
    product with zeros and ones, because a gather is slow on TPU.
    """
    common = math.gcd(rows, SCALE_BLOCK_SIZE)
    period, step = SCALE_BLOCK_SIZE // common, rows // common
    spans = spans_of(rows)
    if step == 1:
        return jnp.repeat(absmax, period)[None, :columns]
    repeats = -(-columns // period)
    width = step + spans - 1
    padded = jnp.pad(absmax, (0, (repeats + 1) * step + spans - absmax.size))
    parts = [padded[: repeats * step].reshape(repeats, step)]
    if spans > 1:
        parts.append(padded[step : (repeats + 1) * step].reshape(repeats, step)[:, : spans - 1])
    windows = jnp.concatenate(parts, axis=1)
    choice = np.zeros((width, spans, period), np.float32)
    for column in range(period):
        for span in range(spans):
            choice[min(column * rows // SCALE_BLOCK_SIZE + span, width - 1), span, column] = 1
    spread = jnp.einsum("gw,wsp->sgp", windows, jnp.asarray(choice), precision="highest")
    return spread.reshape(spans, -1)[:, :columns]


def spans_of(rows: int) -> int:
    """Return the largest number of groups of 256 scales that a column of `rows` scales belongs to."""
    common = math.gcd(rows, SCALE_BLOCK_SIZE)
    return (SCALE_BLOCK_SIZE - common + rows - 1) // SCALE_BLOCK_SIZE + 1


def write_scales(scales: Any, rest: tuple[Any, ...], out: Any, at: Any, first_column: Any, w: Static) -> None:
    """Write the scales as float32 into columns `at` of `out` `[scale rows, columns]`, from column `first_column` of W on."""
    codes = scales[0, :, at]
    if not w.double_quantized:
        out[:, at] = codes
        return
    absmax, offset = rest
    groups = absmax[0:1, at]
    if absmax.shape[0] > 1:
        column = first_column + jax.lax.broadcasted_iota(jnp.int32, codes.shape, 1)
        row = jax.lax.broadcasted_iota(jnp.int32, codes.shape, 0)
        span = (((column * w.scale_rows) & (SCALE_BLOCK_SIZE - 1)) + row) >> 8  # Pallas' // needs an attached TPU
        groups = jnp.broadcast_to(groups, codes.shape)
        for number in range(1, absmax.shape[0]):
            groups = jnp.where(span == number, absmax[number : number + 1, at], groups)
    out[:, at] = dynamic_values(codes) * groups + offset[0, 0]
