"""Phi-3, 3.5 and 4: Llama with one matrix for queries, keys and values, one for gate and up, and LongRoPE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields
from qlora_jax.models.llama import llama_like

_LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def phi3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Phi-3; raises the errors of `llama_config`."""
    defaults = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    }
    fields = Fields("Phi-3", config, defaults)
    kind = AttentionKind(fields.rope(fields.sizes()["head_dim"]), fields.get("sliding_window"))
    result = llama_like(fields, [kind] * fields["num_hidden_layers"], linear=_LINEAR)
    return dataclasses.replace(result, fused="blocks")
