"""Arrays in 8 bits a value, block by block (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization").

The array is read row-major and cut into blocks of 256 values; the last one may be shorter.

    scaled  = x / absmax of its block                       float32, in [-1, 1]
    code    = index of the nearest value of the dynamic map, signed or unsigned; a tie goes to the lower value
    x'      = map[code] * absmax

    codes   uint8, in the shape of the array
    absmax  float32 [ceil(size / 256)]                      1.016 bytes a value in all

The map spends its codes where moments of gradients need them: seven decades, the highest with the finest steps. What is
below half its smallest value (5.5e-8 of absmax signed, 1.6e-7 unsigned) becomes 0.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qlora_jax.quant.codebooks import dynamic_map

BLOCK = 256  # values that share an absmax


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "absmax"), meta_fields=("signed",))
@dataclasses.dataclass(frozen=True)
class BlockwiseArray:
    """An array in 8 bits a value, as the module describes it.

    Attributes:
        codes: uint8, in the shape of the array.
        absmax: float32, one of each block.
        signed: which map the codes belong to.
    """

    codes: Array
    absmax: Array
    signed: bool


def quantize_blockwise(x: Array, *, signed: bool) -> BlockwiseArray:
    """Any array of floats in 8 bits; where not `signed`, its values are to be at least 0."""
    blocks = _blocks(x.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks / jnp.where(absmax == 0, 1.0, absmax)[:, None]
    table = dynamic_map(signed)
    midpoints = jnp.asarray(np.float32(0.5) * (table[:-1] + table[1:]))

    def search(scaled: Array) -> Array:
        return jnp.searchsorted(midpoints, scaled, side="left", method="scan_unrolled").astype(jnp.uint8)

    def compare(scaled: Array) -> Array:  # on TPU gathers are slow, and comparisons are fused with the sum over them
        return jnp.searchsorted(midpoints, scaled, side="left", method="compare_all").astype(jnp.uint8)

    codes = jax.lax.platform_dependent(scaled, tpu=compare, default=search)
    return BlockwiseArray(codes.reshape(-1)[: x.size].reshape(x.shape), absmax, signed)


def dequantize_blockwise(q: BlockwiseArray) -> Array:
    """The float32 array that `q` stands for."""
    values = _blocks(lookup_dynamic(q.codes, q.signed)) * q.absmax[:, None]
    return values.reshape(-1)[: q.codes.size].reshape(q.codes.shape)


@partial(jax.jit, static_argnames="signed")  # so that in a program it is traced once for each shape
def lookup_dynamic(codes: Array, signed: bool = True) -> Array:
    """Codes of a dynamic map to float32 values: a gather, or on TPU its closed form (right to 1.1e-7)."""

    def gather(codes: Array) -> Array:
        return jnp.take(jnp.asarray(dynamic_map(signed)), codes.astype(jnp.int32), mode="clip")

    return jax.lax.platform_dependent(codes, tpu=partial(dynamic_values, signed=signed), default=gather)


def dynamic_values(codes: Array, signed: bool = True) -> Array:
    """`lookup_dynamic` by its closed form, in arithmetic alone: for TPU, and for kernels."""
    # The unsigned map has twice as many values a decade: counted from 1, they are those of the signed map from 2 on.
    number = codes.astype(jnp.int32) - (127 if signed else 0)
    lowest = 1 if signed else 2  # values of the lowest decade
    magnitude = (jnp.abs(number) + (lowest - 1)).astype(jnp.float32)
    # Anchored to the data: constants would be broadcast and hoisted out of a differentiated scan.
    zero = magnitude * 0
    power, decade = zero + float(lowest), zero + 1e-6
    for exponent in range(1, 7):
        reached = magnitude >= zero + lowest * 2**exponent
        power = jnp.where(reached, zero + float(lowest * 2**exponent), power)
        decade = jnp.where(reached, zero + 10.0 ** (exponent - 6), decade)
    value = (0.1 + 0.9 * (magnitude - power + 0.5) / power) * decade
    value = jnp.where(magnitude == lowest * 128, zero + 1.0, jnp.where(number == 0, zero, value))
    return jnp.where(number < 0, -value, value)


def _blocks(x: Array) -> Array:
    """`[blocks, 256]`, filled up with zeros."""
    count = math.ceil(x.size / BLOCK)
    return jnp.pad(x.reshape(-1), (0, count * BLOCK - x.size)).reshape(count, BLOCK)
