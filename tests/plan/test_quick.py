"""The quick plan: exact where it says so, and of the right kind elsewhere."""

import dataclasses

import pytest
from tiny_llama import TINY, changed

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import AttentionTarget
from qlora_jax.peft import LoRA
from qlora_jax.plan import SIZES, quick_plan
from qlora_jax.plan.factors import FACTORS
from qlora_jax.plan.features import features
from qlora_jax.plan.residuals import residual_bytes
from qlora_jax.train import BatchSpec, StepSpec, language_model_objective

HOPPER, TPU = AttentionTarget("gpu", (9, 0)), AttentionTarget("tpu")
LLAMA = llama_config(SIZES["llama-3-8b"])
PLAIN = language_model_objective(packed=False)
SPEC = StepSpec(ModelSpec(LLAMA, method=LoRA(16)), PLAIN, BatchSpec(batch_size=4, length=2048))


def test_weights_adapter_and_optimizer_are_exact() -> None:
    """Those of Llama-3-8B by hand: packed values, 8-bit scales, the scales' scales, an offset a matrix."""
    plan = quick_plan(SPEC, "cuda")
    values = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert plan.packed_weights == values // 2 + values // 64 + values // 64 // 256 * 4 + 32 * 7 * 4
    assert plan.dense_weights == 2 * (2 * 128256 * 4096 + 65 * 4096)
    adapter = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert plan.adapter == 4 * adapter
    assert plan.optimizer == 8 * adapter + 8
    assert plan.peak == plan.exact + plan.working


def test_columns_are_spread_over_devices_and_the_adapter_is_not() -> None:
    one, four = quick_plan(SPEC, "tpu"), quick_plan(SPEC, "tpu", 4)
    assert four.adapter == one.adapter
    assert four.packed_weights == pytest.approx(one.packed_weights / 4, rel=0.002)
    assert four.batch == one.batch  # rows of each device


def test_residuals_by_remat() -> None:
    stream = 32 * 4 * 2048 * 4096 * 2
    assert residual_bytes(SPEC, HOPPER) == (stream, 0)
    assert residual_bytes(changed(SPEC, model={"remat": "offload"}), HOPPER) == (0, stream)
    dots, _ = residual_bytes(changed(SPEC, model={"remat": "dots"}), HOPPER)
    none, _ = residual_bytes(changed(SPEC, model={"remat": "none"}), HOPPER)
    assert stream < dots < none


@pytest.mark.parametrize(
    ("target", "length", "attended", "sums"),
    [
        (HOPPER, 128, 128 * 80, 0),
        (TPU, 128, 128 * 128, 0),  # splash attention takes heads of 64, 128 …
        (HOPPER, 50, 128 * 80, 0),  # cuDNN gets multiples of 128 tokens on Hopper, and of 64 elsewhere
        (AttentionTarget("gpu", (8, 0)), 50, 64 * 80, 0),
        (AttentionTarget(), 64, 64 * 80, 4),  # XLA's attention saves a float32 sum for each head of a token
    ],
)
def test_saved_results_of_attention_are_padded_as_the_kernel_wants(
    target: AttentionTarget, length: int, attended: int, sums: int
) -> None:
    """By hand, for heads of 80 features: what "dots" saves in each layer, in bfloat16."""
    heads, kv, hidden, inner, rank, layers = 4, 2, 320, 640, 8, 3
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv, "hidden_size": hidden, "head_dim": 80}
    config = llama_config(TINY | shape | {"intermediate_size": inner, "num_hidden_layers": layers})
    spec = StepSpec(ModelSpec(config, method=LoRA(rank), remat="dots"), PLAIN, BatchSpec(length=length))
    products = length * (hidden + 80 * heads + 2 * 80 * kv + hidden + 2 * inner + 7 * rank) + heads * attended
    assert residual_bytes(spec, target) == (layers * (2 * products + sums * heads * length), 0)


@pytest.mark.parametrize(("target", "padded"), [(HOPPER, 1152), (AttentionTarget("gpu", (8, 0)), 1088)])
def test_the_workspace_of_attention_is_that_of_padded_rows(target: AttentionTarget, padded: int) -> None:
    plan = quick_plan(changed(SPEC, batch={"length": 1080}), target)
    assert plan.workspace == 4 * 32 * padded * (128 + 1) * 4


def test_options_move_memory_the_right_way() -> None:
    plan = quick_plan(SPEC, "cuda")
    host = quick_plan(changed(SPEC, optimizer={"host_optimizer": True}), "cuda")
    assert host.optimizer == 0
    assert 0 <= host.host_peak - plan.optimizer < 1024  # a counter a layer
    eight = quick_plan(changed(SPEC, optimizer={"name": "adamw8bit"}), "cuda")
    assert eight.optimizer == pytest.approx(plan.optimizer * 2.03 / 8, rel=0.01)
    assert quick_plan(changed(SPEC, batch={"batch_size": 8}), "cuda").peak > plan.peak


def test_of_a_long_sequence_one_chunk_of_inner_activations_counts() -> None:
    long = changed(SPEC, batch={"batch_size": 1, "length": 32768})
    whole, chunked = (features(changed(long, model={"remat": remat}), "cuda", 1, 1) for remat in ("dots", "full"))
    assert chunked["inner"] == 8192 * 14336 * 2 == whole["inner"] // 4
    assert chunked["stream"] < whole["stream"] == whole["hidden"]
    assert features(SPEC, "cuda", 1, 1)["stream"] == SPEC.tokens * 4096 * 2  # 4 x 2048 are one chunk
    shorter = changed(SPEC, batch={"batch_size": 1, "length": 4096})
    dense, groups = (
        features(dataclasses.replace(shorter, objective=language_model_objective(attention_groups=groups)), "cpu", 1, 1)
        for groups in (1, 4)
    )
    assert dense["scores"] == 2 * 32 * 256 * 256 * 2  # a tile
    assert groups["scores"] == 2 * 32 * 4 * 128 * 1024 * 2  # a block of each group


def test_sizes_that_only_a_tpu_has_are_those_of_its_arrays() -> None:
    """By hand: 512 × 128256 logits in float32 are not in VMEM, six arrays and a matrix less VMEM, sums of 128 lanes."""
    sizes, elsewhere = features(SPEC, "tpu", 1, 1), features(SPEC, "cuda", 1, 1)
    assert sizes["outside"] == sizes["logits"] == 512 * 128256 * 4
    assert sizes["wide"] == 6 * 8192 * 14336 * 2 + 4096 * 14336 * 2 - 112 * 2**20
    assert sizes["sums"] == 4 * 2048 * 32 * 128 * 4
    assert sizes["padded"] == 0
    small = features(changed(SPEC, model={"config": llama_config(SIZES["smollm2-135m"])}), "tpu", 1, 1)
    assert small["outside"] == 0  # 96 MiB
    assert small["padded"] == 640 * (49152 * 2 + 30 * 768)  # 576 features become 640
    assert {elsewhere[name] for name in ("outside", "wide", "sums", "padded")} == {0}


@pytest.mark.parametrize(("batch", "compiled"), [((1, 1024), 7108506112), ((4, 2048), 10596071936)])
def test_the_peak_on_a_tpu_is_that_of_libtpu(batch: tuple[int, int], compiled: int) -> None:
    """Peaks of the same steps that libtpu 0.0.42.1 compiled for a v5e."""
    spec = changed(SPEC, batch={"batch_size": batch[0], "length": batch[1]})
    assert quick_plan(spec, "tpu").peak == pytest.approx(compiled, rel=0.02)


def test_packed_tables_are_exact() -> None:
    """By hand: a byte a value and a float32 scale a row; or half a byte, a scale a block, one of 256 of those, an offset."""
    values, plain = 128256 * 4096, quick_plan(SPEC, "cuda")
    norms = plain.dense_weights - 2 * 2 * values
    for storage, each in (("int8", values + 4 * 128256), ("nf4", values // 2 + values // 64 + values // 64 // 256 * 4 + 4)):
        plan = quick_plan(changed(SPEC, model={"embedding_storage": storage}), "cuda")
        assert plan.packed_weights == plain.packed_weights + 2 * each
        assert plan.dense_weights == norms


@pytest.mark.parametrize("platform", FACTORS)
def test_there_is_a_factor_for_each_feature(platform: str) -> None:
    sizes = features(SPEC, platform, 1, 1)
    assert {name for factors in FACTORS[platform].values() for name in factors} == sizes.keys()
    assert min(min(factors.values()) for factors in FACTORS[platform].values()) >= 0


def test_packed_rows_take_what_others_take() -> None:
    """Nothing grows with the square of the length."""
    for length in (2048, 8192, 32768):
        batch = BatchSpec(length=length)
        plain, packed = (
            quick_plan(dataclasses.replace(SPEC, objective=language_model_objective(packed=x), batch=batch), "cuda").peak
            for x in (False, True)
        )
        assert plain <= packed < 1.05 * plain
