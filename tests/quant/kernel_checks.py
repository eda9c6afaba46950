"""What the tests of the kernels share."""

import numpy as np

from scripts.verification.references import LIMITS, dense_matrix, relative_error

__all__ = ["LIMITS", "dense_matrix", "random", "relative_error"]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
