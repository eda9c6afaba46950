"""The codebooks of the 4-bit data types, and the 8-bit maps for their scales and for the moments of optimizers.

A codebook has 16 float32 values in [-1, 1]. A weight, divided by the absolute maximum of its block, is stored as the index
of the nearest value. The borders are the float32 midpoints of neighbouring values, and a weight that is exactly on a border
is rounded to the lower value.

    nf4       NormalFloat (QLoRA, section 3): quantiles of the standard normal, one exact zero, sorted by value
    nf3, nf2  NormalFloat with 8 and with 4 values
    fp4       E2M1 in bitsandbytes' order: bit 3 is the sign, bits 0-2 select from {0, 1/16, 8, 12, 4, 6, 2, 3} / 12
    fp4-e2m1  E2M1 of the OCP's formats: bits 0-2 select from {0, 1/2, 1, 3/2, 2, 3, 4, 6} / 6. The values are those of fp4
              except the smallest, which is 1/12 instead of 1/192
    fp4-e3m0  three bits of exponent: bit 3 is the sign, bits 0-2 select from {0, 1, 2, 4, 8, 16, 32, 64} / 64
    int4      symmetric integers -7 … 7 divided by 7 (absmax); the index is the integer + 7

Codebooks with fewer values are padded with ones, whose codes are never written: every code is stored in 4 bits
(`code_bits` returns the number of bits that would be enough).

NormalFloat of k bits has h = 2^(k - 1) positive values and h - 1 negative ones. With Φ⁻¹ the quantile function of N(0, 1),

    positive   Φ⁻¹(p) for h equally spaced p from δ towards 1/2, which is excluded
    negative   -Φ⁻¹(p) for h - 1 equally spaced p in the same range; all values are divided by Φ⁻¹(δ)
    δ          1 - (1 / (2^k - 1) + 1 / 2^k) / 4, rounded to seven places: the mean distance of half a step from 1 of the two
               sides' quantiles

For 4 bits δ is the 0.9677083 of bitsandbytes' `create_normal_map`, and in its float32 arithmetic the values equal its NF4
codebook bit for bit. (LoftQ's program uses the 4-bit δ for 2 bits; on normal weights both codebooks have the same error.)

The 8-bit signed dynamic map (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization") has 127 negative
values, 0 at index 127 and 128 positive ones. With n = index - 127, a = |n| and 2^i the largest power of two <= a, its value
is sign(n) * (0.1 + 0.9 (a - 2^i + 1/2) / 2^i) * 10^(i - 6); 0 at a = 0 and 1 at a = 128. The unsigned map spends the sign's
bit on fractions: 0, then 2^(i + 1) values in decade i instead of 2^i, then 1.
"""

from functools import cache
from statistics import NormalDist
from typing import Literal, get_args

import numpy as np

from qlora_jax.errors import OptionError

DataType = Literal["nf4", "fp4", "int4", "fp4-e2m1", "fp4-e3m0", "nf3", "nf2"]
DATA_TYPES: tuple[DataType, ...] = get_args(DataType)

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SCALE_BLOCK_SIZE = 256  # scales that share one float32 absmax under double quantisation

_CODES = 16  # values of a codebook
_NORMAL_FLOAT = {"nf4": 4, "nf3": 3, "nf2": 2}  # bits
_MAGNITUDES = {  # values of the floating-point data types, by the bits below the sign
    "fp4": (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0),
    "fp4-e2m1": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "fp4-e3m0": (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
}


@cache
def codebook(data_type: DataType) -> np.ndarray:
    """Return the 16 values of a data type, float32, by code.

    Raises:
        OptionError: an unknown data type.
    """
    if data_type in _NORMAL_FLOAT:
        values = _normal_float(_NORMAL_FLOAT[data_type])
    elif data_type in _MAGNITUDES:
        magnitudes = np.asarray(_MAGNITUDES[data_type], np.float32)
        values = np.concatenate([magnitudes, -magnitudes]) / magnitudes.max()
    elif data_type == "int4":
        values = np.arange(-7, 8, dtype=np.float32) / np.float32(7.0)
    else:
        raise OptionError(f"unknown data type {data_type!r}; expected one of {', '.join(DATA_TYPES)}")
    values = np.pad(values, (0, _CODES - values.size), constant_values=1)
    values.setflags(write=False)
    return values


def code_bits(data_type: DataType) -> int:
    """Return the number of bits that a code needs; it is stored in 4."""
    return _NORMAL_FLOAT.get(data_type, 4)


@cache
def borders(data_type: DataType) -> tuple[np.ndarray, np.ndarray]:
    """Return (borders, codes): `codes[i]` is the code of a value with exactly i of the 15 sorted borders strictly below it.

    Borders are the float32 midpoints of neighbouring values. Floating-point data types have two codes for zero. As on
    bitsandbytes' CPU path, the border between them is 0, so that small positive values get code 8 (the value is the same).
    """
    table = codebook(data_type)
    codes = np.argsort(table, kind="stable")
    values = table[codes]
    return (values[:-1] + values[1:]) / np.float32(2.0), codes.astype(np.uint8)


@cache
def dynamic_map(signed: bool = True) -> np.ndarray:
    """Return the 256 float32 values of a dynamic map in ascending order; they equal those of bitsandbytes bit for bit."""
    positive: list[np.ndarray] = []
    for exponent in range(7):
        edges = _linspace(0.1, 1.0, 2 ** (exponent if signed else exponent + 1) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2.0)
        positive.append(np.float32(10.0 ** (exponent - 6)) * means)
    magnitudes = np.concatenate(positive)
    negative = -magnitudes if signed else magnitudes[:0]
    values = np.sort(np.concatenate([negative, [np.float32(0.0)], magnitudes, [np.float32(1.0)]]))
    values = values.astype(np.float32)
    values.setflags(write=False)
    return values


def _normal_float(bits: int) -> np.ndarray:
    """Return the values of NormalFloat in ascending order; the module's docstring defines them."""
    half, end = 2 ** (bits - 1), round(1 - (1 / (2**bits - 1) + 1 / 2**bits) / 4, 7)
    positive, negative = (
        np.asarray([NormalDist().inv_cdf(float(p)) for p in _linspace(end, 0.5, count + 1)[:-1]], np.float32)
        for count in (half, half - 1)
    )
    values = np.sort(np.concatenate([positive, -negative, np.zeros(1, np.float32)]))
    return values / values[-1]


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """Return `count` float32 points from first to last; like torch, each half is computed in float32 from its own end."""
    start, end = np.float32(first), np.float32(last)
    step = np.float32((end - start) / np.float32(count - 1))
    index = np.arange(count)
    # Product and sum are rounded only once, because torch fuses them.
    low = (np.float64(start) + np.float64(step) * index).astype(np.float32)
    high = (np.float64(end) - np.float64(step) * (count - 1 - index)).astype(np.float32)
    return np.where(index < count // 2, low, high)
