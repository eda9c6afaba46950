"""What the plan says that layers save for the backward pass, against the residuals of the traced step (2 CPU-s a case)."""

import math
from collections import Counter
from typing import Any

import jax
import pytest
from family_configs import T5
from flax import nnx
from tiers import tiered
from tiny_llama import TINY

from qlora_jax.models import ModelSpec, family_of
from qlora_jax.nn import CPU, AttentionTarget
from qlora_jax.peft import LoRA, Method, PromptTuning
from qlora_jax.plan.residuals import residual_bytes
from qlora_jax.quant.targets import tracing_for
from qlora_jax.train import BatchSpec, StepSpec, build_step, language_model_objective
from qlora_jax.train.objectives import seq2seq_objective

SIZES = {"num_layers": 3, "num_decoder_layers": 5, "d_model": 128, "d_ff": 192, "d_kv": 16, "num_heads": 4}


def traced(spec: Any, target: AttentionTarget = CPU) -> int:
    """Return the bytes of all residuals of the loss that a layer has each for itself, but for parameters."""
    step = build_step(spec, platform=target)
    config, own = spec.model.config, Counter((x.shape, x.dtype) for x in jax.tree.leaves((step.state.adapter, step.frozen)))
    layers = {getattr(config, name, 0) for name in ("num_hidden_layers", "num_layers", "num_decoder_layers")}

    def pull_back(adapter: Any, frozen: Any, batch: Any) -> Any:
        return jax.vjp(lambda x: spec.objective.loss(nnx.merge(step.graphdef, x, frozen), batch, None), adapter)[1]

    found = jax.tree.leaves(jax.eval_shape(pull_back, step.state.adapter, step.frozen, step.micro_batch))
    # The weights of norms [layers, 1, 1, hidden] are parameters too.
    stacked = [x for x in found if len(x.shape) > 2 and x.shape[0] in layers and x.shape[1:3] != (1, 1)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked if (x.shape, x.dtype) not in own)


T5_CASES: list[tuple[str, str, Method]] = [
    ("dots", "gated-gelu", LoRA(8)),
    ("none", "relu", LoRA(8)),
    ("none", "gated-gelu", LoRA(8)),
    ("full", "relu", LoRA(8)),
    ("dots", "relu", LoRA(8, use_dora=True)),
    ("dots", "gated-gelu", PromptTuning(7)),
]


@pytest.mark.parametrize(("remat", "feed_forward", "method"), tiered(T5_CASES, quick=T5_CASES[:2]))
def test_an_encoder_decoder(remat: Any, feed_forward: str, method: Method) -> None:
    """Sources and targets of different lengths, and stacks of different heights."""
    fields = T5 | {"model_type": "t5", "feed_forward_proj": feed_forward, "decoder_start_token_id": 0, **SIZES}
    model = ModelSpec(family_of(fields).config(fields), method=method, remat=remat, dtype="bfloat16")
    spec = StepSpec(model, seq2seq_objective(), BatchSpec(batch_size=2, length=48, source_length=80))
    assert residual_bytes(spec, CPU) == (traced(spec), 0)


def test_an_encoder_decoder_compiled_for_an_h100() -> None:
    """By how much the temporaries of compiled steps grew for each layer, from 4 to 12 in one of the stacks (jax 0.10.2)."""

    def saved(remat: Any, encoder: int, decoder: int) -> int:
        sizes = {"num_layers": encoder, "num_decoder_layers": decoder, "d_model": 256, "d_ff": 512, "d_kv": 64}
        fields = T5 | {"model_type": "t5", "decoder_start_token_id": 0, **sizes}
        model = ModelSpec(family_of(fields).config(fields), method=LoRA(8), remat=remat, dtype="bfloat16")
        spec = StepSpec(model, seq2seq_objective(), BatchSpec(batch_size=8, length=128, source_length=256))
        return residual_bytes(spec, AttentionTarget("gpu", (9, 0)))[0]

    compiled = {"dots": (10_748_032, 9_158_784), "none": (18_121_888, 14_427_808)}
    for remat, (of_encoder, of_decoder) in compiled.items():
        assert (saved(remat, 12, 4) - saved(remat, 4, 4)) / 8 == pytest.approx(of_encoder, rel=2e-4)
        assert (saved(remat, 4, 12) - saved(remat, 4, 4)) / 8 == pytest.approx(of_decoder, rel=2e-4)


@pytest.mark.parametrize(
    ("platform", "length", "packed"),
    tiered(
        [("cpu", 48, False), ("cpu", 1024, False), ("cuda", 200, True), ("cuda", 200, False), ("cuda", 700, True)],
        quick=[("cpu", 1024, False), ("cuda", 200, True)],
    ),
)
def test_a_decoder_saves_the_results_of_attention(platform: Any, length: int, packed: bool) -> None:
    """With "dots", so that the backward pass does not compute them again: in a block, in tiles of queries, and by cuDNN."""
    sizes = {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    fields = TINY | {"model_type": "llama", **sizes}
    model = ModelSpec(family_of(fields).config(fields), method=LoRA(8), remat="dots", dtype="bfloat16")
    spec = StepSpec(model, language_model_objective(packed=packed), BatchSpec(batch_size=2, length=length))
    target = AttentionTarget("gpu", (9, 0)) if platform == "cuda" else CPU
    with tracing_for(platform):
        assert residual_bytes(spec, target) == (traced(spec, target), 0)
