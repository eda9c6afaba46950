"""A packed row against the same documents in rows of their own: the loss of a small Llama and the gradient of its adapter.

    packed     a a a a b b b c c c _    one row with segments and positions
    unpacked   a a a a                  one row for each document, padded
               b b b _
               c c c _

All documents of a row see the virtual tokens of a prompt method, which come once before each row. Both are computed by the
device, and differ by rounding alone. In bfloat16 every layer rounds, so the limit is wider than
that of a single kernel. The time of attention alone is measured for a row of one document with and without segments, and
for a row of eight documents.
"""

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.peft import Method, PrefixTuning, PromptTuning
from qlora_jax.train import language_model_loss, split
from scripts.verification.attention import own_attention
from scripts.verification.checks import Check, Row, checked, measured
from scripts.verification.kernels import DTYPES
from scripts.verification.references import relative_error
from scripts.verification.workloads import WORKLOADS, random_weights, step_spec

_LIMITS = {"float32": 1e-5, "bfloat16": 2e-2}
_VOCABULARY = 512
_VIRTUAL = 20  # tokens
_TIME = "time of attention and its gradients"
_RUNS = 10  # of the attention whose time is measured


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of tokens: of the documents, of the packed row, of the other rows, and of the row whose time is measured."""

    documents: tuple[int, ...]
    row: int
    rows: int
    timed: int


_SMALL, _FULL = Size((100, 90, 60), 256, 128, 64), Size((600, 250, 150), 1024, 640, 8192)


def checks(small: bool) -> list[Check]:
    """Return the checks of this section."""
    size, dtypes = (_SMALL, DTYPES[:1]) if small else (_FULL, DTYPES)
    cases: list[tuple[str, Method | None]] = [(dtype, None) for dtype in dtypes]
    cases += [(dtype, PromptTuning(_VIRTUAL)) for dtype in dtypes] + [(dtypes[-1], PrefixTuning(_VIRTUAL))]
    found = [Check((_name(*case),), partial(_compare, *case, size)) for case in cases]
    return [*found, Check((_TIME,), partial(_time, size.timed))]


def _name(dtype: str, method: Method | None) -> str:
    return f"loss and gradient of a packed row, {dtype}{'' if method is None else f', {method.name}'}"


def _compare(dtype: str, method: Method | None, size: Size) -> Iterator[Row]:
    model = dataclasses.replace(step_spec(WORKLOADS["8b"], small=True).model, dtype=dtype)
    if method is None:
        graphdef, adapter, frozen = random_weights(model)
    else:  # a prefix holds the keys and values of all layers side by side, which cannot be copies of one layer's
        model = dataclasses.replace(model, method=method)
        graphdef, *_ = split(model.abstract())
        adapter, frozen = jax.jit(lambda: split(model.build(nnx.Rngs(0)))[1:])()
    adapter = _filled(adapter)  # B is zero in a new adapter, and so is the gradient of A

    @jax.jit
    def gradient(adapter: Any, frozen: Any, batch: dict[str, Any]) -> Any:
        return jax.value_and_grad(lambda x: language_model_loss(nnx.merge(graphdef, x, frozen), batch, None))(adapter)

    with jax.default_matmul_precision("highest"):
        loss, packed = gradient(adapter, frozen, _packed(size))
        expected_loss, unpacked = gradient(adapter, frozen, _unpacked(size))
    errors = {
        "loss": abs(float(loss) / float(expected_loss) - 1),
        "gradient": relative_error(_flat(packed), _flat(unpacked)),
    }
    yield checked(_name(dtype, method), errors, _LIMITS[dtype])


def _time(length: int) -> Iterator[Row]:
    """Measure attention with the heads of Llama-3-8B, forward and backward, for one row in bfloat16."""
    generator = np.random.default_rng(0)
    q, k, v = (jnp.asarray(generator.standard_normal((1, length, n, 128), np.float32), "bfloat16") for n in (32, 8, 8))
    one, eight = jnp.ones((1, length), jnp.int32), jnp.arange(length, dtype=jnp.int32)[None] * 8 // length + 1

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> Any:
        out, pull_back = jax.vjp(partial(own_attention(), segment_ids=segments), q, k, v)
        return out, pull_back(out)

    seconds = {}
    for name, segments in (("plain", None), ("packed, 1 document", one), ("packed, 8 documents", eight)):
        jax.block_until_ready(attend(q, k, v, segments))
        start = time.perf_counter()
        for _ in range(_RUNS):
            found = attend(q, k, v, segments)
        jax.block_until_ready(found)
        seconds[name] = (time.perf_counter() - start) / _RUNS
    text = "; ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    yield measured(_TIME, f"{length} tokens: {text}", length=length, seconds=seconds)


def _documents(size: Size) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, _VOCABULARY, length + 1).astype(np.int32) for length in size.documents]


def _packed(size: Size) -> dict[str, np.ndarray]:
    batch = _zeros(("inputs", "targets", "positions", "segment_ids", "loss_mask"), (1, size.row))
    start = 0
    for number, tokens in enumerate(_documents(size), start=1):
        place = slice(start, start := start + len(tokens) - 1)
        values = (tokens[:-1], tokens[1:], np.arange(len(tokens) - 1), number, 1)
        for array, value in zip(batch.values(), values, strict=True):
            array[0, place] = value
    return batch


def _unpacked(size: Size) -> dict[str, np.ndarray]:
    batch = _zeros(("inputs", "targets", "loss_mask"), (len(size.documents), size.rows))
    for row, tokens in enumerate(_documents(size)):
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
