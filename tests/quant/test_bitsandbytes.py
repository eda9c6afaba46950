"""Our codes and values against bitsandbytes' own CPU path, bit for bit.

Weights are rounded to bfloat16 first where equality includes the offset of the scales, as the weights of real checkpoints
are: bitsandbytes takes that mean in float32, in an order that depends on the CPU and on its threads, so that on full
float32 values it may end one unit in the last place away from the correctly rounded mean that we store.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import QuantizedTensor, codebook, dequantize, quantize
from qlora_jax.quant.tensor import block_scales, unpack

torch = pytest.importorskip("torch", reason="the peers (torch, bitsandbytes) are not installed")
functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")


def random_weights(shape: tuple[int, int], *, rounded: bool) -> np.ndarray:
    """`[out, in]` float32 weights, with one block of zeros."""
    w = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    if w.size > 64:
        w.reshape(-1)[:64] = 0.0
    return np.array(jnp.asarray(w, jnp.bfloat16).astype(jnp.float32)) if rounded else w


def in_block_order(q: QuantizedTensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) of ours in bitsandbytes' order."""
    codes, scales = np.asarray(unpack(q)), np.asarray(q.scales)
    if q.flat_shape:
        return codes.reshape(-1)[:size], scales
    return codes.T.reshape(-1), scales.T.reshape(-1)


def dequantize_reference(w: np.ndarray, codes: np.ndarray, absmax: np.ndarray, data_type: str, block_size: int):
    """Float32 code times absmax. (bitsandbytes' AVX-512 kernel is wrong where blocks run across rows, so not there.)"""
    return (codebook(data_type)[codes] * np.repeat(absmax, block_size)[: w.size]).reshape(w.shape)


def check(w: np.ndarray, data_type: str, block_size: int, double: bool) -> tuple[int, int]:
    """Asserts that codes, scales and values are equal; returns (8-bit scales that differ, scales)."""
    packed, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=block_size, quant_type=data_type, compress_statistics=double
    )
    q = quantize(jnp.asarray(w).T, data_type, block_size, double)
    assert q.shape == w.shape[::-1]
    codes, scales = in_block_order(q, w.size)
    theirs = packed.numpy().reshape(-1)
    np.testing.assert_array_equal(codes, np.stack([theirs >> 4, theirs & 15], 1).reshape(-1)[: w.size])

    if double:
        np.testing.assert_array_equal(q.scale_offset, state.offset.numpy())
        np.testing.assert_array_equal(q.scale_absmax, state.state2.absmax.numpy())
        different = int((scales != state.absmax.numpy()).sum())
        absmax = functional.dequantize_blockwise(state.absmax, state.state2).numpy() + state.offset.numpy()
    else:
        np.testing.assert_array_equal(scales, state.absmax.numpy())
        different, absmax = 0, state.absmax.numpy()

    if w.shape[1] % block_size == 0:
        values = functional.dequantize_4bit(packed, state).numpy()
    else:
        values = dequantize_reference(w, codes, absmax, data_type, block_size)
    mine = np.asarray(dequantize(q)).T
    changed = mine != values
    assert changed.sum() <= different * block_size, "values differ where the scales are equal"
    return different, scales.size


SHAPES = [(64, 128), (192, 576), (100, 64), (7, 100), (33, 65), (1, 3), (257, 96), (576, 1536)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("data_type", ["nf4", "fp4"])
def test_bit_for_bit(data_type: str, double: bool, shape: tuple[int, int]) -> None:
    different, _ = check(random_weights(shape, rounded=True), data_type, 64, double)
    assert different == 0


@pytest.mark.optimised
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes(block_size: int) -> None:
    different, scales = check(random_weights((96, 4096), rounded=True), "nf4", block_size, True)
    assert different == 0, f"{different} of {scales} scales differ"


@pytest.mark.parametrize("shape", SHAPES)
def test_full_float32_weights(shape: tuple[int, int]) -> None:
    w = random_weights(shape, rounded=False)
    check(w, "nf4", 64, False)
    _, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=64, quant_type="nf4", compress_statistics=True)
    q = quantize(jnp.asarray(w).T)
    np.testing.assert_allclose(q.scale_offset, state.offset.numpy(), rtol=2e-7)
    theirs = functional.dequantize_blockwise(state.absmax, state.state2).numpy() + state.offset.numpy()
    mine = np.asarray(block_scales(q))
    np.testing.assert_allclose(mine if q.flat_shape else mine.T.reshape(-1), theirs, rtol=3e-6)
