"""A feed-forward over chunks of tokens against the same at once: numbers, products, random keys."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiers import tiered
from virtual_devices import virtual_devices

from qlora_jax.models import CausalLM, ModelSpec, chunks, family_of
from qlora_jax.models.chunks import chunk_count, over_chunks
from qlora_jax.nn import LayerContext, data_mesh, put_on_mesh, put_rows
from qlora_jax.peft import LoRA
from qlora_jax.plan.flops import count_flops
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    BatchSpec,
    StepSpec,
    build_step,
    create_state,
    host_offload,
    language_model_loss,
    language_model_objective,
    split,
)
from qlora_jax.train.optim import adamw
from qlora_jax.train.step import jit_train_step, train_step

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
FAMILIES: dict[str, dict[str, Any]] = {  # one norm, norms behind as well, both branches side by side
    "llama": TINY | {"model_type": "llama"},
    "gemma2": TINY | {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gpt_neox": TINY | {"model_type": "gpt_neox"},
}


def config_of(family: str) -> Any:
    return family_of(FAMILIES[family]).config(FAMILIES[family])


def build(family: str) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen) of a random model whose adapter changes something."""

    def make() -> CausalLM:
        return CausalLM(config_of(family), quantization=Quantization(), method=LoRA(4, 8.0), rngs=nnx.Rngs(0))

    graph, _, _ = split(nnx.eval_shape(make))
    adapter, frozen = jax.jit(lambda: split(make())[1:])()
    draws = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: x + 0.1 * draws.standard_normal(x.shape, np.float32), adapter), frozen


def batch_of(rows: int, length: int) -> dict[str, jax.Array]:
    draws = np.random.default_rng(1)
    tokens = draws.integers(0, TINY["vocab_size"], (rows, length + 1), np.int32)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    return {"inputs": inputs, "targets": targets, "loss_mask": jnp.ones(inputs.shape, jnp.float32)}


def test_chunks_of_any_number_of_tokens_give_what_all_at_once_does() -> None:
    """With its gradient; 2 x 150 tokens are no multiple of anything, so that the last chunk is padded."""
    draws = np.random.default_rng(0)
    x, w, v = (jnp.asarray(draws.standard_normal(shape), jnp.float32) for shape in ((2, 150, 8), (8, 32), (32, 8)))

    def run(x: jax.Array, w: jax.Array, count: int) -> jax.Array:
        return over_chunks(lambda x, _: x + jnp.tanh(x @ w) @ v, x, [LayerContext()], count)

    def value_and_gradients(count: int) -> tuple[Any, Any]:
        loss = lambda x, w: jnp.sin(run(x, w, count)).sum()  # noqa: E731
        return run(x, w, count), jax.grad(loss, argnums=(0, 1))(x, w)

    for found, expected in zip(
        jax.tree.leaves(value_and_gradients(3)), jax.tree.leaves(value_and_gradients(1)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_chunk_draws_from_keys_of_its_own() -> None:
    x = jnp.zeros((1, 512, 4))

    def run(key: jax.Array) -> jax.Array:
        drawn = over_chunks(lambda x, own: jax.random.normal(own[0].key, x.shape), x, [LayerContext(key)], 4)  # type: ignore[arg-type]
        return drawn.reshape(4, -1)

    drawn = np.asarray(run(jax.random.key(0)))
    assert len({row.tobytes() for row in drawn}) == 4
    np.testing.assert_array_equal(drawn, run(jax.random.key(0)))


def test_every_chunk_has_all_rows_where_rows_have_adapter_ids() -> None:
    """So that a chunk has one id for each of its rows. The last chunk is padded."""
    x, ids = jnp.arange(3 * 50 * 2, dtype=jnp.float32).reshape(3, 50, 2), jnp.asarray([5, 0, 7])

    def run(x: jax.Array, contexts: Any) -> jax.Array:
        return x + contexts[1].adapter_ids[:, None, None]

    contexts = [LayerContext(None, ids), LayerContext(None, ids)]
    np.testing.assert_array_equal(over_chunks(run, x, contexts, 3), x + ids[:, None, None])


def test_how_many_chunks() -> None:
    assert chunk_count(chunks.CHUNK, "full") == 1
    assert chunk_count(chunks.CHUNK + 1, "full") == chunk_count(2 * chunks.CHUNK, "offload") == 2
    assert chunk_count(10 * chunks.CHUNK, "dots") == chunk_count(10 * chunks.CHUNK, "none") == 1


def test_more_chunks_divide_the_tokens_where_fewer_would_be_padded() -> None:
    """By hand: 131,200 = 20 x 6560; 1033 is a prime number, so that 1033 x 128 tokens have no such divisor."""
    assert chunk_count(16 * chunks.CHUNK, "full") == 16
    assert chunk_count(131_200, "full") == 20
    assert chunk_count(1033 * 128, "full") == 17
    for thousands in range(9, 500, 7):
        assert thousands * 1024 % (16 * chunk_count(thousands * 1024, "offload")) == 0


@pytest.mark.parametrize("family", tiered(FAMILIES, quick=["llama"]))
def test_a_model_learns_the_same_in_chunks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, adapter, frozen = build(family)
    batch = batch_of(2, 160)

    def loss(adapter: Any) -> jax.Array:
        return language_model_loss(nnx.merge(graph, adapter, frozen), batch, None)

    expected = jax.jit(jax.value_and_grad(loss))(adapter)
    monkeypatch.setattr(chunks, "CHUNK", 128)
    found = jax.jit(jax.value_and_grad(lambda adapter: loss(adapter)))(adapter)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4 * np.abs(other).max())


@pytest.mark.integration
def test_an_adapter_in_host_memory_learns_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (10**6, 128):
        monkeypatch.setattr(chunks, "CHUNK", size)
        graph, adapter, frozen = build("llama")
        tx = host_offload(adamw(1e-2), adapter=True)
        state = create_state(tx, adapter)
        batch = {name: leaf[None] for name, leaf in batch_of(2, 160).items()}
        state, metrics = jit_train_step(graph, tx, language_model_loss, state)(state, frozen, batch)
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.adapter)} == {"pinned_host"}
        found.append((metrics, state.adapter))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "remat"),
    tiered(
        itertools.product(FAMILIES, ("full", "offload")),
        quick=[("llama", "full")],
    ),
)
def test_chunks_add_no_products(family: str, remat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec(config_of(family), method=LoRA(8), remat=remat)
    spec = StepSpec(model, language_model_objective(packed=False), BatchSpec(batch_size=4, length=128))

    def flops() -> float:
        step = build_step(spec, platform="cpu")
        run = lambda *parts: train_step(step.graphdef, step.tx, step.objective.loss, *parts)  # noqa: E731
        return count_flops(jax.jit(run).trace(step.state, step.frozen, step.batch).jaxpr)

    at_once = flops()
    monkeypatch.setattr(chunks, "CHUNK", 128)
    assert flops() == pytest.approx(at_once, rel=1e-3)


def test_only_a_chunk_of_inner_activations_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's own count of temporaries: all of the wide feed-forward's, against a quarter of it."""
    wide = TINY | {"model_type": "llama", "intermediate_size": 2048}
    config = family_of(wide).config(wide)
    model = ModelSpec(config, method=LoRA(4), dtype="float32")
    spec = StepSpec(model, language_model_objective(packed=False), BatchSpec(batch_size=64, length=64))

    def temporaries() -> int:
        step = build_step(spec, platform="cpu")
        run = lambda *parts: train_step(step.graphdef, step.tx, step.objective.loss, *parts)  # noqa: E731
        return jax.jit(run).lower(step.state, step.frozen, step.batch).compile().memory_analysis().temp_size_in_bytes

    at_once = temporaries()
    monkeypatch.setattr(chunks, "CHUNK", 1024)
    inner = 64 * 64 * 2048 * 4  # bytes of one inner activation of all tokens
    assert at_once > 3 * inner
    assert temporaries() < at_once - 2 * inner


ON_DEVICES = """
import json, jax
from test_chunks import learned
print(json.dumps(learned()))
"""


def learned() -> dict[str, float]:
    """Loss and norm of the gradient of a step on all devices of this process, with chunks of a device's 192 tokens."""
    chunks.CHUNK = 128 * 4 // jax.device_count()
    graph, adapter, frozen = build("llama")
    mesh = data_mesh()
    batch = put_rows(mesh, {name: leaf[None] for name, leaf in batch_of(4, 192).items()}, 1)
    tx = adamw(1e-2)
    state = create_state(tx, put_on_mesh(mesh, adapter, P()))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        _, metrics = jit_train_step(graph, tx, language_model_loss, state)(state, frozen, batch)
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")}


@pytest.mark.integration
def test_devices_cut_their_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four devices with a row each learn what one with all of them does."""
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = virtual_devices(4) | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", ON_DEVICES], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(chunks, "CHUNK", chunks.CHUNK)  # `learned` changes it
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(learned(), rel=1e-4)
