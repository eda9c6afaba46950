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
from qlora_jax.nn import AttentionTarget
from qlora_jax.peft import LoRA, Method, PrefixTuning, PromptTuning
from qlora_jax.plan.quick import residual_bytes
from qlora_jax.train import BatchSpec, StepSpec, build_step, language_model_objective
from qlora_jax.train.objectives import seq2seq_objective

SIZES = {"num_layers": 3, "num_decoder_layers": 5, "d_model": 128, "d_ff": 192, "d_kv": 16, "num_heads": 4}


def traced(spec: Any) -> int:
    """Return the bytes of all residuals of the loss that a layer has each for itself, but for parameters."""
    step = build_step(spec, platform="cpu")
    config, own = spec.model.config, Counter((x.shape, x.dtype) for x in jax.tree.leaves((step.state.adapter, step.frozen)))
    layers = {getattr(config, name, 0) for name in ("num_hidden_layers", "num_layers", "num_decoder_layers")}

    def pull_back(adapter: Any, frozen: Any, batch: Any) -> Any:
        return jax.vjp(lambda x: spec.objective.loss(nnx.merge(step.graphdef, x, frozen), batch, None), adapter)[1]

    found = jax.tree.leaves(jax.eval_shape(pull_back, step.state.adapter, step.frozen, step.micro_batch))
    # The weights of norms [layers, 1, 1, hidden] are parameters too.
    stacked = [x for x in found if len(x.shape) > 2 and x.shape[0] in layers and x.shape[1:3] != (1, 1)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in stacked if (x.shape, x.dtype) not in own)


T5_CASES: list[tuple[str, str, Method, int]] = [
    ("dots", "gated-gelu", LoRA(8), 0),
    ("none", "relu", LoRA(8), 0),
    ("none", "gated-gelu", LoRA(8), 0),
    ("full", "relu", LoRA(8), 0),
    ("dots", "relu", LoRA(8, use_dora=True), 0),
    ("dots", "gated-gelu", PromptTuning(7), 7),
    ("dots", "relu", PrefixTuning(7), 0),
]


@pytest.mark.parametrize(("remat", "feed_forward", "method", "more"), tiered(T5_CASES, quick=T5_CASES[:2]))
def test_an_encoder_decoder(remat: Any, feed_forward: str, method: Method, more: int) -> None:
    """Sources and targets of different lengths, and stacks of different heights."""
    fields = T5 | {"model_type": "t5", "feed_forward_proj": feed_forward, "decoder_start_token_id": 0, **SIZES}
    model = ModelSpec(family_of(fields).config(fields), method=method, remat=remat, dtype="bfloat16")
    spec = StepSpec(model, seq2seq_objective(), BatchSpec(batch_size=2, length=48, source_length=80))
    assert residual_bytes(spec, AttentionTarget()) == (traced(spec), 0)


@pytest.mark.parametrize("length", [48, 1024])
def test_a_decoder_saves_the_results_of_attention(length: int) -> None:
    """With "dots", so that the backward pass does not compute them again: in one block, and in tiles of queries."""
    fields = TINY | {"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 128}
    model = ModelSpec(family_of(fields).config(fields), method=LoRA(8), remat="dots", dtype="bfloat16")
    spec = StepSpec(model, language_model_objective(packed=False), BatchSpec(batch_size=2, length=length))
    assert residual_bytes(spec, AttentionTarget()) == (traced(spec), 0)
