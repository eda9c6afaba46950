"""What the tests of the kernels share."""

from typing import Any

import numpy as np

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3}  # of the relative error against float64


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def relative_error(found: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))
