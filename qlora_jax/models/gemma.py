"""Gemma 1, 2 and 3 (text): embeddings scaled by sqrt(hidden), norms whose weight is an offset from 1, GELU.

Gemma 2 normalizes the results of attention and feed-forward, caps scores and logits, and every other layer has an attention
window. Gemma 3 normalizes queries and keys instead of capping scores, and five of six layers have a window and a different
position embedding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields
from qlora_jax.models.llama import NORMS, llama_like
from qlora_jax.nn import RotaryEmbedding

_POST_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QUERY_KEY_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# The config.json of Gemma 3 omits fields that equal the defaults of transformers.
_DEFAULTS_3 = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window_pattern": 6,
}


def gemma_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Gemma 1; raises the errors of `llama_config`.

    The first files contain `hidden_act: gelu` but mean the approximation by tanh.
    """
    fields = Fields("Gemma", config, _DEFAULTS)
    rope = fields.rope(fields["head_dim"])
    return _config(fields, [AttentionKind(rope)] * fields["num_hidden_layers"], NORMS)


def gemma2_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Gemma 2; raises the errors of `llama_config`."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    fields = Fields("Gemma 2", config, _DEFAULTS | caps)
    given = {name: None if config.get(name, cap) is None else fields[name] for name, cap in caps.items()}  # null: no cap
    rope = fields.rope(fields["head_dim"])
    count = fields["num_hidden_layers"]
    types = fields.layer_types(["full_attention" if layer % 2 else "sliding_attention" for layer in range(count)])
    kinds = [AttentionKind(rope, fields["sliding_window"] if kind == "sliding_attention" else None) for kind in types]
    scale = fields["query_pre_attn_scalar"] ** -0.5  # before `_config` reports what is wrong
    return dataclasses.replace(
        _config(fields, kinds, _POST_NORMS),
        score_scale=scale,
        score_cap=given["attn_logit_softcapping"],
        logit_cap=given["final_logit_softcapping"],
        post_norms=True,
    )


def gemma3_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Gemma 3 text model; raises the errors of `llama_config`."""
    fields = Fields("Gemma 3", config, _DEFAULTS | _DEFAULTS_3)
    fields.expect("use_bidirectional_attention", False)
    count, pattern = fields["num_hidden_layers"], fields["sliding_window_pattern"]
    types = fields.layer_types(
        ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(count)]
    )
    full = AttentionKind(fields.rope(fields["head_dim"], of="full_attention"))
    if "sliding_attention" in (fields.get("rope_parameters") or {}):
        sliding_rope = fields.rope(fields["head_dim"], of="sliding_attention")
    else:  # in older files the scaling applies only to the layers without a window
        base, longest = fields["rope_local_base_freq"], fields["max_position_embeddings"]
        sliding_rope = RotaryEmbedding.from_config(fields["head_dim"], base, longest, None)
    sliding = AttentionKind(sliding_rope, fields["sliding_window"])
    scale = fields["query_pre_attn_scalar"] ** -0.5  # before `_config` reports what is wrong
    caps = [fields.get(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")]
    return dataclasses.replace(
        _config(
            fields, [sliding if kind == "sliding_attention" else full for kind in types], (*_POST_NORMS, *_QUERY_KEY_NORMS)
        ),
        score_scale=scale,
        score_cap=caps[0],
        logit_cap=caps[1],
        post_norms=True,
        query_key_norm=True,
    )


def _config(fields: Fields, layers: list[AttentionKind], norms: tuple[str, ...]) -> DecoderConfig:
    """Return the configuration with the options that all versions have in common."""
    fields.expect("hidden_activation", "gelu_pytorch_tanh")
    bias = fields.get("attention_bias", False)
    result = llama_like(fields, layers, norms=norms, activation="hidden_activation", qkv_bias=bias, o_bias=bias)
    return dataclasses.replace(result, norm="rms+1", embedding_scale=math.sqrt(result.hidden_size))
