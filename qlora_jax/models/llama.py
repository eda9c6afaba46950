"""Llama 1 to 3, and models with the same architecture: SmolLM 1 and 2, Yi, TinyLlama.

x = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1)))        n1 = norm(x)
x = x + down(silu(gate(n2)) * up(n2))                        n2 = norm(x)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.models.config import AttentionKind, DecoderConfig, Fields, kinds_of
from qlora_jax.models.parameter_mapping import ParameterMapping, layer_mappings

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
# Buffers of old checkpoints that the model computes itself.
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)


def llama_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Return the configuration in the config.json of a Llama.

    Raises:
        CheckpointError: fields are missing or have unsupported values; the message lists all of them.
    """
    fields = Fields("Llama", config, {"hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 2048})
    sizes, bias = fields.sizes(), fields.get("attention_bias", False)
    kinds = [AttentionKind(fields.rope(sizes["head_dim"]))] * sizes["num_hidden_layers"]
    return llama_like(fields, kinds, qkv_bias=bias, o_bias=bias, mlp_bias=fields.get("mlp_bias", False))


def llama_like(
    fields: Fields,
    layers: Sequence[AttentionKind],
    *,
    linear: Sequence[str] = (*ATTENTION, *FEED_FORWARD),
    norms: Sequence[str] = NORMS,
    activation: str = "hidden_act",
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
) -> DecoderConfig:
    """Return the configuration of a model whose modules have Llama's names.

    Args:
        fields: the fields of the config.json.
        layers: the attention of each layer.
        linear: names of the linear layers in a decoder layer.
        norms: names of the norms in a decoder layer.
        activation: name of the field that contains the activation.
        qkv_bias: whether queries, keys and values have a bias.
        o_bias: whether the attention's output projection has a bias.
        mlp_bias: whether the feed-forward's linear layers have biases.

    Raises:
        CheckpointError: fields are missing or have unsupported values; the message lists all of them.
    """
    sizes = fields.sizes()
    biased = (*(ATTENTION[:3] if qkv_bias else ()), *(ATTENTION[3:] if o_bias else ()), *(FEED_FORWARD if mlp_bias else ()))
    count, tied = sizes["num_hidden_layers"], sizes["tie_word_embeddings"]
    result = DecoderConfig(
        family=fields.family,
        **sizes,
        **kinds_of(layers),
        parameter_mappings=(
            ParameterMapping("model.embed_tokens.weight", ("embed_tokens", "weight")),
            ParameterMapping("model.norm.weight", ("norm", "weight")),
            *(() if tied else (ParameterMapping("lm_head.weight", ("lm_head", "weight")),)),
            *layer_mappings("model.layers", count, [(name, name) for name in norms], linear=False),
            *layer_mappings("model.layers", count, [(name, name) for name in linear], linear=True, biased=biased),
        ),
        norm_eps=fields["rms_norm_eps"],
        activation=fields.activation(activation),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
    )
    fields.check()
    return result
