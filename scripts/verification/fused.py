"""The fused product with 4-bit matrices on NVIDIA's Hopper GPUs: its errors, and its time beside XLA's product.

Training uses this kernel for up to 2048 rows, if small products with it are right on the attached device
(`quant.kernels.trial`). These rows call the kernel itself, so that an error of it shows and is not replaced by XLA's
product.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.quant import DATA_TYPES, DataType, QuantizedTensor, StackedTensor, quantize, with_implementation
from qlora_jax.quant.kernels import hopper
from qlora_jax.quant.matmul import matmul
from qlora_jax.quant.targets import is_for_hopper
from scripts.verification.checks import Check, Row, Skipped, checked, measured
from scripts.verification.references import LIMITS, dense_matrix, relative_error

_SHAPES = {512: (8192, 22016), 2048: (4096, 14336)}  # by rows of x: a matrix of LLaMA-65B, and one of Llama-3-8B
_RUNS = 20


def checks() -> list[Check]:
    """Return the checks, whose rows are skipped on other devices."""
    found = [Check((f"fused product {data_type}",), partial(_errors, data_type)) for data_type in DATA_TYPES]
    return [*found, *(Check((_time_name(rows),), partial(_time, rows)) for rows in _SHAPES)]


def _errors(data_type: DataType) -> Iterator[Row]:
    """Check products and gradients with the second matrix of a stack, with full tiles of rows and with padded ones."""
    _only_on_hopper()
    q, layer = quantize(_random(2, 1152, 384), data_type), jnp.int32(1)
    dense = dense_matrix(jax.tree.map(lambda leaf: leaf[1], q))
    errors = {}
    for rows in (65, 512, 700):
        x, dy = (jnp.asarray(_random(rows, size, seed=1), jnp.bfloat16) for size in dense.shape)
        y, dx = jax.jit(hopper.matmul)(x, q, layer), jax.jit(hopper.matmul_transposed)(dy, q, layer)
        errors[f"{rows} rows"] = relative_error(y, np.asarray(x, np.float64) @ dense)
        errors[f"gradient, {rows} rows"] = relative_error(dx, np.asarray(dy, np.float64) @ dense.T)
    yield checked(f"fused product {data_type}", errors, LIMITS["bfloat16"])


def _time_name(rows: int) -> str:
    inputs, outputs = _SHAPES[rows]
    return f"fused product's time, {rows} rows by {inputs} x {outputs}"


def _time(rows: int) -> Iterator[Row]:
    _only_on_hopper()
    inputs, outputs = _SHAPES[rows]
    q = jax.jit(lambda key: quantize(jax.random.normal(key, (1, inputs, outputs), jnp.bfloat16)))(jax.random.key(0))
    x, dy = (jnp.asarray(_random(rows, size), jnp.bfloat16) for size in (inputs, outputs))
    q_xla, layer = with_implementation(q, "xla"), jnp.int32(0)

    def xla(x: jax.Array, q: QuantizedTensor, layer: jax.Array) -> jax.Array:
        return matmul(x, StackedTensor(q, layer))

    def xla_gradient(dy: jax.Array, q: QuantizedTensor, layer: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: xla(x, q, layer), jnp.zeros((rows, inputs), dy.dtype))[1](dy)[0]

    times = {
        "fused": _milliseconds(hopper.matmul, x, q, layer),
        "XLA": _milliseconds(xla, x, q_xla, layer),
        "fused gradient": _milliseconds(hopper.matmul_transposed, dy, q, layer),
        "XLA's gradient": _milliseconds(xla_gradient, dy, q_xla, layer),
    }
    text = ", ".join(f"{name} {milliseconds:.3f} ms" for name, milliseconds in times.items())
    yield measured(_time_name(rows), text, **times)


def _milliseconds(function: Callable[..., jax.Array], *arguments: Any) -> float:
    """Return the median time of a run, of several that wait for one another."""
    compiled, seconds = jax.jit(function).lower(*arguments).compile(), []
    jax.block_until_ready(compiled(*arguments))
    for _ in range(_RUNS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds)) * 1e3


def _only_on_hopper() -> None:
    if jax.default_backend() != "gpu" or not is_for_hopper():
        raise Skipped("the kernel is for NVIDIA's Hopper GPUs")


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
