"""AdamW with moments in 8 bits against bitsandbytes' own maps and quantisation, and against AdamW in float32."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_config import CONFIG

from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import BlockwiseArray, Quantization
from qlora_jax.train import Transformation, create_state, host_offload, jit_train_step, language_model_loss, optimizer, split
from qlora_jax.train.state_store import StateStore

SHAPES = {"large": (3, 50, 41), "matrix": (64, 64), "small": (4095,)}  # 6150 values: the last block is a partial one


def gradients(step: int) -> dict[str, np.ndarray]:
    """Of several orders of magnitude, in and between blocks."""
    draws = np.random.default_rng(step)
    return {
        name: (draws.standard_normal(shape) * 10.0 ** draws.uniform(-3, 0, shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def bitsandbytes_store(functional: Any, torch: Any, *, signed: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What a moment is after it was stored and read: bitsandbytes' map and blocks of 256, to the nearest value."""
    code = functional.create_dynamic_map(signed=signed)

    def store(x: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(x.astype(np.float32))
        _, state = functional.quantize_blockwise(tensor, code=code, blocksize=256)
        absmax = np.repeat(state.absmax.numpy(), 256)[: x.size].reshape(x.shape)
        # Codes: its CPU path first rounds to 65536 bins, its CUDA path and its plain torch one take the nearest value.
        distance = (tensor.reshape(-1, 1) / torch.from_numpy(absmax).reshape(-1, 1) - code).abs()
        return code[distance.argmin(1)].numpy().reshape(x.shape) * absmax

    return store


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_update_rule(decay: float) -> None:
    """Each update against Adam in float64 NumPy whose moments bitsandbytes stored, from the very same moments.

    A value near the middle of two codes may go either way, and then runs drift apart; so every step starts from our state.
    """
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    store_first = bitsandbytes_store(functional, torch, signed=True)
    store_second = bitsandbytes_store(functional, torch, signed=False)
    tx = optimizer("adamw8bit", 1e-2, beta1=0.8, beta2=0.99, weight_decay=decay, max_grad_norm=None)
    params = {name: jnp.asarray(value) for name, value in gradients(99).items()}
    state: Any = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    maps = {signed: functional.create_dynamic_map(signed=signed).numpy() for signed in (True, False)}

    def read(stored: Any) -> np.ndarray:
        if not isinstance(stored, BlockwiseArray):
            return np.asarray(stored, np.float64)
        values = maps[stored.signed][np.asarray(stored.codes)]
        return values.astype(np.float64) * np.repeat(np.asarray(stored.absmax), 256)[: values.size].reshape(values.shape)

    for step in range(1, 11):
        gradient = gradients(step)
        before = {name: (read(state[0].first[name]), read(state[0].second[name])) for name in SHAPES}
        updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
        for name, (m, v) in before.items():
            g = gradient[name].astype(np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
            expected = (m / (1 - 0.8**step)) / (np.sqrt(v / (1 - 0.99**step)) + 1e-8)
            expected = -1e-2 * (expected + decay * np.asarray(params[name], np.float64))
            np.testing.assert_allclose(updates[name], expected, rtol=2e-5, atol=1e-7)
            if name == "small":
                assert not isinstance(state[0].first[name], BlockwiseArray)
                np.testing.assert_allclose(state[0].first[name], m, rtol=1e-5, atol=1e-7)
                continue
            for stored, moment, store in ((state[0].first, m, store_first), (state[0].second, v, store_second)):
                found, theirs = read(stored[name]), store(moment)
                other = np.abs(found - theirs) > 1e-5 * np.abs(theirs)
                assert other.mean() < 1e-3, "ties, decided by the last bit"
                np.testing.assert_allclose(np.abs(found - moment), np.abs(theirs - moment), rtol=1e-3, atol=1e-6)
        params = optax.apply_updates(params, updates)


def test_the_codes_are_those_of_bitsandbytes() -> None:
    """Bit for bit where its 65536 bins of the CPU path decide nothing: elsewhere ours are the nearer ones."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x = {True: gradients(0)["large"], False: gradients(0)["large"] ** 2}
    for signed, values in x.items():
        code = functional.create_dynamic_map(signed=signed)
        theirs, state = functional.quantize_blockwise(torch.from_numpy(values), code=code, blocksize=256)
        tx: Any = optimizer("adamw8bit", 1.0, beta1=0.0, beta2=0.0, max_grad_norm=None)  # moments are g and g²
        gradient = {"x": jnp.asarray(gradients(0)["large"])}
        _, after = tx.update(gradient, tx.init(gradient), gradient)
        found: BlockwiseArray = (after[0].first if signed else after[0].second)["x"]
        np.testing.assert_array_equal(found.absmax, state.absmax.numpy())
        absmax = np.repeat(np.asarray(found.absmax), 256)[: values.size].reshape(values.shape)
        ours, others = code.numpy()[np.asarray(found.codes)] * absmax, code.numpy()[theirs.numpy()] * absmax
        large = np.abs(values) > 0.1 * absmax
        assert (np.asarray(found.codes) == theirs.numpy())[large].mean() > 0.99
        assert (np.abs(ours - values) <= np.abs(others - values) + 1e-6 * absmax).all()
        assert np.abs(found.codes.astype(jnp.int32) - theirs.numpy().astype(np.int32))[large].max() <= 1


def test_bytes_of_the_state() -> None:
    """At most 2.1 a parameter of large tensors, and 8 of small ones."""
    tx = optimizer("adamw8bit", 1e-3)
    for shape, most in (((30, 576, 16), 2.1), ((4096,), 2.1), ((3, 50, 41), 2.1), ((4095,), 8.01)):
        state = jax.eval_shape(tx.init, {"x": jax.ShapeDtypeStruct(shape, jnp.float32)})
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.shape)
        assert size <= most * np.prod(shape), shape


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_gradients_of_nothing(value: float) -> None:
    """Zeros, as B gives A at the first step, move nothing; NaN is not hidden."""
    tx = optimizer("adamw8bit", 1e-2, max_grad_norm=None)
    params = {"x": jnp.ones((64, 64))}
    updates, state = tx.update({"x": jnp.full((64, 64), value)}, tx.init(params), params)
    updates, _ = tx.update({"x": jnp.full((64, 64), value)}, state, params)
    np.testing.assert_array_equal(updates["x"], np.full((64, 64), value))


@cache
def build() -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen) of a random model, of whose adapter most leaves have 4096 values or more."""
    lora = LoRA(rank=32, alpha=32)

    def make() -> CausalLM:
        return CausalLM(llama_config(CONFIG), quantization=Quantization(), method=lora, remat="none", rngs=nnx.Rngs(0))

    graph, _, _ = split(nnx.eval_shape(make))
    adapter, frozen = jax.jit(lambda: split(make())[1:])()
    return graph, jax.tree.map(np.array, adapter), frozen


def batch(step: int) -> dict[str, jax.Array]:
    """Sequences in which each token follows from the one before, but for some noise."""
    draws = np.random.default_rng(step)
    successor = np.random.default_rng(0).permutation(CONFIG["vocab_size"])
    tokens = draws.integers(0, CONFIG["vocab_size"], (8, 25), np.int32)
    for place in range(1, tokens.shape[1]):
        tokens[:, place] = np.where(draws.random(8) < 0.9, successor[tokens[:, place - 1]], tokens[:, place])
    mask = jnp.ones((1, 8, 24), jnp.float32)
    return {"inputs": jnp.asarray(tokens[None, :, :-1]), "targets": jnp.asarray(tokens[None, :, 1:]), "loss_mask": mask}


def run(tx: Transformation, steps: int) -> tuple[Any, list[float]]:
    graph, adapter, frozen = build()
    state = create_state(tx, jax.tree.map(jnp.array, adapter))
    step_fn, losses = jit_train_step(graph, tx, language_model_loss, state), []
    for step in range(steps):
        state, metrics = step_fn(state, frozen, batch(step))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.integration
def test_the_loss_curve_is_that_of_float32() -> None:
    """200 steps of a rank-32 adapter on new data each: within 1 % of AdamW in the mean of every ten."""
    state, found = run(optimizer("adamw8bit", 3e-3), 200)
    _, expected = run(optimizer("adamw", 3e-3), 200)
    stored = jax.tree.leaves(state.opt_state, is_leaf=lambda leaf: isinstance(leaf, BlockwiseArray))
    assert sum(isinstance(leaf, BlockwiseArray) for leaf in stored) >= 20
    a, b = (np.reshape(losses, (20, 10)).mean(1) for losses in (found, expected))
    np.testing.assert_allclose(a, b, rtol=0.01)
    assert b[-1] < 0.8 * b[0]


@pytest.mark.integration
def test_donated_offloaded_and_saved(tmp_path: Path) -> None:
    """Under the compiled, donating step, in host memory: a run through a checkpoint gives the same numbers, bit for bit. On
    the device the blocks are cut across layers, and differ where a layer's matrix is too small to be quantised."""
    tx = host_offload(optimizer("adamw8bit", 3e-3))
    straight, losses = run(tx, 4)
    _, on_device = run(optimizer("adamw8bit", 3e-3), 4)
    np.testing.assert_allclose(losses, on_device, rtol=1e-4)
    state, found = run(tx, 2)
    on_host = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.sharding.memory_kind == "pinned_host"]
    assert sum(leaf.size for leaf in on_host) > 0.99 * sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.opt_state)} >= {"uint8", "float32"}
    graph, adapter, frozen = build()
    like = create_state(tx, jax.tree.map(jnp.array, adapter))
    store = StateStore(tmp_path, keep=1)
    store.save(2, state, {})
    state, _ = store.restore(like)
    store.close()
    step_fn = jit_train_step(graph, tx, language_model_loss, state)
    for step in (2, 3):
        old = jax.tree.leaves(state.opt_state)
        state, metrics = step_fn(state, frozen, batch(step))
        assert all(leaf.is_deleted() for leaf in old)
        found.append(float(metrics["loss"]))
    assert found == losses
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(straight), strict=True):
        np.testing.assert_array_equal(leaf, expected)
