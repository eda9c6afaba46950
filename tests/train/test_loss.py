"""The chunked cross-entropy against log_softmax over all logits: in float64 NumPy, by hand, and by jax.grad."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from virtual_devices import virtual_devices

from qlora_jax.nn import VocabularyMatrix
from qlora_jax.quant import EmbeddingStorage, embedding_lookup, quantize_embedding, tracing_for
from qlora_jax.train import (
    chunked_cross_entropy,
    language_model_loss,
    language_model_metrics,
    token_log_probabilities,
)
from qlora_jax.train.cross_entropy import LEAST, LOGITS, chunk_tokens, token_losses


def problem(n: int, d: int, v: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(hidden, head, targets, weights); a third of the weights are 0, the others not all 1."""
    draws = np.random.default_rng(seed)
    weights = np.where(draws.random(n) < 1 / 3, 0, draws.uniform(0.5, 2, n)).astype(np.float32)
    hidden, head = draws.standard_normal((n, d), np.float32), draws.standard_normal((v, d), np.float32)
    return hidden, head, draws.integers(0, v, n, np.int32), weights


def reference(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Loss and its gradient with respect to `hidden`, in float64."""
    h, w = hidden.astype(np.float64), head.astype(np.float64)
    logits = h @ w.T
    logits -= logits.max(1, keepdims=True)
    log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    share, rows = np.exp(log_share), np.arange(len(h))
    loss = float((weights * -log_share[rows, targets]).sum())
    share[rows, targets] -= 1
    return loss, weights[:, None] * (share @ w)


@pytest.mark.parametrize("chunk", [1, 4, 7, 512])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 5, 3), (7, 8, 101), (33, 16, 50)])
def test_value_and_gradient(n: int, d: int, v: int, chunk: int) -> None:
    hidden, head, targets, weights = problem(n, d, v)
    weights[0] = 1.5  # one at least is learned
    expected, gradient = reference(hidden, head, targets, weights)
    function = jax.value_and_grad(lambda h: chunked_cross_entropy(h, jnp.asarray(head), targets, weights, chunk))
    found, found_gradient = function(jnp.asarray(hidden))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    np.testing.assert_allclose(found_gradient, gradient, atol=2e-5)
    alone: Any = chunked_cross_entropy(jnp.asarray(hidden), jnp.asarray(head), targets, weights, chunk)
    np.testing.assert_allclose(alone, expected, rtol=2e-6, err_msg="without differentiation")


def test_capped_logits() -> None:
    """Against autodiff through all logits."""
    hidden, head, targets, weights = problem(9, 8, 20)

    def plain(h: Any) -> Any:
        logits = 2.5 * jnp.tanh(h @ head.T / 2.5)
        return -(weights * jax.nn.log_softmax(logits)[jnp.arange(9), targets]).sum()

    expected, gradient = jax.value_and_grad(plain)(jnp.asarray(hidden))
    function = jax.value_and_grad(lambda h: chunked_cross_entropy(h, jnp.asarray(head), targets, weights, 4, 2.5))
    found, found_gradient = function(jnp.asarray(hidden))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found_gradient, gradient, atol=1e-5)


@pytest.mark.parametrize("storage", ["int8", "nf4"])
@pytest.mark.parametrize("rows", [None, (2, 33)])
def test_a_packed_head(storage: EmbeddingStorage, rows: tuple[int, ...] | None) -> None:
    """The loss and gradients of the dense table that it stands for, without and with rows of it that train."""
    hidden, head, targets, weights = problem(20, 64, 50)
    hidden /= 4
    packed = quantize_embedding(jnp.asarray(head), storage)
    dense = embedding_lookup(packed, jnp.arange(50))
    delta = None if rows is None else jnp.full((2, 64), 0.5)

    def loss(hidden: Any, delta: Any, weight: Any) -> Any:
        return chunked_cross_entropy(hidden, VocabularyMatrix(weight, delta, rows), targets, weights, 8)

    function = jax.value_and_grad(loss, argnums=0 if rows is None else (0, 1))
    (found, gradients), (expected, wanted) = (function(jnp.asarray(hidden), delta, weight) for weight in (packed, dense))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_gradient_is_scaled_by_what_comes_after() -> None:
    hidden, head, targets, weights = problem(9, 8, 20)
    _, gradient = reference(hidden, head, targets, weights)

    def scaled(h: Any) -> Any:
        loss: Any = chunked_cross_entropy(h, jnp.asarray(head), targets, weights, 4)
        return 3 * loss - 1

    found = jax.grad(scaled)(hidden)
    np.testing.assert_allclose(found, 3 * gradient, atol=5e-5)


def test_tokens_that_are_not_learned_have_no_say() -> None:
    """Their targets may be anything, and no gradient reaches their hidden states."""
    hidden, head, targets, weights = problem(12, 8, 20)
    other = np.where(weights == 0, (targets + 1) % 20, targets)
    assert (other != targets).any()
    function = jax.value_and_grad(lambda h, t: chunked_cross_entropy(h, jnp.asarray(head), t, weights, 5))
    (a, gradient), (b, _) = function(jnp.asarray(hidden), targets), function(jnp.asarray(hidden), other)
    assert a == b
    assert (np.asarray(gradient)[weights == 0] == 0).all()
    nothing, gradient = jax.value_and_grad(
        lambda h: chunked_cross_entropy(h, jnp.asarray(head), targets, jnp.zeros_like(weights), 5)
    )(jnp.asarray(hidden))
    assert nothing == 0
    assert not np.asarray(gradient).any()


def test_large_logits_do_not_overflow() -> None:
    hidden, head, targets, weights = problem(6, 8, 20)
    expected, gradient = reference(300 * hidden, head, targets, weights)
    found, found_gradient = jax.value_and_grad(lambda h: chunked_cross_entropy(h, jnp.asarray(head), targets, weights, 4))(
        jnp.asarray(300 * hidden)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(found_gradient, gradient, atol=1e-3)


def test_bfloat16() -> None:
    """Products of rounded numbers, summed in float32: against float64 on the same rounded numbers."""
    hidden, head, targets, weights = problem(40, 32, 64)
    low, low_head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    expected, gradient = reference(np.asarray(low, np.float32), np.asarray(low_head, np.float32), targets, weights)
    found, found_gradient = jax.value_and_grad(lambda h: chunked_cross_entropy(h, low_head, targets, weights, 16))(low)
    assert found.dtype == jnp.float32
    assert found_gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(found_gradient, np.float32), gradient, atol=0.03 * np.abs(gradient).max())


def test_bfloat16_of_confident_tokens() -> None:
    """p(target) near 1, where softmax - 1 is the small difference of large numbers: each row's gradient is still right."""
    hidden, head, targets, _ = problem(24, 32, 64, seed=1)
    hidden += 0.25 * head[targets] * np.linspace(0.5, 1.5, 24, dtype=np.float32)[:, None]
    low, low_head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    weights = np.ones(24, np.float32)
    _, gradient = reference(np.asarray(low, np.float32), np.asarray(low_head, np.float32), targets, weights)
    logits = np.asarray(low, np.float64) @ np.asarray(low_head, np.float64).T
    share = np.exp(logits - logits.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True))[np.arange(24), targets]
    confident = (share > 0.98) & (share < 0.99999)
    assert confident.sum() >= 3
    found = jax.grad(lambda h: chunked_cross_entropy(h, low_head, targets, weights, 16))(low)
    error = np.linalg.norm(np.asarray(found, np.float32) - gradient, axis=1) / np.linalg.norm(gradient, axis=1)
    assert error[confident].max() < 0.02


def shapes_of(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes of all values of a jaxpr, those of its inner ones included."""
    found = [variable.aval.shape for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += shapes_of(inner)
    return found


def test_no_array_is_larger_than_a_chunk_of_logits() -> None:
    """In the program as it is traced, forward and backward, and in the memory that the compiler plans."""
    n, d, v, chunk = 4096, 8, 1000, 64
    structs = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((v, d), jnp.float32),
        jax.ShapeDtypeStruct((n,), jnp.int32),
        jax.ShapeDtypeStruct((n,), jnp.float32),
    )
    function = jax.value_and_grad(lambda h, w, t, m: chunked_cross_entropy(h, w, t, m, chunk))
    shapes = shapes_of(jax.make_jaxpr(function)(*structs).jaxpr)
    assert (chunk, v) in shapes, "the logits of a chunk are among them"
    assert max(int(np.prod(shape)) for shape in shapes) == chunk * v
    planned = jax.jit(function).lower(*structs).compile().memory_analysis()
    assert planned is not None
    assert planned.temp_size_in_bytes < 4 * 4 * chunk * v + 4 * 4 * n * d
    assert 4 * 4 * chunk * v + 4 * 4 * n * d < 4 * n * v / 8


@pytest.mark.parametrize("rows", [100, 32000, 49152, 128256, 256000])
def test_the_chunk_follows_from_the_vocabulary(rows: int) -> None:
    chunk = chunk_tokens(rows)
    assert chunk.bit_count() == 1
    assert chunk == LEAST or LOGITS / 1.5 < 4 * rows * chunk < LOGITS * 1.5
    assert chunk / 4 <= chunk_tokens(rows, cpu=True) < chunk


def test_a_cpu_takes_smaller_chunks() -> None:
    """By the logits that the programs of both platforms hold."""
    h, w = jax.ShapeDtypeStruct((4096, 8), jnp.float32), jax.ShapeDtypeStruct((32000, 8), jnp.float32)
    targets, weights = jax.ShapeDtypeStruct((4096,), jnp.int32), jax.ShapeDtypeStruct((4096,), jnp.float32)
    with tracing_for("every"):
        traced = jax.jit(jax.grad(lambda *arguments: token_losses(*arguments).sum())).trace(h, w, targets, weights)
    for platform, chunk in (("cpu", chunk_tokens(32000, cpu=True)), ("tpu", chunk_tokens(32000))):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert {int(n) for n in re.findall(r"tensor<(\d+)x32000xf32>", text)} == {chunk}


class Parrot:
    """Hidden states that are a table's rows; it keeps what it was called with."""

    def __init__(self, table: np.ndarray, head: np.ndarray) -> None:
        self.table, self.head = jnp.asarray(table), jnp.asarray(head)
        self.logit_cap = None
        self.seen: dict[str, Any] = {}

    def hidden(self, tokens: Any, *, positions: Any, segment_ids: Any, key: Any) -> Any:
        self.seen = {"positions": positions, "segment_ids": segment_ids, "key": key}
        return self.table[tokens]


def test_the_loss_of_a_language_model() -> None:
    """The sum over the learned tokens of a batch; positions and segments are handed on where there are any."""
    draws = np.random.default_rng(0)
    table, head = draws.standard_normal((30, 8), np.float32), draws.standard_normal((30, 8), np.float32)
    batch: dict[str, Any] = {name: draws.integers(0, 30, (3, 11), np.int32) for name in ("inputs", "targets")}
    batch["loss_mask"] = (draws.random((3, 11)) < 0.5).astype(np.float32)
    model = Parrot(table, head)
    expected, _ = reference(
        table[batch["inputs"].reshape(-1)], head, batch["targets"].reshape(-1), batch["loss_mask"].reshape(-1)
    )
    np.testing.assert_allclose(language_model_loss(model, batch, None), expected, rtol=1e-6)
    assert model.seen == {"positions": None, "segment_ids": None, "key": None}
    more: dict[str, Any] = batch | {"positions": 1, "segment_ids": 2}
    language_model_loss(model, more, jax.random.key(0))
    assert (model.seen["positions"], model.seen["segment_ids"]) == (1, 2)
    assert model.seen["key"] is not None


_DEVICES = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, sys.argv[1])
from test_loss import problem, reference
from qlora_jax.nn import VocabularyMatrix, data_mesh, frozen_sharding, put_rows
from qlora_jax.quant import quantize_embedding, embedding_lookup
from qlora_jax.train.loss import row_losses

class Model:
    def __init__(self, head, cap): self.head, self.logit_cap = head, cap

def plain(h, head, targets, weights, cap):
    logits = h @ head.T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    return -(weights * jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]).sum()

mesh, found = data_mesh(), []
cases = (
    (20, None, None, "none"), (20, None, 2.5, "none"), (20, None, None, "int8"), (20, None, None, "nf4"),
    (21, None, None, "none"), (20, (3, 17), None, "none"),
)
for vocabulary, rows, cap, storage in cases:
    hidden, head, targets, weights = problem(8 * 6, 64, vocabulary)
    hidden /= 4
    hidden, targets, weights = hidden.reshape(8, 6, 64), targets.reshape(8, 6), weights.reshape(8, 6)
    delta = None if rows is None else jnp.ones((2, 64))

    def loss(hidden, delta, head, targets, weights):
        return row_losses(Model(VocabularyMatrix(head, delta, rows), cap), hidden, targets, weights).sum()

    placed = put_rows(mesh, [hidden, targets, weights])
    packed = quantize_embedding(jnp.asarray(head), storage)
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, frozen_sharding(mesh, leaf.shape)), packed)
    head = np.asarray(embedding_lookup(packed, jnp.arange(vocabulary)))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0,) if delta is None else (0, 1)))
    with jax.set_mesh(mesh):
        compiled = run.lower(placed[0], delta, spread, *placed[1:]).compile()
        value, gradients = compiled(placed[0], delta, spread, *placed[1:])
    whole = jnp.asarray(head) if rows is None else jnp.asarray(head).at[jnp.asarray(rows)].add(1.0)
    expected, of_both = jax.value_and_grad(plain, argnums=(0, 1))(hidden, whole, targets, weights, cap)
    expected_gradients = of_both[:1] if rows is None else (of_both[0], of_both[1][jnp.asarray(rows)])
    errors = [float(jnp.abs(a - b).max()) for a, b in zip(gradients, expected_gradients)]
    error = max(abs(float(value / expected - 1)), *errors)
    found.append({"error": error, "whole": f"f32[{vocabulary},64]" in compiled.as_text()})
print(json.dumps(found))
"""


@pytest.mark.integration
def test_four_devices_hold_the_rows_of_the_head_apart() -> None:
    """Values and gradients against autodiff through all logits; a head that is spread is nowhere whole."""
    command = [sys.executable, "-c", _DEVICES, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=virtual_devices(4))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert max(case["error"] for case in found) < 2e-5
    # 21 rows are not to be had in four parts, and a head of which rows train is summed up whole
    assert [case["whole"] for case in found] == [False, False, False, False, True, True]


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_metrics_of_held_out_data(cap: float | None) -> None:
    """Loss and token accuracy against all logits at once."""
    hidden, head, targets, weights = problem(6 * LEAST // 4, 8, 37)
    weights = np.where(weights > 0, 1, 0).astype(np.float32)
    batch = {"inputs": targets, "targets": targets, "loss_mask": weights}
    batch = {name: jnp.asarray(x.reshape(6, -1)) for name, x in batch.items()}

    class Model:
        logit_cap = cap

        def __init__(self) -> None:
            self.head = VocabularyMatrix(jnp.asarray(head))

        def hidden(self, tokens: Any, **_: Any) -> Any:
            return jnp.asarray(hidden.reshape(*tokens.shape, -1))

    loss, more = language_model_metrics(Model(), batch, None)
    hits = (hidden @ head.T).argmax(1) == targets
    np.testing.assert_allclose(loss, language_model_loss(Model(), batch, None), rtol=1e-6)
    assert 0 < float(more["mean_token_accuracy"]) == (hits * weights).sum()


def test_token_log_probabilities_are_those_of_all_logits() -> None:
    """Value and gradient against log_softmax, of places that are learned; 0 elsewhere."""
    hidden, head, targets, weights = problem(4 * 9, 8, 37)
    learned = np.where(weights > 0, 1, 0).astype(np.float32).reshape(4, 9)
    tokens = jnp.asarray(targets.reshape(4, 9))
    batch = {"inputs": tokens, "targets": tokens, "loss_mask": jnp.asarray(learned)}

    class Model:
        logit_cap = None

        def __init__(self, states: Any) -> None:
            self.states, self.head = states, VocabularyMatrix(jnp.asarray(head))

        def hidden(self, tokens: Any, **_: Any) -> Any:
            return self.states.reshape(*tokens.shape, -1)

    logits = hidden.astype(np.float64) @ head.T.astype(np.float64)
    log_share = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = log_share[np.arange(36), targets].reshape(4, 9) * learned
    found = jax.jit(lambda states: token_log_probabilities(Model(states), batch))(jnp.asarray(hidden))
    assert found.shape == (4, 9)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(-found.sum(), language_model_loss(Model(jnp.asarray(hidden)), batch, None), rtol=1e-6)

    factors = jnp.asarray(np.random.default_rng(1).standard_normal((4, 9), np.float32))
    gradient = jax.grad(lambda states: (factors * token_log_probabilities(Model(states), batch)).sum())(jnp.asarray(hidden))
    _, by_hand = reference(hidden, head, targets, np.asarray(-factors * learned).reshape(-1))
    np.testing.assert_allclose(gradient, by_hand, atol=2e-5)
