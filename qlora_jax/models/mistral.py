"""Mistral: Llama; in the first version, the attention of all layers has a window."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields
from qlora_jax.models.llama import llama_like


def mistral_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Mistral; raises the errors of `llama_config`.

    If `sliding_window` is missing, the window is 4096; if it is null, there is no window.
    """
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "sliding_window": 4096}
    fields = Fields("Mistral", config, defaults)
    window = None if config.get("sliding_window", 4096) is None else fields["sliding_window"]
    kind = AttentionKind(fields.rope(fields.sizes()["head_dim"]), window)
    return llama_like(fields, [kind] * fields["num_hidden_layers"])
