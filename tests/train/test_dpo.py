"""DPO against TRL's formula in torch on the same logits, with a reference that was built without an adapter."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_config import CONFIG

from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    PAIRS,
    create_state,
    dpo_loss,
    init_state,
    jit_eval_step,
    jit_train_step,
    language_model_loss,
    optimizer,
    split,
    with_reference,
    without_adapter,
)


def make(lora: LoRA | None, **fields: Any) -> CausalLM:
    config = llama_config(CONFIG | fields)
    return CausalLM(config, quantization=Quantization(), method=lora, remat="none", rngs=nnx.Rngs(0))


@cache
def build(dropout: float = 0.0) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen) of a random model; neither A nor B is zero."""
    lora = LoRA(rank=4, alpha=8, dropout=dropout)
    graph, _, _ = split(nnx.eval_shape(lambda: make(lora)))
    adapter, frozen = jax.jit(lambda: split(make(lora))[1:])()
    draws = np.random.default_rng(7)
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.1 * draws.standard_normal(leaf.shape, np.float32), adapter)
    return graph, moved, frozen


def pairs(rows: int = 4, length: int = 20, seed: int = 0) -> dict[str, jax.Array]:
    """Rows of unlike length; what is learned begins at another place in each."""
    draws = np.random.default_rng(seed)
    batch = {}
    for side in ("chosen", "rejected"):
        tokens = draws.integers(0, CONFIG["vocab_size"], (rows, length + 1), np.int32)
        start, end = draws.integers(2, 8, (rows, 1)), draws.integers(10, length + 1, (rows, 1))
        places = np.arange(length)[None]
        batch |= {
            f"{side}_inputs": tokens[:, :-1],
            f"{side}_targets": tokens[:, 1:],
            f"{side}_loss_mask": ((places >= start) & (places < end)).astype(np.float32),
        }
    return {name: jnp.asarray(x) for name, x in batch.items()}


def together(batch: dict[str, jax.Array], name: str) -> jax.Array:
    return jnp.concatenate([batch[f"chosen_{name}"], batch[f"rejected_{name}"]])


def cut(batch: dict[str, jax.Array], micro_batches: int = 1) -> dict[str, jax.Array]:
    return {name: x.reshape(micro_batches, -1, x.shape[-1]) for name, x in batch.items()}


@pytest.mark.parametrize(("beta", "smoothing"), [pytest.param(0.1, 0.0, marks=pytest.mark.integration), (0.5, 0.2)])
def test_loss_and_gradients_are_trls(beta: float, smoothing: float) -> None:
    """Every gradient of the adapter: torch's of the logits, pulled back by JAX through the model."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    graph, adapter, frozen = build()
    batch = pairs()
    inputs, targets, mask = (together(batch, name) for name in ("inputs", "targets", "loss_mask"))
    bare, _ = nnx.split(nnx.eval_shape(lambda: make(None)))
    reference_logits = torch.from_numpy(np.array(nnx.merge(bare, frozen)(inputs)))
    logits, pull_back = jax.vjp(lambda adapter: nnx.merge(graph, adapter, frozen)(inputs), adapter)
    leaf = torch.from_numpy(np.array(logits)).requires_grad_()

    def log_probabilities(logits: Any) -> Any:
        each = torch.gather(logits.log_softmax(-1), 2, torch.from_numpy(np.array(targets)).long()[..., None])[..., 0]
        return (each * torch.from_numpy(np.array(mask))).sum(-1)

    policy, reference = log_probabilities(leaf), log_probabilities(reference_logits)
    # trl.DPOTrainer.dpo_loss, loss_type "sigmoid".
    ratios = (policy[:4] - policy[4:]) - (reference[:4] - reference[4:])
    sigmoid = torch.nn.functional.logsigmoid
    losses = -sigmoid(beta * ratios) * (1 - smoothing) - sigmoid(-beta * ratios) * smoothing
    rewards = (beta * (policy - reference)).detach()
    losses.sum().backward()
    (expected,) = pull_back(jnp.asarray(leaf.grad.numpy()))

    def loss(adapter: Any) -> Any:
        return dpo_loss(nnx.merge(graph, adapter, frozen), batch, None, beta=beta, label_smoothing=smoothing)

    (found, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(found, losses.sum().item(), rtol=1e-5)
    np.testing.assert_allclose(sums["rewards/chosen"], rewards[:4].sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums["rewards/rejected"], rewards[4:].sum(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums["rewards/margins"], (rewards[:4] - rewards[4:]).sum(), rtol=1e-4, atol=1e-5)
    assert float(sums["rewards/accuracies"]) == (rewards[:4] > rewards[4:]).sum().item()
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        assert scale > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(scale)))


def test_without_its_adapter_a_model_is_its_base() -> None:
    graph, adapter, frozen = build(0.5)
    model = nnx.merge(graph, adapter, frozen)
    tokens = pairs()["chosen_inputs"]
    with_adapter = model(tokens)
    bare, _ = nnx.split(nnx.eval_shape(lambda: make(None)))
    np.testing.assert_array_equal(without_adapter(model)(tokens, key=jax.random.key(0)), nnx.merge(bare, frozen)(tokens))
    np.testing.assert_array_equal(model(tokens), with_adapter, err_msg="and the model itself has kept it")


def test_an_untrained_adapter_has_no_rewards() -> None:
    """B = 0: every pair costs log 2, whatever beta, and padding pairs cost nothing."""
    graph, adapter, frozen = build()
    model = nnx.merge(graph, jax.tree.map(jnp.zeros_like, adapter), frozen)
    batch = pairs()
    loss, sums = dpo_loss(model, batch, None)
    np.testing.assert_allclose(loss, 4 * np.log(2), rtol=1e-6)
    assert len(sums) == 4
    np.testing.assert_allclose(list(sums.values()), 0, atol=1e-5)
    batch["rejected_loss_mask"] = batch["rejected_loss_mask"].at[1].set(0)
    np.testing.assert_allclose(dpo_loss(model, batch, None)[0], 3 * np.log(2), rtol=1e-6)
    assert PAIRS.count(batch) == 3


def test_a_remembered_adapter_is_the_reference() -> None:
    """Against itself it has no rewards; the base has against it what it has against the base, with the other sign."""
    graph, adapter, frozen = build()
    model, batch = nnx.merge(graph, adapter, frozen), pairs()
    names = ("rewards/chosen", "rewards/rejected")
    _, against_base = dpo_loss(model, batch, None)
    assert all(abs(float(against_base[name])) > 1e-3 for name in names)
    remembering = with_reference(model)
    loss, sums = dpo_loss(remembering, batch, None)
    np.testing.assert_allclose(loss, 4 * np.log(2), rtol=1e-5)
    np.testing.assert_allclose(list(sums.values()), 0, atol=2e-5)
    graph, adapter, frozen = split(remembering)
    base = nnx.merge(graph, jax.tree.map(jnp.zeros_like, adapter), frozen)
    _, against_adapter = dpo_loss(base, batch, None)
    for name in names:
        np.testing.assert_allclose(against_adapter[name], -against_base[name], rtol=0, atol=2e-5)


@pytest.mark.integration
def test_training_prefers_what_is_chosen() -> None:
    """The means are over pairs, however the batch is cut; the loss falls, and the rewards part."""
    graph, adapter, frozen = build()
    fresh = jax.tree.map(lambda leaf: np.array(leaf), adapter)
    rows = {}
    for micro_batches in (1, 2):
        state = create_state(optimizer("adamw", 1e-2), jax.tree.map(jnp.array, fresh))
        step = jit_train_step(graph, optimizer("adamw", 1e-2), dpo_loss, state, unit=PAIRS)
        rows[micro_batches] = []
        for _ in range(20):
            state, metrics = step(state, frozen, cut(pairs(), micro_batches))
            rows[micro_batches].append({name: float(value) for name, value in metrics.items()})
    first, last = rows[1][0], rows[1][-1]
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert first.keys() == {"loss", "grad_norm", "pairs"} | rewards
    for name, value in first.items():
        assert rows[2][0][name] == pytest.approx(value, rel=1e-4), name
    assert first["pairs"] == 4
    assert last["loss"] < 0.2 < first["loss"]
    assert last["rewards/accuracies"] == 1.0
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], rel=1e-5)
    assert last["rewards/margins"] > 1
    held_out, count = jit_eval_step(graph, dpo_loss, unit=PAIRS)(jax.tree.map(jnp.array, fresh), frozen, pairs())
    for name in ("loss", *rewards):
        assert float(held_out[name]) / float(count) == pytest.approx(first[name], rel=1e-4, abs=1e-5), name


def test_dropout_is_the_tuned_models_alone() -> None:
    graph, adapter, frozen = build(0.5)
    model, batch = nnx.merge(graph, adapter, frozen), pairs()
    found = [float(dpo_loss(model, batch, key)[0]) for key in (None, jax.random.key(0), jax.random.key(1))]
    assert len({*found}) == 3
    model = nnx.merge(graph, jax.tree.map(jnp.zeros_like, adapter), frozen)
    np.testing.assert_allclose(dpo_loss(model, batch, jax.random.key(0))[0], 4 * np.log(2), rtol=1e-6)


@pytest.mark.integration
def test_no_second_copy_of_the_weights_and_never_all_logits() -> None:
    """What the compiler plans for a step, beside one of plain fine-tuning on the same rows."""
    lora = LoRA(rank=4, alpha=8)
    fields = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 8000}
    graph, adapter, frozen = split(nnx.eval_shape(lambda: make(lora, **fields)))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def size(tree: Any) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    tx = optimizer("adamw", 1e-3)
    state = placed(jax.eval_shape(partial(init_state, tx), adapter))
    frozen = placed(frozen)
    shapes = placed(cut(pairs(4, 64)))
    whole = {name: jnp.zeros((1, 8, 64), jnp.int32) for name in ("inputs", "targets")} | {"loss_mask": jnp.zeros((1, 8, 64))}
    dpo = jit_train_step(graph, tx, dpo_loss, state, unit=PAIRS).lower(state, frozen, shapes).compile().memory_analysis()
    plain = jit_train_step(graph, tx, language_model_loss, state).lower(state, frozen, whole).compile().memory_analysis()
    arguments = size(state) + size(frozen) + size(shapes)
    assert arguments <= dpo.argument_size_in_bytes <= arguments + 64 * len(jax.tree.leaves((state, frozen, shapes)))
    more = dpo.temp_size_in_bytes - plain.temp_size_in_bytes
    assert more < size(frozen) / 4, "the reference has no weights of its own"
    assert dpo.output_size_in_bytes - dpo.alias_size_in_bytes < 1000
