"""The training step: what it may change and what it may not, and that how the work is cut does not matter.

References: plain `jax.grad` of a loss in logits and log_softmax with Optax' own update; bits of the values before; the same
run without what is tested (offload, micro-batches, devices).
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiers import tiered
from tiny_config import CONFIG
from virtual_devices import virtual_devices

from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    TrainState,
    adamw,
    compile_before_run,
    create_state,
    host_offload,
    init_state,
    jit_eval_step,
    jit_train_step,
    language_model_loss,
    split,
)

Batch = dict[str, jax.Array]
Offload = Literal["nothing", "state", "adapter"]


@cache
def build(dropout: float) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen) of a random model, the two states in NumPy."""
    lora = LoRA(rank=4, alpha=8, dropout=dropout)

    def make() -> CausalLM:
        return CausalLM(llama_config(CONFIG), quantization=Quantization(), method=lora, remat="none", rngs=nnx.Rngs(0))

    graph, abstract, _ = split(nnx.eval_shape(make))
    adapter, frozen = jax.tree.map(np.array, jax.jit(lambda: split(make())[1:])())
    generator = np.random.default_rng(7)  # so that neither A nor B is zero
    moved = [leaf + 0.1 * generator.standard_normal(leaf.shape, np.float32) for leaf in jax.tree.leaves(adapter)]
    return graph, jax.tree.unflatten(jax.tree.structure(abstract), moved), frozen


def parts(dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen), fresh copies on the device: a step deletes what it is given."""
    graph, adapter, frozen = build(dropout)
    return graph, jax.tree.map(jnp.array, adapter), jax.tree.map(jnp.array, frozen)


@cache
def compiled(dropout: float = 0.0, *, offload: Offload = "nothing") -> tuple[Any, Any]:
    """(init, step), compiled once for all tests that need the same."""
    graph, adapter, _ = parts(dropout)
    tx = adamw(1e-2) if offload == "nothing" else host_offload(adamw(1e-2), adapter=offload == "adapter")

    def init(adapter: Any, seed: int) -> TrainState:
        return create_state(tx, adapter, seed)

    return init, jit_train_step(graph, tx, language_model_loss, init(adapter, 0))


def random_batch(micro_batches: int, rows: int, length: int = 24, seed: int = 0) -> Batch:
    generator = np.random.default_rng(seed)
    shape = (micro_batches * rows, length)
    batch = {name: generator.integers(0, CONFIG["vocab_size"], shape, np.int32) for name in ("inputs", "targets")}
    learned = np.linspace(0.2, 0.9, shape[0])[:, None]  # of each row, another share
    batch["loss_mask"] = (generator.random(shape) < learned).astype(np.float32)
    batch["segment_ids"] = np.broadcast_to(1 + (np.arange(length) >= length // 3), shape).astype(np.int32)
    batch["positions"] = np.broadcast_to(np.arange(length), shape).astype(np.int32)
    return {name: jnp.asarray(x.reshape(micro_batches, rows, length)) for name, x in batch.items()}


def host(tree: Any) -> list[np.ndarray]:
    """Copies: what jax hands out may share memory with a buffer that is donated later."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def memory_kinds(tree: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def moments_on_host(state: TrainState) -> bool:
    """Both moments of every matrix; counters stay."""
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 3]
    assert len(moments) == 2 * len(jax.tree.leaves(state.adapter))
    return memory_kinds(moments) == {"pinned_host"}


def run(
    steps: int,
    cut: Callable[[int], Batch] = lambda step: random_batch(1, 4, seed=step),
    *,
    dropout: float = 0.0,
) -> tuple[TrainState, list[dict[str, Any]]]:
    _, adapter, frozen = parts(dropout)
    init, step_fn = compiled(dropout)
    state, rows = init(adapter, 0), []
    for step in range(steps):
        state, metrics = step_fn(state, frozen, cut(step))
        rows.append(jax.device_get(metrics))
    return state, rows


def test_one_step_is_what_plain_jax_and_optax_do() -> None:
    """Against log_softmax over whole logits, jax.grad and Optax' adamw without clipping, put together here."""
    graph, adapter, frozen = parts()
    batch = random_batch(1, 4)
    whole = {name: x[0] for name, x in batch.items()}

    def loss(adapter: Any) -> jax.Array:
        model = nnx.merge(graph, adapter, frozen)
        logits = model(whole["inputs"], positions=whole["positions"], segment_ids=whole["segment_ids"])
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), whole["targets"][..., None], -1)[..., 0]
        return -(found * whole["loss_mask"]).sum() / whole["loss_mask"].sum()

    expected_loss, gradient = jax.jit(jax.value_and_grad(loss))(adapter)
    plain = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def updated(gradient: Any, adapter: Any) -> Any:
        updates, _ = plain.update(gradient, plain.init(adapter), adapter)
        return optax.apply_updates(adapter, updates)

    expected = host(updated(gradient, adapter))
    tx = adamw(1e-2, weight_decay=0.1, max_grad_norm=None)
    state = create_state(tx, adapter)
    state, metrics = jit_train_step(graph, tx, language_model_loss, state)(state, frozen, batch)
    np.testing.assert_allclose(metrics["loss"], expected_loss, rtol=1e-6)
    squares = sum(float((leaf.astype(np.float64) ** 2).sum()) for leaf in host(gradient))
    np.testing.assert_allclose(metrics["grad_norm"], squares**0.5, rtol=1e-5)
    assert metrics["tokens"] == whole["loss_mask"].sum()
    assert int(state.step) == 1
    for found, leaf in zip(host(state.adapter), expected, strict=True):
        np.testing.assert_allclose(found, leaf, atol=2e-5)  # Adam divides small gradients by small numbers


def test_only_the_adapter_learns() -> None:
    """The bits of every frozen leaf after three steps are those of before."""
    _, adapter, frozen = parts()
    frozen_before, adapter_before = host(frozen), host(adapter)
    init, step_fn = compiled()
    state = init(adapter, 0)
    for step in range(3):
        state, _ = step_fn(state, frozen, random_batch(1, 4, seed=step))
    for leaf, before in zip(host(frozen), frozen_before, strict=True):
        assert leaf.dtype == before.dtype
        assert leaf.tobytes() == before.tobytes()
    for leaf, before in zip(host(state.adapter), adapter_before, strict=True):
        assert (leaf != before).any()
    assert any(leaf.dtype == np.uint8 for leaf in frozen_before), "the frozen part holds packed codes"


def test_adapter_and_moments_are_lora_leaves_alone() -> None:
    _, adapter, _ = parts()
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(adapter)[0]]
    assert len(paths) == 14  # A and B of the seven linear layers, stacked
    assert all("lora_a" in path or "lora_b" in path for path in paths)
    state = init_state(adamw(1e-2), adapter)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(adapter))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sorted(2 * shapes)


@pytest.mark.parametrize(
    ("offload", "micro_batches"),
    tiered(itertools.product(("state", "adapter"), (1, 2)), quick=[("adapter", 1)]),
)
def test_host_offload_keeps_what_it_says_in_host_memory_and_the_numbers(offload: Offload, micro_batches: int) -> None:
    """The same run without offload."""

    def cut(step: int) -> Batch:
        # Adam divides a gradient by its own size, so rounding noise in a gradient near zero becomes a step of full length:
        # these batches have no such gradient.
        return random_batch(micro_batches, 4, seed=10 + step)

    plain, plain_rows = run(3, cut)
    graph, adapter, frozen = parts()
    init, step_fn = compiled(offload=offload)
    state, rows = init(adapter, 0), []
    for step in range(3):
        assert moments_on_host(state)
        old = jax.tree.leaves((state.adapter, state.opt_state))
        state, metrics = step_fn(state, frozen, cut(step))
        assert all(leaf.is_deleted() for leaf in old)
        rows.append(jax.device_get(metrics))
    assert moments_on_host(state)
    assert memory_kinds(state.adapter) == {"pinned_host" if offload == "adapter" else "device"}
    assert "pinned_host" not in memory_kinds(plain)
    for row, expected in zip(rows, plain_rows, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(row[name], value, rtol=1e-5, err_msg=name)
    for found, expected in zip(host(state.adapter), host(plain.adapter), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-5)  # of three steps of 1e-2
    one = {name: x[0] for name, x in random_batch(1, 4).items()}
    evaluate = jit_eval_step(graph, language_model_loss)
    (found, _), (expected, _) = evaluate(state.adapter, frozen, one), evaluate(plain.adapter, frozen, one)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-4)


def test_the_step_is_deterministic() -> None:
    (state, rows), (again, rows_again) = run(3, dropout=0.3), run(3, dropout=0.3)
    assert rows == rows_again
    for a, b in zip(host(state), host(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_dropout_changes_with_step_seed_and_micro_batch() -> None:
    """The loss of the same batch under the same adapter, with whatever step and seed the state holds."""
    graph, adapter, frozen = parts(0.3)
    init, step_fn = compiled(0.3)
    batch = random_batch(1, 4)
    one = {name: x[0] for name, x in batch.items()}
    twice = {name: jnp.concatenate([x, x]) for name, x in batch.items()}

    def loss(step: int, seed: int, batch: Batch) -> float:
        state = dataclasses.replace(init(jax.tree.map(jnp.array, adapter), seed), step=jnp.int32(step))
        return float(step_fn(state, frozen, batch)[1]["loss"])

    found = [loss(step, seed, batch) for step in range(3) for seed in range(2)]
    assert len({*found}) == 6
    assert loss(0, 0, batch) == found[0]

    # Twice the same micro-batch: the mean of its loss under two masks, those of (seed, step, place).
    forward = jax.jit(lambda key: language_model_loss(nnx.merge(graph, adapter, frozen), one, key))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), 2), 2)
    each = [float(forward(key)) / float(one["loss_mask"].sum()) for key in keys]
    assert each[0] != each[1]
    np.testing.assert_allclose(loss(2, 1, twice), np.mean(each), rtol=1e-5)


def test_evaluation_has_no_dropout() -> None:
    (graph, adapter, frozen), (plain_graph, _, _) = parts(0.3), parts()
    batch = {name: x[0] for name, x in random_batch(1, 4).items()}
    found = jit_eval_step(graph, language_model_loss)(adapter, frozen, batch)
    expected = jit_eval_step(plain_graph, language_model_loss)(adapter, frozen, batch)
    assert float(found[0]["loss"]) == float(expected[0]["loss"])
    assert float(found[1]) == float(batch["loss_mask"].sum())


def test_the_old_state_is_donated() -> None:
    _, adapter, frozen = parts()
    init, step_fn = compiled()
    state = init(adapter, 0)
    old = jax.tree.leaves((state.adapter, state.opt_state))
    new, _ = step_fn(state, frozen, random_batch(1, 4))
    assert all(leaf.is_deleted() for leaf in old)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, frozen)))


@pytest.mark.parametrize("micro_batches", tiered([2, 4], quick=[4]))
def test_a_batch_cut_into_micro_batches_is_the_same_step(micro_batches: int) -> None:
    """The micro-batches have unlike numbers of learned tokens; of four, one has none."""

    def whole(step: int) -> Batch:
        batch = random_batch(1, 4, seed=step)
        batch["loss_mask"] = batch["loss_mask"].at[:, :1].set(0.0)
        return batch

    def cut(step: int) -> Batch:
        return {name: x.reshape(micro_batches, -1, x.shape[-1]) for name, x in whole(step).items()}

    assert len(set(cut(0)["loss_mask"].sum((1, 2)).tolist())) == micro_batches
    (expected, expected_rows), (state, rows) = run(4, whole), run(4, cut)
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose([row[name] for row in rows], [row[name] for row in expected_rows], rtol=1e-5)
    for found, leaf in zip(host(state.adapter), host(expected.adapter), strict=True):
        np.testing.assert_allclose(found, leaf, atol=1e-4)  # of four steps of 1e-2


def test_a_batch_without_learned_tokens_changes_nothing() -> None:
    batch = random_batch(1, 4)
    batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
    state, (metrics,) = run(1, lambda step: batch)
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    for leaf, old in zip(host(state.adapter), host(parts()[1]), strict=True):
        np.testing.assert_array_equal(leaf, old)


@pytest.mark.parametrize("offload", get_args(Offload))
def test_the_step_compiles_once(offload: Offload) -> None:
    """What a step returns has the placement of what it was given: else the second would compile anew, for minutes."""
    _, adapter, frozen = parts()
    init, step_fn = compiled(offload=offload)
    state = init(adapter, 0)
    step_fn.clear_cache()
    for step in range(3):
        state, _ = step_fn(state, frozen, random_batch(1, 4, seed=step))
    assert step_fn._cache_size() == 1


def test_a_model_without_an_adapter_is_an_error() -> None:
    model = nnx.eval_shape(lambda: CausalLM(llama_config(CONFIG), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no LoRA parameters"):
        init_state(adamw(1e-2), split(model)[1])


_DEVICES = """
import json, sys
from contextlib import nullcontext
import jax, numpy as np
from jax.sharding import PartitionSpec as P
sys.path[:0] = sys.argv[1:]
import test_step as T
from qlora_jax.nn import data_mesh, frozen_sharding, put_on_mesh, put_rows
from qlora_jax.train import adamw, create_state, host_offload, jit_train_step, language_model_loss

mesh = data_mesh()
graph, adapter, frozen = T.parts()
frozen = jax.tree.map(lambda leaf: jax.device_put(leaf, frozen_sharding(mesh, leaf.shape)), frozen)
adapter = put_on_mesh(mesh, adapter, P())
split = [leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(frozen) if leaf.ndim > 2]
tx = host_offload(adamw(1e-2))
rows = []
with nullcontext() if mesh is None else jax.set_mesh(mesh):
    state = create_state(tx, adapter)
    step = jit_train_step(graph, tx, language_model_loss, state)
    for number in range(4):
        state, metrics = step(state, frozen, put_rows(mesh, T.random_batch(2, 4, seed=number), 1))
        rows.append({name: float(value) for name, value in metrics.items()})
print(json.dumps({
    "devices": jax.device_count(),
    "split": sum(split) / len(split),
    "memory": sorted({leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 3}),
    "rows": rows,
    "adapter": [float(np.abs(leaf).astype(np.float64).sum()) for leaf in T.host(state.adapter)],
}))
"""


@pytest.mark.integration
def test_four_devices_train_as_one_does() -> None:
    """FSDP over four virtual devices, in a process of its own, against the same program on one."""
    found = {}
    for count in (1, 4):
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES, *map(str, Path(__file__).parents[:2])],
            capture_output=True,
            text=True,
            check=False,
            env=virtual_devices(count),
        )
        assert done.returncode == 0, done.stderr
        found[count] = json.loads(done.stdout.splitlines()[-1])
        assert found[count]["devices"] == count
        assert found[count]["memory"] == ["pinned_host"]
    assert found[1]["split"] == 0
    assert found[4]["split"] == 1  # all stacked matrices: codes and scales
    for one, four in zip(found[1]["rows"], found[4]["rows"], strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(four[name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found[4]["adapter"], found[1]["adapter"], rtol=1e-4)


def test_a_step_is_compiled_once_a_shape_before_it_runs(caplog: pytest.LogCaptureFixture) -> None:
    def add_sum_of(state: jax.Array, frozen: None, batch: dict[str, jax.Array]) -> jax.Array:
        return state + batch["x"].sum()

    step, state = compile_before_run(jax.jit(add_sum_of)), jnp.zeros(())
    with jax.log_compiles(True):
        for size in (3, 3, 5, 3, 5):
            state = step(state, None, {"x": jnp.ones(size)})
    assert state == 3 + 3 + 5 + 3 + 5
    said = [record.getMessage() for record in caplog.records]
    assert sum("Finished XLA compilation of jit(add_sum_of)" in line for line in said) == 2
