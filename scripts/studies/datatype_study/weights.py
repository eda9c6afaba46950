"""Quantise the linear layers of a dense model in place; measure the errors and the bits per parameter.

A matrix W is read from the checkpoint, quantised as `load_model` does it, dequantised, and stored in the dense model. Its
products are then those of the 4-bit model, and one compiled program serves all data types. With E = new matrix - W, the
errors are

    rms       √(ΣE² / ΣW²)
    mean      Σ|E| / Σ|W|
    largest   max|E| / √(mean W²)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import find
from qlora_jax.models import ParameterMapping
from qlora_jax.quant import Quantization, code_bits, dequantize, quantize

MEASURES = ("rms", "mean", "largest")


def quantize_in_place(
    state: Any, checkpoint: Checkpoint, keys: Sequence[ParameterMapping], how: Quantization, *, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Replace the matrices of `keys` in the state of a dense model; return the errors of each by tensor name."""
    errors = {}
    with tqdm(
        total=sum(key.layers for key in keys), desc="quantising", unit="matrix", leave=False, disable=not progress
    ) as bar:
        for key in keys:
            variable = find(state, key.path)
            stack = variable.get_value()
            for layer, name in enumerate(key.names()):
                stack, sums = _replace(stack, jnp.asarray(checkpoint.read(name)), layer, how=how)
                errors[name] = _measures(*(np.asarray(part, np.float64) for part in sums), size=stack[0].size)
                bar.update()
            variable.set_value(stack)
    return errors


@partial(jax.jit, static_argnames="how", donate_argnums=0)
def _replace(stack: Array, matrix: Array, layer: int, *, how: Quantization) -> tuple[Array, tuple[Array, ...]]:
    """Return the stack `[layers, in, out]` with one matrix `[out, in]` replaced, and sums for its errors by column."""
    w = matrix.T
    stored = dequantize(quantize(w, how.data_type, how.block_size, how.double_quantization), jnp.float32)
    w = w.astype(jnp.float32)
    error = stored - w
    sums = ((error**2).sum(0), (w**2).sum(0), jnp.abs(error).sum(0), jnp.abs(w).sum(0), jnp.abs(error).max(0))
    return jax.lax.dynamic_update_index_in_dim(stack, stored.astype(stack.dtype), layer, 0), sums


def _measures(squared: Any, squared_w: Any, absolute: Any, absolute_w: Any, largest: Any, *, size: int) -> dict[str, float]:
    total = squared_w.sum()
    if total == 0:
        return dict.fromkeys(MEASURES, 0.0)
    return {
        "rms": float(np.sqrt(squared.sum() / total)),
        "mean": float(absolute.sum() / absolute_w.sum()),
        "largest": float(largest.max() / np.sqrt(total / size)),
    }


def bits_per_parameter(shapes: Sequence[tuple[int, ...]], how: Quantization) -> tuple[float, float]:
    """Return the bits per parameter that codes and scales of matrices `[out, in]` need, and those that are stored.

    They differ for codes of two or three bits, which are stored in four bits.
    """
    stored, slots, values = 0, 0, 0
    for columns, rows in shapes:
        q = jax.eval_shape(
            lambda w: quantize(w, how.data_type, how.block_size, how.double_quantization),
            jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        )
        stored, slots, values = stored + 8 * q.nbytes, slots + 2 * q.codes.size, values + rows * columns
    return (stored - (4 - code_bits(how.data_type)) * slots) / values, stored / values
