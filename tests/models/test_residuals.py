"""What a training step on a CPU keeps for the backward pass: 16 bits a number in bfloat16, and no float32 copy of it."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import tiered

from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import checkpoint_name
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import language_model_loss, split

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


def make_model(remat: Any) -> CausalLM:
    return CausalLM(
        llama_config(CONFIG),
        quantization=Quantization(),
        method=LoRA(4),
        dtype=jnp.bfloat16,
        remat=remat,
        rngs=nnx.Rngs(0),
    )


def compiled_text(remat: Any) -> str:
    """The gradient of a step of 2 x 32 tokens, compiled for this CPU."""
    graph, adapter, frozen = split(nnx.eval_shape(partial(make_model, remat)))
    batch = {name: jax.ShapeDtypeStruct((2, 32), jnp.int32) for name in ("inputs", "targets")}
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 32), jnp.float32)

    def loss(adapter: Any, frozen: Any, batch: Any) -> jax.Array:
        return language_model_loss(nnx.merge(graph, adapter, frozen), batch, None)

    return jax.jit(jax.grad(loss)).lower(adapter, frozen, batch).compile().as_text()


@pytest.mark.parametrize("remat", tiered(["full", "dots"], quick=["full"]))
def test_no_float32_copy_of_what_is_kept(remat: str) -> None:
    """Stacks of 5 layers of 64 numbers and more for each of 64 tokens; weights and adapters lie in stacks of three axes."""
    text = compiled_text(remat)

    def stacks(kind: str) -> set[str]:
        shapes = re.findall(rf"\b{kind}\[(5,\d+,\d+,\d+(?:,\d+)*)\]", text)
        return {shape for shape in shapes if np.prod([int(n) for n in shape.split(",")]) >= 5 * 64 * 64}

    assert "5,2,32,64" in stacks("u16"), "the layers' inputs"
    assert len(stacks("u16")) == 1 or remat == "dots"
    assert not stacks("f32")
    assert not stacks("bf16")


@pytest.mark.integration
@pytest.mark.parametrize("remat", ["dots", "offload"])
def test_what_is_kept_gives_the_same_gradients(remat: Any) -> None:
    """In bfloat16, against a step that keeps everything."""

    def gradients(remat: Any) -> list[np.ndarray]:
        graph, adapter, frozen = split(make_model(remat))
        draws = np.random.default_rng(0)
        adapter = jax.tree.map(lambda x: x + 0.05 * draws.standard_normal(x.shape, np.float32), adapter)
        batch = {name: draws.integers(0, 96, (2, 32)).astype(np.int32) for name in ("inputs", "targets")}
        batch["loss_mask"] = np.ones((2, 32), np.float32)

        def loss(adapter: Any, frozen: Any) -> jax.Array:
            return language_model_loss(nnx.merge(graph, adapter, frozen), batch, None)

        return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(adapter, frozen))]

    for found, wanted in zip(gradients(remat), gradients("none"), strict=True):
        assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted)


def test_naming_changes_no_number_and_no_gradient() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.bfloat16)
    for value in (x, x.astype(jnp.float32)):
        found, pull = jax.vjp(lambda x: checkpoint_name(x, "linear"), value)
        np.testing.assert_array_equal(found, value)
        np.testing.assert_array_equal(pull(value)[0], value)


def test_a_policy_keeps_by_name() -> None:
    """With the name kept, the first sine is not computed again."""

    def run(x: jax.Array) -> jax.Array:
        return jnp.sin(checkpoint_name(jnp.sin(x), "linear")).sum()

    def sines(*names: str) -> int:
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return str(jax.make_jaxpr(jax.grad(jax.checkpoint(run, policy=policy)))(jnp.ones(4, jnp.bfloat16))).count(" sin ")

    assert sines("linear") < sines("other")
