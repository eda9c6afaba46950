"""The product of few rows on a CPU: its values, and what it needs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import codebook, matmul, quantize, tiles
from qlora_jax.quant.tensor import block_scales, unpack


def exact(x: np.ndarray, q: Any) -> np.ndarray:
    """In float64, from codes and scales one by one."""
    values = np.asarray(codebook(q.data_type), np.float64)[np.asarray(unpack(q))]
    scales = np.repeat(np.asarray(block_scales(q), np.float64), q.block_size, axis=0)
    return np.asarray(x, np.float64) @ (values * scales)


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("shape", "data_type", "block_size", "double"),
    [
        ((576, 192), "nf4", 64, True),
        ((576, 17), "nf4", 64, True),  # no whole vectors: one tile
        ((1536, 576), "fp4", 64, False),
        ((256, 4096), "int4", 128, True),
    ],
)
def test_values(rows: int, shape: tuple[int, int], data_type: Any, block_size: int, double: bool) -> None:
    generator = np.random.default_rng(0)
    q = quantize(generator.standard_normal(shape, np.float32), data_type, block_size, double)
    x = generator.standard_normal((rows, shape[0]), np.float32)
    expected = exact(x, q)
    for found in (tiles.matmul(jnp.asarray(x), q), matmul(x, q, implementation="xla")):
        assert np.linalg.norm(np.asarray(found) - expected) <= 1e-6 * np.linalg.norm(expected)


def test_the_width_of_a_tile() -> None:
    assert [tiles.tile_width(*shape) for shape in ((576, 1536), (4096, 14336), (64, 192), (576, 17))] == [384, 64, 192, 17]


def test_no_dense_matrix_is_in_memory_while_decoding() -> None:
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((2048, 8192), jnp.float32))
    compiled: Any = jax.jit(matmul).lower(jax.ShapeDtypeStruct((1, 2048), jnp.float32), q).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2048 * 8192 / 10
