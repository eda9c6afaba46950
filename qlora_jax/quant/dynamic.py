"""Block-wise 8-bit quantisation of arrays (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization").

The array is read in row-major order and split into blocks of 256 values; the last block may be shorter.

    scaled  = x / absmax of its block                       float32, in [-1, 1]
    code    = index of the nearest value of the dynamic map, signed or unsigned; ties are rounded to the lower value
    x'      = map[code] * absmax

    codes   uint8, in the shape of the array
    absmax  float32 [ceil(size / 256)]                      1.016 bytes per value in total

The map's values suit the moments of gradients: they cover seven decades, with the finest steps in the highest decade. Values
below half of the map's smallest value (5.5e-8 of absmax for the signed map, 1.6e-7 for the unsigned one) become 0.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from qlora_jax.quant.codebooks import dynamic_map
from qlora_jax.quant.targets import by_platform

BLOCK = 256  # values that share an absmax


@partial(jax.tree_util.register_dataclass, data_fields=("codes", "absmax"), meta_fields=("signed",))
@dataclasses.dataclass(frozen=True)
class BlockwiseArray:
    """An array in block-wise 8-bit quantisation, in the layout that the module's docstring describes.

    Attributes:
        codes: uint8, in the shape of the array.
        absmax: float32 `[ceil(size / 256)]`, one for each block.
        signed: whether the codes belong to the signed map.
    """

    codes: Array
    absmax: Array
    signed: bool


def quantize_blockwise(x: Float[Array, "*shape"], *, signed: bool) -> BlockwiseArray:
    """Quantise an array of floats of any shape to 8 bits.

    Args:
        x: the array; its values must not be negative unless `signed`.
        signed: whether to use the signed map.
    """
    blocks = _blocks(x.astype(jnp.float32))
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    scaled = blocks / jnp.where(absmax == 0, 1.0, absmax)[:, None]
    table = dynamic_map(signed)
    midpoints = jnp.asarray(np.float32(0.5) * (table[:-1] + table[1:]))

    def search(scaled: Array) -> Array:
        return jnp.searchsorted(midpoints, scaled, side="left", method="scan_unrolled").astype(jnp.uint8)

    def compare(scaled: Array) -> Array:  # on TPU, where gathers are slow and comparisons are fused with their sum
        return jnp.searchsorted(midpoints, scaled, side="left", method="compare_all").astype(jnp.uint8)

    codes = by_platform(scaled, tpu=compare, default=search)
    return BlockwiseArray(codes.reshape(-1)[: x.size].reshape(x.shape), absmax, signed)


def dequantize_blockwise(q: BlockwiseArray) -> Float32[Array, "*shape"]:
    """Return the array that `q` represents, float32 in its shape."""
    values = _blocks(lookup_dynamic(q.codes, q.signed)) * q.absmax[:, None]
    return values.reshape(-1)[: q.codes.size].reshape(q.codes.shape)


@partial(jax.jit, static_argnames="signed")  # jitted so that a program traces it only once for each shape
def lookup_dynamic(codes: Array, signed: bool = True) -> Array:
    """Return the float32 values of codes of a dynamic map, by a gather or, on TPU, the closed form (error <= 1.1e-7)."""

    def gather(codes: Array) -> Array:
        return jnp.take(jnp.asarray(dynamic_map(signed)), codes.astype(jnp.int32), mode="clip")

    return by_platform(codes, tpu=partial(dynamic_values, signed=signed), default=gather)


def dynamic_values(codes: Array, signed: bool = True) -> Array:
    """Compute `lookup_dynamic` by the closed form, which needs only arithmetic; for TPU and for kernels."""
    # The unsigned map has twice as many values in each decade. Counted from 1, they are those of the signed map from 2 on.
    number = codes.astype(jnp.int32) - (127 if signed else 0)
    lowest = 1 if signed else 2  # number of values in the lowest decade
    magnitude = (jnp.abs(number) + (lowest - 1)).astype(jnp.float32)
    # Computed from the data, because JAX would broadcast constants and hoist them out of a differentiated scan.
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
    """Return x as `[blocks, 256]`, padded with zeros."""
    count = math.ceil(x.size / BLOCK)
    return jnp.pad(x.reshape(-1), (0, count * BLOCK - x.size)).reshape(count, BLOCK)
