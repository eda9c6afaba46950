"""Products with 4-bit matrices, embeddings and 8-bit blocks on the device, against NumPy in float64.

auto     the product as layers compute it: by the kernels that the device has for few rows, for many and for the gradient
xla      the product without kernels, for comparison
pallas   the kernel for every number of rows and, on a TPU, for the gradient of the input; interpreted on a CPU

Operands in float32 are multiplied at JAX's highest precision, because by default GPUs round them to TF32 and TPUs to
bfloat16: what is checked is the kernel, not the rounding that JAX chooses. The row "float32 as JAX multiplies by default"
has the error without that.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.errors import UnsupportedError
from qlora_jax.quant import (
    BLOCK_SIZES,
    DATA_TYPES,
    DataType,
    EmbeddingStorage,
    Implementation,
    QuantizedTensor,
    StackedTensor,
    codebook,
    dequantize_blockwise,
    dynamic_map,
    embedding_lookup,
    embedding_matmul,
    matmul,
    quantize,
    quantize_blockwise,
    quantize_embedding,
)
from scripts.verification import fused
from scripts.verification.checks import Check, Row, Skipped, checked, measured
from scripts.verification.references import LIMITS, dense_matrix, relative_error, rounding_error

DTYPES = ("float32", "bfloat16")
ROWS = (1, 16, 200)  # of x: one and few, where kernels are chosen, and many


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A 4-bit matrix to multiply with; `layers` above 0 make it the second of a stack that a loop runs over."""

    shape: tuple[int, int] = (512, 384)
    data_type: DataType = "nf4"
    block_size: int = 64
    double: bool = True
    layers: int = 0

    @property
    def name(self) -> str:
        words = [self.data_type, f"{self.shape[0]} x {self.shape[1]}"]
        words += [] if self.block_size == 64 else [f"blocks of {self.block_size}"]
        words += [] if self.double else ["float32 scales"]
        return " ".join([*words, *([f"in a stack of {self.layers}"] if self.layers else [])])


# SmolLM2's and Gemma 3's widths are no multiples of 128; 100 is no multiple of the block.
_OTHERS = (
    Matrix(layers=3),
    Matrix(double=False),
    Matrix(block_size=BLOCK_SIZES[0]),
    Matrix(block_size=128),
    Matrix((576, 192)),
    Matrix((1152, 256)),
    Matrix((100, 96)),
)


def limit_of(dtype: str) -> float:
    """Return the largest relative error that passes: accelerators sum in another order, and more products, than NumPy."""
    return LIMITS[dtype] if dtype != "float32" or jax.default_backend() == "cpu" else 1e-5


def checks(small: bool) -> list[Check]:
    """Return the checks of this section; with `small`, a few of each kind."""
    matrices = [Matrix(data_type=data_type) for data_type in DATA_TYPES]
    ways: tuple[Implementation, ...] = ("auto", "pallas")
    cases: list[tuple[Matrix, str, Implementation]] = [
        (matrix, dtype, way) for matrix in (*matrices, *_OTHERS) for dtype in DTYPES for way in ways
    ]
    if small:
        cases = [
            (matrices[0], "float32", "auto"),
            (_OTHERS[-1], "bfloat16", "auto"),
            (Matrix((256, 128)), "float32", "pallas"),
        ]
    else:
        cases.extend((matrices[0], dtype, "xla") for dtype in DTYPES)
    found = [Check((product_name(*case),), partial(product_rows, *case)) for case in cases]
    found.append(Check(("float32 as JAX multiplies by default",), _default_precision))
    storages: tuple[EmbeddingStorage, ...] = ("none", "int8", "nf4")
    for storage in storages:
        for dtype in DTYPES[:1] if small else DTYPES:
            found.append(Check((f"embedding {storage}, {dtype}",), partial(_embedding, storage, dtype)))
    for data_type in DATA_TYPES[:1] if small else DATA_TYPES:
        found.append(Check((f"quantise {data_type}",), partial(_quantize, data_type)))
    found += [Check((_blocks_name(signed),), partial(_blocks, signed)) for signed in (True, False)]
    return found + fused.checks()


def product_name(matrix: Matrix, dtype: str, way: Implementation) -> str:
    """Return the name of the row of a product and its input gradient."""
    return f"product {matrix.name}, {dtype}, {way}"


def product_rows(matrix: Matrix, dtype: str, way: Implementation) -> Iterator[Row]:
    """Yield the row of x @ w and of the gradient of x for each number of rows of x."""
    rows = (1, 16) if way == "pallas" and jax.default_backend() == "cpu" else ROWS
    errors = product_errors(matrix, dtype, way, rows)
    yield checked(product_name(matrix, dtype, way), errors, limit_of(dtype))


def product_errors(matrix: Matrix, dtype: str, way: Implementation, rows: tuple[int, ...]) -> dict[str, float]:
    """Return the relative errors of the products and of the input gradients, all computed by one program."""
    inputs, outputs = matrix.shape
    shape = (matrix.layers, inputs, outputs) if matrix.layers else matrix.shape
    q = quantize(_random(*shape), matrix.data_type, matrix.block_size, matrix.double)
    xs = [jnp.asarray(_random(count, inputs, seed=1), dtype) for count in rows]
    dys = [jnp.asarray(_random(count, outputs, seed=2), dtype) for count in rows]

    @jax.jit
    def products(q: QuantizedTensor, xs: list[jax.Array], dys: list[jax.Array]) -> Any:
        def with_matrix(w: QuantizedTensor | StackedTensor) -> list[tuple[jax.Array, jax.Array]]:
            found = []
            for x, dy in zip(xs, dys, strict=True):
                y, pull_back = jax.vjp(lambda x: matmul(x, w, implementation=way), x)
                found.append((y, pull_back(dy)[0]))
            return found

        if not matrix.layers:
            return with_matrix(q)
        each = jax.lax.scan(lambda _, i: (None, with_matrix(StackedTensor(q, i))), None, jnp.arange(matrix.layers))[1]
        return jax.tree.map(lambda leaf: leaf[1], each)

    with jax.default_matmul_precision("highest"):
        try:
            found = products(q, xs, dys)
        except UnsupportedError as error:
            raise Skipped(str(error)) from error
    dense = dense_matrix(jax.tree.map(lambda leaf: leaf[1], q) if matrix.layers else q)
    errors = {}
    for count, x, dy, (y, dx) in zip(rows, xs, dys, found, strict=True):
        errors[f"{count} rows"] = relative_error(y, np.asarray(x, np.float64) @ dense)
        errors[f"gradient, {count} rows"] = relative_error(dx, np.asarray(dy, np.float64) @ dense.T)
    return errors


def _default_precision() -> Iterator[Row]:
    q, x = quantize(_random(512, 384)), _random(200, 512, seed=1)
    error = relative_error(jax.jit(matmul)(jnp.asarray(x), q), x.astype(np.float64) @ dense_matrix(q))
    yield measured("float32 as JAX multiplies by default", f"relative error {error:.1e}", error=error)


def _embedding(storage: EmbeddingStorage, dtype: str) -> Iterator[Row]:
    """Check the lookup of rows, the product with all rows (an output head's logits), and its gradient."""
    w = quantize_embedding(jnp.asarray(_random(1000, 192)), storage, dtype)
    index = np.array([0, 999, 17, 512, 17], np.int32)
    x, dy = jnp.asarray(_random(16, 192, seed=1), dtype), jnp.asarray(_random(16, 1000, seed=2), dtype)
    if isinstance(w, QuantizedTensor):
        dense = dense_matrix(w).T
    elif isinstance(w, jax.Array):
        dense = np.asarray(w, np.float64)
    else:
        dense = np.asarray(w.codes, np.float64) * np.asarray(w.scales, np.float64)[:, None]
    with jax.default_matmul_precision("highest"):
        errors = {"lookup": relative_error(jax.jit(embedding_lookup)(w, index), dense[index])}
        if not isinstance(w, jax.Array):
            packed = w
            y, dx = jax.jit(lambda x, w, dy: _with_gradient(lambda x: embedding_matmul(x, w, x.dtype), x, dy))(x, packed, dy)
            errors["logits"] = relative_error(y, np.asarray(x, np.float64) @ dense.T)
            errors["gradient"] = relative_error(dx, np.asarray(dy, np.float64) @ dense)
    yield checked(f"embedding {storage}, {dtype}", errors, limit_of(dtype))


def _with_gradient(function: Any, x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, pull_back = jax.vjp(function, x)
    return y, pull_back(dy)[0]


def _quantize(data_type: DataType) -> Iterator[Row]:
    """Check that each code is the nearest one; the block maxima are in float32, so that they are exact."""
    w = _random(256, 96)
    q = quantize(jnp.asarray(w), data_type, double_quantization=False)
    exact = w.T.reshape(-1, q.block_size).astype(np.float64)
    error = rounding_error(dense_matrix(q).T.reshape(exact.shape), exact, codebook(data_type), np.abs(exact).max(1))
    yield checked(f"quantise {data_type}", {"all": error}, 1e-6, "beyond the nearest code")


def _blocks_name(signed: bool) -> str:
    return f"8-bit blocks, {'signed' if signed else 'unsigned'}"


def _blocks(signed: bool) -> Iterator[Row]:
    """Check the codes of 8-bit optimizers: that each is the nearest one, and what it stands for."""
    x = _random(20, 256) if signed else np.abs(_random(20, 256))
    q = jax.jit(partial(quantize_blockwise, signed=signed))(x)
    table = np.asarray(dynamic_map(signed), np.float64)
    absmax = np.abs(x).max(1)
    stored = table[np.asarray(q.codes)] * absmax[:, None].astype(np.float64)
    errors = {
        "codes": rounding_error(stored, x.astype(np.float64), table, absmax),
        "values": relative_error(jax.jit(dequantize_blockwise)(q), stored),
    }
    yield checked(_blocks_name(signed), errors, 1e-6, "error")


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
