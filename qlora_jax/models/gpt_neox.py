"""GPT-NeoX and Pythia: LayerNorms, biases, rotation of a part of each head, attention and feed-forward in parallel.

x = x + dense(attention(rope(q), rope(k), v)) + dense_4h_to_h(gelu(dense_h_to_4h(norm'(x))))      q, k, v of norm(x)
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields, kinds_of
from qlora_jax.models.parameter_mapping import ParameterMapping, layer_mappings

_LINEAR = (
    ("attention.query_key_value", "self_attn.query_key_value"),
    ("attention.dense", "self_attn.o_proj"),
    ("mlp.dense_h_to_4h", "mlp.up_proj"),
    ("mlp.dense_4h_to_h", "mlp.down_proj"),
)
_NORMS = (("input_layernorm", "input_layernorm"), ("post_attention_layernorm", "post_attention_layernorm"))
# Buffers of old checkpoints that the model computes itself.
IGNORED = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def gpt_neox_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a GPT-NeoX; raises the errors of `llama_config`."""
    defaults = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "attention_bias": True,
        "partial_rotary_factor": config.get("rotary_pct", 0.25),
        "rope_theta": config.get("rotary_emb_base", 10000.0),
    }
    fields = Fields("GPT-NeoX", config, defaults)
    sizes = fields.sizes() | {"num_key_value_heads": fields["num_attention_heads"]}
    layers, tied, bias = sizes["num_hidden_layers"], sizes["tie_word_embeddings"], fields["attention_bias"]
    biased = ("mlp.up_proj", "mlp.down_proj", *(("self_attn.query_key_value", "self_attn.o_proj") if bias else ()))
    result = DecoderConfig(
        family=fields.family,
        **sizes,
        **kinds_of([AttentionKind(fields.rope(sizes["head_dim"]))] * layers),
        parameter_mappings=(
            ParameterMapping("gpt_neox.embed_in.weight", ("embed_tokens", "weight")),
            ParameterMapping("gpt_neox.final_layer_norm.weight", ("norm", "weight")),
            ParameterMapping("gpt_neox.final_layer_norm.bias", ("norm", "bias")),
            *(() if tied else (ParameterMapping("embed_out.weight", ("lm_head", "weight")),)),
            *layer_mappings("gpt_neox.layers", layers, _NORMS, linear=False, biased=[ours for _, ours in _NORMS]),
            *layer_mappings("gpt_neox.layers", layers, _LINEAR, linear=True, biased=biased),
        ),
        norm="layer",
        norm_eps=fields["layer_norm_eps"],
        activation=fields.activation("hidden_act"),
        fused="heads",
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        glu=False,
        parallel=fields["use_parallel_residual"],
    )
    fields.check()
    return result
