"""No constant of the size of a matrix or of its scales is carried by the loop over layers, in the step lowered for TPU.

`jnp.where(bit, constant, constant)` in a differentiated scan makes JAX hoist broadcast constants out of it: 16 float arrays
for each shape of a matrix, which live for the whole step.
"""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qlora_jax.quant.tensor
from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import codebook
from qlora_jax.quant.targets import tracing_for
from qlora_jax.train import BatchSpec, StepSpec, build_step, language_model_objective

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 4,  # as many as no matrix has rows of scales
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
MATRICES = {"192x192", "192x64", "192x320", "320x192"}
SCALES = {"3x192", "3x64", "3x320", "5x192"}


def loop_operands() -> list[Counter[str]]:
    """For each loop of the step, how many operands of each type it has."""
    model = ModelSpec(llama_config(TINY), method=LoRA(8))
    step = build_step(StepSpec(model, language_model_objective(packed=False), BatchSpec(length=128)), platform="tpu")
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), P())
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), step.state)
    run = dataclasses.replace(step, state=state).jit_train()
    with tracing_for("every"):
        text = run.trace(state, step.frozen, step.batch).lower(lowering_platforms=("tpu",)).as_text()
    loops = [line for line in text.splitlines() if "stablehlo.while(" in line]
    return [Counter(re.findall(r"tensor<([^>]*)>", line.rsplit(" : ", 1)[1])) for line in loops]


def of(shapes: set[str], loops: list[Counter[str]]) -> int:
    return sum(count for loop in loops for kind, count in loop.items() if kind.rpartition("x")[0] in shapes)


def test_no_operand_is_a_constant_of_a_matrix() -> None:
    loops = loop_operands()
    assert len(loops) >= 3  # layers forward, the vocabulary's chunks, layers back
    assert of(MATRICES, loops) == 0
    assert of(SCALES, loops) == 0


def test_the_trap_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def trapped(codes: Array, data_type: str) -> Array:
        leaves = [jnp.float32(value) for value in codebook("nf4")]
        for bit in range(4):
            is_set = ((codes >> bit) & 1) == 1
            leaves = [jnp.where(is_set, odd, even) for even, odd in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0]

    monkeypatch.setattr(qlora_jax.quant.tensor, "_lookup", trapped)
    jax.clear_caches()
    try:
        assert of(MATRICES, loop_operands()) >= 16 * len(MATRICES)
    finally:
        jax.clear_caches()
