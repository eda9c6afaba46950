"""Test whether trained weights are normally distributed, as NormalFloat assumes (QLoRA, appendix F).

The test of Shapiro and Wilk, as scipy computes it, is applied to each linear matrix in two ways:

    sample   values drawn from the whole matrix: W and its p-value. Units differ in their scale, so that a large sample of
             all units is a mixture of normal distributions, which the test rejects although each unit may be normal
    units    the weights of one output unit, as in the paper, for some units of the matrix: the share whose p is below 0.05,
             which is 5 % for normal weights

At most 5,000 values are tested at a time, because scipy's p-value is not accurate for more. The generator of matrix number i
(in the order of the report) is `numpy.random.default_rng([seed, i])`; it draws the sample, then the units.

A third metric shows whether the weights were quantised before: the number of distinct values in blocks of 32 neighbouring
weights of a unit. At most 16 values in all blocks indicate a 4-bit format with blocks of 32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import shapiro
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint

MOST = 5000  # largest number of values in a test
SIGNIFICANCE = 0.05
_BLOCK, _BLOCKS = 32, 64


def examine(
    checkpoint: Checkpoint, names: Sequence[str], *, sample: int, units: int, seed: int, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the metrics of each matrix by tensor name: `sample`, `w`, `p`; `units`, `rejected_units`; `distinct`."""
    bar = tqdm(names, desc="Shapiro-Wilk", unit="matrix", leave=False, disable=not progress)
    return {
        name: examine_matrix(checkpoint.read(name).astype(np.float32), np.random.default_rng([seed, index]), sample, units)
        for index, name in enumerate(bar)
    }


def examine_matrix(w: np.ndarray, generator: np.random.Generator, sample: int, units: int) -> dict[str, Any]:
    """Return the metrics of one matrix `[out, in]`."""
    count = min(sample, w.size)
    statistic, p = shapiro_wilk(w.reshape(-1)[generator.choice(w.size, count, replace=False)])
    rows = generator.choice(len(w), min(units, len(w)), replace=False)
    p_of_units = [shapiro_wilk(generator.choice(row, min(row.size, MOST), replace=False))[1] for row in w[rows]]
    return {
        "sample": count,
        "w": statistic,
        "p": p,
        "units": len(rows),
        "rejected_units": sum(value < SIGNIFICANCE for value in p_of_units),
        "distinct": distinct(w[rows]),
    }


def shapiro_wilk(values: np.ndarray) -> tuple[float, float]:
    """Return W and p; both are 0 for values that are all equal, for which scipy has no result."""
    if np.ptp(values) == 0:
        return 0.0, 0.0
    found: Any = shapiro(values.astype(np.float64))
    return float(found.statistic), float(found.pvalue)


def distinct(rows: np.ndarray) -> int | None:
    """Return the largest number of distinct values in a block of 32 neighbours of a row; None for shorter rows."""
    blocks = rows[:, : rows.shape[1] // _BLOCK * _BLOCK].reshape(-1, _BLOCK)[:_BLOCKS]
    return max((len(np.unique(block)) for block in blocks), default=None)
