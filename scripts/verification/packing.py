"""A packed row against the same documents in rows of their own: the loss of a small Llama and the gradient of its adapter.

    packed     a a a a b b b c c c _    one row with segments and positions
    unpacked   a a a a                  one row for each document, padded
               b b b _
               c c c _

Both are computed by the device, and differ by rounding alone. In bfloat16 every layer rounds, so the limit is wider than
that of a single kernel.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.train import language_model_loss
from scripts.verification.checks import Check, Row, checked
from scripts.verification.kernels import DTYPES
from scripts.verification.references import relative_error
from scripts.verification.workloads import WORKLOADS, random_weights, step_spec

_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
_DOCUMENTS = (100, 90, 60)  # tokens
_ROW, _ROWS = 256, 128  # tokens of the packed row, and of the others
_VOCABULARY = 512


def checks(small: bool) -> list[Check]:
    """Return the checks of this section."""
    return [Check((_name(dtype),), partial(_compare, dtype)) for dtype in DTYPES[: 1 if small else 2]]


def _name(dtype: str) -> str:
    return f"loss and gradient of a packed row, {dtype}"


def _compare(dtype: str) -> Iterator[Row]:
    model = dataclasses.replace(step_spec(WORKLOADS["8b"], small=True).model, dtype=dtype)
    graphdef, adapter, frozen = random_weights(model)
    adapter = _filled(adapter)  # B is zero in a new adapter, and so is the gradient of A

    @jax.jit
    def gradient(adapter: Any, frozen: Any, batch: dict[str, Any]) -> Any:
        return jax.value_and_grad(lambda x: language_model_loss(nnx.merge(graphdef, x, frozen), batch, None))(adapter)

    with jax.default_matmul_precision("highest"):
        loss, packed = gradient(adapter, frozen, _packed())
        expected_loss, unpacked = gradient(adapter, frozen, _unpacked())
    errors = {
        "loss": abs(float(loss) / float(expected_loss) - 1),
        "gradient": relative_error(_flat(packed), _flat(unpacked)),
    }
    yield checked(_name(dtype), errors, _LIMITS[dtype])


def _documents() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, _VOCABULARY, length + 1).astype(np.int32) for length in _DOCUMENTS]


def _packed() -> dict[str, np.ndarray]:
    batch = _zeros(("inputs", "targets", "positions", "segment_ids", "loss_mask"), (1, _ROW))
    start = 0
    for number, tokens in enumerate(_documents(), start=1):
        place = slice(start, start := start + len(tokens) - 1)
        values = (tokens[:-1], tokens[1:], np.arange(len(tokens) - 1), number, 1)
        for array, value in zip(batch.values(), values, strict=True):
            array[0, place] = value
    return batch


def _unpacked() -> dict[str, np.ndarray]:
    batch = _zeros(("inputs", "targets", "loss_mask"), (len(_DOCUMENTS), _ROWS))
    for row, tokens in enumerate(_documents()):
        for array, value in zip(batch.values(), (tokens[:-1], tokens[1:], 1), strict=True):
            array[row, : len(tokens) - 1] = value
    return batch


def _zeros(names: tuple[str, ...], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32 if name == "loss_mask" else np.int32) for name in names}


def _filled(adapter: Any) -> Any:
    """Return an adapter of irregular small values."""

    def values(leaf: jax.Array) -> jax.Array:
        waves = np.sin(np.arange(leaf.size) * 1.7 + leaf.size)
        return jax.device_put((0.02 * waves).reshape(leaf.shape).astype(leaf.dtype))

    return jax.tree.map(values, adapter)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])
