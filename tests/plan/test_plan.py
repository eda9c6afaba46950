"""plan/: the arithmetic of bytes, the steps that are planned, the reports and the table of sizes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tiny_llama import TINY, changed

from qlora_jax.errors import OptionError
from qlora_jax.models import CausalLM, ModelSpec, family_of
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.plan import HUB_IDS, SIZES, Program, as_json, draw, machine_named, quick_plan, report_of, spec_values, table
from qlora_jax.plan.tree_bytes import tree_bytes, weight_bytes
from qlora_jax.quant import Quantization
from qlora_jax.train import (
    PAIRS,
    BatchSpec,
    OptimizerName,
    OptimizerSpec,
    StepSpec,
    build_step,
    dpo_objective,
    language_model_objective,
    seq2seq_objective,
    split,
)

LINEAR = 256 * 256 * 2 + 256 * 128 * 2 + 256 * 512 * 3  # values in the linear layers of one decoder layer
# The parameters that the models' authors publish, in billions.
PARAMETERS = {
    "smollm2-135m": 0.1345,
    "tinyllama-1.1b": 1.100,
    "llama-7b": 6.738,
    "llama-13b": 13.016,
    "llama-33b": 32.529,
    "llama-65b": 65.286,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "llama-3.3-70b": 70.554,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "qwen3-8b": 8.191,
    "gemma-2-9b": 9.242,
}

MODEL = ModelSpec(llama_config(TINY), method=LoRA(8))
BATCH = BatchSpec(batch_size=3, length=8, micro_batches=2)


def test_weights_are_counted_by_kind() -> None:
    config = llama_config(TINY)

    def build() -> CausalLM:
        return CausalLM(config, quantization=Quantization(), method=LoRA(rank=8), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    _, adapter, frozen = split(nnx.eval_shape(build))
    packed, dense = weight_bytes(frozen)
    values = 3 * LINEAR
    scales = values // 64
    # Codes, 8-bit scales, a float32 for each 256 scales, an offset for each of the 21 matrices.
    assert packed == values // 2 + scales + scales // 256 * 4 + 21 * 4
    assert dense == 2 * (2 * 512 * 256 + 7 * 256)  # table, head, and the norms of three layers and the end
    assert tree_bytes(adapter) == 4 * 3 * 8 * (2 * (256 + 256) + 2 * (256 + 128) + 3 * (256 + 512))


def test_peak_counts_donated_outputs_once() -> None:
    program = Program(100, 30, 25, 50, 7, 2, 0.0, 0, 0.0)
    assert program.peak == 100 + 50 + 30 - 25
    assert dataclasses.replace(program, workspace=9, added_workspace=4).peak == 100 + 50 + 30 - 25 + 4
    assert program.host_peak == 9


def test_only_steps_with_host_memory_on_a_gpu_have_options_of_the_compiler() -> None:
    """XLA for GPUs counts host memory as the device's, and would recompute what fits."""
    spec = StepSpec(MODEL, language_model_objective(), BATCH)
    on_host = changed(spec, optimizer={"host_optimizer": True}), changed(spec, model={"remat": "offload"})
    for one in on_host:
        assert build_step(one, platform="cuda").compiler_options.keys() == {"xla_gpu_memory_limit_slop_factor"}
        assert one.compiler_options("tpu") == one.compiler_options("cpu") == {}
    assert spec.compiler_options("cuda") == {}


def test_a_packed_batch_carries_segments() -> None:
    spec = StepSpec(MODEL, language_model_objective(packed=False), BATCH)
    assert not spec.objective.packed
    assert set(spec.batch_shapes()) == {"inputs", "targets", "loss_mask"}
    spec = StepSpec(MODEL, language_model_objective(), BATCH)
    assert spec.objective.packed
    batch = spec.batch_shapes()
    assert set(batch) == {"inputs", "targets", "loss_mask", "segment_ids", "positions"}
    assert {leaf.shape for leaf in batch.values()} == {(2, 3, 8)}
    assert {leaf.shape for leaf in spec.batch_shapes(4).values()} == {(2, 12, 8)}


def test_pairs_are_two_batches() -> None:
    one = StepSpec(MODEL, language_model_objective(packed=False), BATCH).batch_shapes()
    pairs = StepSpec(MODEL, dpo_objective(), BATCH).batch_shapes()
    assert pairs.keys() == {f"{side}_{name}" for side in ("chosen", "rejected") for name in one}
    assert tree_bytes(pairs) == 2 * tree_bytes(one)
    assert PAIRS.count({name: jnp.ones(x.shape, x.dtype) for name, x in pairs.items()}) == 6


def test_sources_have_a_length_of_their_own() -> None:
    spec = StepSpec(MODEL, seq2seq_objective(), BatchSpec(batch_size=2, length=8, source_length=16))
    shapes = {name: leaf.shape for name, leaf in spec.batch_shapes().items()}
    assert {shapes[name] for name in ("sources", "source_mask")} == {(1, 2, 16)}
    assert {shapes[name] for name in ("inputs", "targets", "loss_mask")} == {(1, 2, 8)}
    assert spec.tokens == 2 * 16


def test_the_values_of_a_spec_are_plain() -> None:
    spec = StepSpec(MODEL, dpo_objective(reference=True), BATCH, OptimizerSpec(host_optimizer=True))
    values = spec_values(spec)
    assert json.loads(json.dumps(values)).keys() == values.keys()
    assert (values["objective"], values["reference"], values["host_optimizer"]) == ("dpo", True, True)
    assert (values["batch_size"], values["micro_batches"], values["length"], values["packed"]) == (3, 2, 8, False)
    assert spec_values(changed(spec, model={"dtype": jnp.float32}))["dtype"] == "float32"


@pytest.mark.parametrize(("optimizer", "bytes_a_value"), [("adamw", 8), ("lion", 4)])
def test_the_state_is_that_of_the_optimizer(optimizer: OptimizerName, bytes_a_value: int) -> None:
    spec = StepSpec(MODEL, language_model_objective(), BATCH, OptimizerSpec(optimizer))
    step = build_step(spec, platform="cuda")
    counters = 2 * 4  # of the rule and of the schedule
    assert tree_bytes(step.state.opt_state) == bytes_a_value * tree_bytes(step.state.adapter) // 4 + counters


def test_a_spec_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        BatchSpec(batch_size=0)
    with pytest.raises(OptionError, match="host_adapter: expected host_optimizer beside it"):
        OptimizerSpec(host_adapter=True)
    with pytest.raises(OptionError, match="attention_groups: expected at least 1, found 0"):
        language_model_objective(attention_groups=0)


def test_a_report_sums_up_and_is_drawn(tmp_path: Path) -> None:
    machine = machine_named("v5e:2x2")
    spec = StepSpec(MODEL, language_model_objective(packed=False))
    report = report_of(quick_plan(spec, "tpu", 4), spec, machine, "tiny")
    assert sum(size for _, size in report.device) == report.total == as_json(report)["peak"]
    assert report.fits
    text = table(report)
    assert "4 x TPU v5e" in text
    assert "fits" in text
    draw([report], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", SIZES)
def test_sizes_have_the_published_number_of_parameters(name: str) -> None:
    config = family_of(SIZES[name]).config(SIZES[name])
    model = nnx.eval_shape(lambda: CausalLM(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count / 1e9 == pytest.approx(PARAMETERS[name], abs=6e-4)


def test_hub_ids_name_sizes() -> None:
    assert set(HUB_IDS.values()) <= SIZES.keys()
