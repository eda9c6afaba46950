"""The lookup of 4-bit codes in a TPU kernel.

A gather along the 8 sublanes of a register is one instruction of the vector unit (`vperm.slane`). The 16 values of the
codebook are in two registers of 8, and a lookup consists of two gathers by the code's low three bits and a select by its top
bit. This takes 6.5 instructions per value including unpacking, compared with 23 for a tree of 15 selects. The values are
exact float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from qlora_jax.quant.codebooks import DataType, codebook


def lookup_tables(data_type: DataType, columns: int) -> tuple[Array, Array]:
    """Return the values of the codes 0-7 and of the codes 8-15, float32 `[8, columns]` each, one value in each sublane."""
    sublane = jax.lax.broadcasted_iota(jnp.int32, (8, columns), 0)
    values = codebook(data_type)

    def table(first: int) -> Array:
        rows = jnp.full((8, columns), float(values[first]), jnp.float32)
        for number in range(1, 8):
            rows = jnp.where(sublane == number, float(values[first + number]), rows)
        return rows

    return table(0), table(8)


def scaled_values(codes: Array, scales: Any, scale_rows: Sequence[Any], at: Any, tables: tuple[Array, Array]) -> Array:
    """Return the scaled float32 values of codes 0-15, int32 `[n, columns]`.

    Args:
        codes: the codes, in as many groups of rows as there are `scale_rows`.
        scales: scratch buffer of float32 scales.
        scale_rows: for each group, the row of its scales in the buffer.
        at: the columns of the scales.
        tables: the result of `lookup_tables`.
    """
    count, columns = codes.shape
    grouped = codes.reshape(count // 8, 8, columns)
    low, high = (
        jnp.take_along_axis(jnp.broadcast_to(table, grouped.shape), grouped & 7, axis=1, mode="promise_in_bounds")
        for table in tables
    )
    values = jnp.where(grouped >= 8, high, low).reshape(count, columns)
    size = count // len(scale_rows)
    groups = [
        values[number * size : (number + 1) * size] * scales[pl.ds(row, 1), at] for number, row in enumerate(scale_rows)
    ]
    return groups[0] if len(groups) == 1 else jnp.concatenate(groups, axis=0)
