"""Qwen 2, 2.5 and 3: Llama with a bias on queries, keys and values (2, 2.5), or with a norm on queries and keys (3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields
from qlora_jax.models.llama import NORMS, llama_like

_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def qwen2_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Qwen 2 or 2.5; raises the errors of `llama_config`."""
    fields = Fields("Qwen2", config, _DEFAULTS)
    return llama_like(fields, _layers(fields), qkv_bias=True)


def qwen3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a dense Qwen 3; raises the errors of `llama_config`."""
    fields = Fields("Qwen3", config, _DEFAULTS | {"head_dim": 128})
    bias = fields.get("attention_bias", False)
    norms = (*NORMS, "self_attn.q_norm", "self_attn.k_norm")
    result = llama_like(fields, _layers(fields), norms=norms, qkv_bias=bias, o_bias=bias)
    return dataclasses.replace(result, query_key_norm=True)


def _layers(fields: Fields) -> list[AttentionKind]:
    """Return the attention of each layer; if the file enables windows, layers from `max_window_layers` on have one."""
    rope = fields.rope(fields.sizes()["head_dim"])
    window = fields["sliding_window"] if fields.get("use_sliding_window", False) else None
    first = fields["max_window_layers"] if window else fields["num_hidden_layers"]
    types = ["full_attention" if layer < first else "sliding_attention" for layer in range(fields["num_hidden_layers"])]
    return [AttentionKind(rope, window if kind == "sliding_attention" else None) for kind in fields.layer_types(types)]
