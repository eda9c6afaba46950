"""Attention by the kernel that the device chooses, its gradients too, against NumPy in float64.

Each case is one program. Its packed rows are those of the default data path: several documents in a row, padding at the end.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.nn import attention_target, biased_attention, cached_attention, causal_attention
from scripts.verification import references
from scripts.verification.checks import Check, Row, checked
from scripts.verification.kernels import DTYPES, limit_of
from scripts.verification.references import causal_mask, relative_error

_BATCH, _HEADS, _KV_HEADS = 2, 4, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of attention."""

    length: int = 256
    head_dim: int = 64
    packed: bool = False
    window: int | None = None
    cap: float | None = None
    shared: int = 0

    @property
    def name(self) -> str:
        words = [f"{self.length} tokens, head size {self.head_dim}"]
        words += ["packed"] if self.packed else []
        words += [f"window {self.window}"] if self.window else []
        words += [f"cap {self.cap:.0f}"] if self.cap else []
        return ", ".join([*words, *([f"{self.shared} shared"] if self.shared else [])])


# Lengths and head sizes that kernels like, others that they do not like, and what models add to plain attention.
_CASES = (
    Case(),
    Case(packed=True),
    Case(window=100),
    Case(packed=True, window=100),
    Case(packed=True, window=150),
    Case(cap=30.0),
    Case(packed=True, cap=30.0),
    Case(packed=True, shared=3),
    Case(head_dim=80),
    Case(head_dim=128, packed=True),
    Case(head_dim=256),
    Case(head_dim=256, packed=True),
    Case(64),
    Case(1000, packed=True),
    Case(1001),
    Case(1001, packed=True, window=300),
)
_SMALL = (Case(150, 16, packed=True, window=60),)


def own_attention() -> Any:
    """Return `causal_attention` with the kernel that models take on the attached device."""
    return partial(causal_attention, target=attention_target())


def checks(small: bool) -> list[Check]:
    """Return the checks of this section."""
    cases = [(case, dtype) for case in (_SMALL if small else _CASES) for dtype in DTYPES]
    found = [Check((f"{case.name}, {dtype}",), partial(_causal, case, dtype)) for case, dtype in cases]
    for name in _MASKED:
        found += [Check((f"{name}, {dtype}",), partial(_masked, name, dtype)) for dtype in DTYPES[: 1 if small else 2]]
    return found


def segments_of(length: int) -> np.ndarray:
    """Return int32 `[b, t]`, the documents of packed rows: three and padding in the first row, one in the second."""
    ends = [length // 3, length // 2, length - length // 8]
    first = np.searchsorted(ends, np.arange(length), side="right") + 1
    return np.stack([np.where(first > 3, 0, first), np.ones(length, int)]).astype(np.int32)


def _causal(case: Case, dtype: str) -> Iterator[Row]:
    segments = segments_of(case.length) if case.packed else None
    real = np.ones((_BATCH, case.length), bool) if segments is None else segments > 0
    q, k, v, gradient = _operands(case.length, case.length, case.head_dim, dtype)
    gradient = jnp.where(real[..., None, None], gradient, 0)  # no loss is learned on padding
    attend = partial(
        own_attention(),
        segment_ids=None if segments is None else jnp.asarray(segments),
        window=case.window,
        cap=case.cap,
        shared=case.shared,
    )
    mask = causal_mask(case.length, segments, case.window, case.shared)
    expected = references.attention(q, k, v, mask, gradient, case.cap)
    found = _with_gradients(attend, q, k, v, gradient)
    found["result"] = np.where(real[..., None, None], np.asarray(found["result"], np.float64), 0)  # padding is never read
    expected["result"] = np.where(real[..., None, None], expected["result"], 0)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    yield checked(f"{case.name}, {dtype}", errors, limit_of(dtype))


def _with_gradients(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> dict[str, Any]:
    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array) -> Any:
        result, pull_back = jax.vjp(attend, q, k, v)
        return result, *pull_back(gradient)

    with jax.default_matmul_precision("highest"):
        found = run(q, k, v, gradient)
    return dict(zip(("result", "gradient of q", "gradient of k", "gradient of v"), found, strict=True))


def _operands(length: int, keys: int, head_dim: int, dtype: str) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(0)
    queries, pairs = (_BATCH, length, _HEADS, head_dim), (_BATCH, keys, _KV_HEADS, head_dim)
    arrays = (generator.standard_normal(shape, np.float32) for shape in (queries, pairs, pairs, queries))
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _cached(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return cached_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), lambda numbers: mask[:, numbers])


def _biased(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return biased_attention(q, k, v, mask, None, scale=q.shape[-1] ** -0.5)


_MASKED = {"decoding, 1 token and 300 cached": (_cached, 1), "an encoder's, 96 tokens": (_biased, 96)}


def _masked(name: str, dtype: str) -> Iterator[Row]:
    function, length = _MASKED[name]
    keys = 300 if length == 1 else length
    q, k, v, gradient = _operands(length, keys, 64, dtype)
    mask = np.broadcast_to(np.arange(keys) >= np.array([0, keys // 4])[:, None, None], (_BATCH, length, keys))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(function)(q, k, v, jnp.asarray(mask))
    expected = references.attention(q, k, v, mask, gradient)["result"]
    yield checked(f"{name}, {dtype}", {"result": relative_error(found, expected)}, limit_of(dtype))
