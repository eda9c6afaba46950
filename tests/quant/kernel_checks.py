"""What the tests of the kernels share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from tiers import tiered

from scripts.verification.references import LIMITS, dense_matrix, relative_error

__all__ = ["LIMITS", "dense_matrix", "of_dtypes", "random", "relative_error"]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def of_dtypes(products: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Cases of a product in each dtype. In bfloat16, the fast tier has one of double quantisation and one of single."""
    return tiered(
        [(*case, dtype) for dtype in LIMITS for case in products],
        quick=[*((*case, "float32") for case in products), *((*case, "bfloat16") for case in products[1:3])],
    )
