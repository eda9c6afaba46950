"""SmolLM3: Llama in which every fourth layer has no position embedding (NoPE)."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields
from qlora_jax.models.llama import llama_like


def smollm3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a SmolLM3; raises the errors of `llama_config`."""
    defaults = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 2e6,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    }
    fields = Fields("SmolLM3", config, defaults)
    sizes = fields.sizes()
    count, rope = sizes["num_hidden_layers"], fields.rope(sizes["head_dim"])
    interval = fields["no_rope_layer_interval"]
    with_rope = fields.get("no_rope_layers", [(layer + 1) % interval != 0 for layer in range(count)])
    if len(with_rope) < count:
        fields.problems.append(f"no_rope_layers: expected {count} numbers, found {len(with_rope)}")
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    types = fields.layer_types(["full_attention" if rotated or not window else "sliding_attention" for rotated in with_rope])
    layers = [
        AttentionKind(rope if rotated else None, window if kind == "sliding_attention" else None)
        for rotated, kind in zip(with_rope, types, strict=False)  # the lists may be longer than the model
    ]
    bias = fields.get("attention_bias", False)
    return llama_like(fields, layers, qkv_bias=bias, o_bias=bias, mlp_bias=fields.get("mlp_bias", False))
