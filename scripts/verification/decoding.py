"""Decoding with a random 8B model: tokens a second with the kernel for 4-bit matrices and with XLA's products.

A step generates one token for each row, as `serve.generate` does, with an adapter that is not merged. The cache starts
empty, so that its length costs little: the weights are read once for each step, and their bytes by the time are in the row.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.quant import Implementation, with_implementation
from qlora_jax.serve.generate import decode_step
from scripts.verification.checks import Check, Row, measured
from scripts.verification.workloads import WORKLOADS, random_weights, step_spec

ROWS = (1, 16)
_CAPACITY = 256  # tokens of the cache
_WAYS: dict[str, Implementation] = {"kernel": "auto", "XLA": "xla"}


def checks(small: bool) -> list[Check]:
    """Return the one check of this section."""
    names = tuple(f"{rows} rows, {way}" for rows in _rows(small) for way in _WAYS)
    return [Check(("weights", *names), partial(_decode, small))]


def _rows(small: bool) -> tuple[int, ...]:
    return ROWS[:1] if small else ROWS


def _decode(small: bool) -> Iterator[Row]:
    model = step_spec(WORKLOADS["8b"], small).model
    graphdef, adapter, frozen = random_weights(model)
    state = nnx.merge_state(adapter, frozen)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    yield measured("weights", f"random weights, {size / 2**30:.2f} GiB", bytes=size)
    for rows in _rows(small):
        found: dict[str, float] = {}
        for way, implementation in _WAYS.items():
            compile_seconds, seconds = _seconds(graphdef, with_implementation(state, implementation), rows, small)
            found[way] = seconds
            rate, read = rows / seconds, size / seconds / 1e9
            text = f"{rate:,.1f} tokens/s, {seconds * 1e3:.2f} ms a step, weights at {read:,.0f} GB/s; compiled in "
            text += f"{compile_seconds:.1f} s"
            if way == "kernel" and jax.default_backend() == "cpu":
                text += "; a CPU has no kernel, this is its own form of the product"
            if len(found) > 1:
                text += f"; the kernel is {found['XLA'] / found['kernel']:.2f} times as fast"
            yield measured(f"{rows} rows, {way}", text, tokens_per_second=rate, compile_seconds=compile_seconds)


def _seconds(graphdef: Any, state: Any, rows: int, small: bool) -> tuple[float, float]:
    """Return the seconds of compiling and the median seconds of a step."""
    model: Any = nnx.merge(graphdef, state)
    cache = jax.jit(lambda: model.init_cache(rows, _CAPACITY))()
    token = jnp.zeros((rows,), jnp.int32)

    def step(position: int, cache: Any) -> tuple[jax.Array, Any]:
        return decode_step(graphdef, state, token, np.full((rows, 1), position, np.int32), cache)

    start = time.perf_counter()
    logits, cache = step(0, cache)
    if not bool(jnp.isfinite(logits).all()):
        raise ValueError(f"the logits of {rows} rows are not finite")
    compile_seconds, times = time.perf_counter() - start, []
    for position in range(1, 6 if small else 33):
        start = time.perf_counter()
        logits, cache = step(position, cache)
        jax.block_until_ready(logits)
        times.append(time.perf_counter() - start)
    return compile_seconds, float(np.median(times))
