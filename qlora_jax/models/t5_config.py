"""The configuration of a T5, and reading it from Hugging Face's config.json.

    v1.0             feed_forward_proj "relu"; the output head is tied to the embedding, inputs are scaled by 1/sqrt(d_model)
    v1.1, Flan-T5    feed_forward_proj "gated-gelu"; a separate output head; no scaling

transformers up to version 4 distinguishes the two by tie_word_embeddings. Version 5 always writes true for it, and
distinguishes them by scale_decoder_outputs. A v1.1 model that version 5 created has equal weights in embedding and head, and
its file contains them once.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from qlora_jax.errors import shortened
from qlora_jax.models.config import ACTIVATIONS, Fields
from qlora_jax.models.parameter_mapping import ParameterMapping
from qlora_jax.nn import Activation

# Copies of the embedding, and a relative position bias that no version of T5 reads.
IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",
    r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes and options of an encoder-decoder of the T5 family.

    Attributes:
        family: the model_type of config.json.
        parameter_mappings: names of the parameters in checkpoints.
        num_layers, num_decoder_layers: numbers of layers of the encoder and of the decoder.
        relative_buckets: number of buckets of the relative position bias.
        relative_max_distance: all distances from here on share a bucket.
        glu: whether the feed-forward is a gated linear unit.
        tie_word_embeddings: whether the output head is tied to the embedding; the decoder's outputs are then scaled.
        decoder_start_token_id: the token that the decoder's input starts with.
    """

    family: str
    parameter_mappings: tuple[ParameterMapping, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    relative_buckets: int
    relative_max_distance: int
    norm_eps: float
    activation: Activation
    glu: bool
    tie_word_embeddings: bool
    decoder_start_token_id: int


def t5_config(config: Mapping[str, Any]) -> T5Config:
    """Return the configuration in the config.json of a T5.

    Raises:
        CheckpointError: fields are missing or have unsupported values; the message lists all of them.
    """
    defaults = {
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    }
    fields = Fields("T5", config, defaults)
    layers = fields["num_layers"]
    decoder_layers = fields.get("num_decoder_layers", layers)
    tied = fields.get("scale_decoder_outputs", fields["tie_word_embeddings"])
    activation, glu = _feed_forward(fields)
    buckets, max_distance = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    if buckets < 4:
        fields.problems.append(f"relative_attention_num_buckets: expected at least 4, found {buckets}")
    if max_distance <= buckets // 2:
        fields.problems.append(
            f"relative_attention_max_distance: expected more than half the {buckets} buckets, found {max_distance}"
        )
    result = T5Config(
        family=fields.family,
        parameter_mappings=t5_mappings(layers, decoder_layers, glu=glu, tied=tied),
        vocab_size=fields["vocab_size"],
        hidden_size=fields["d_model"],
        intermediate_size=fields["d_ff"],
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        num_heads=fields["num_heads"],
        head_dim=fields["d_kv"],
        relative_buckets=buckets,
        relative_max_distance=max_distance,
        norm_eps=fields["layer_norm_epsilon"],
        activation=activation,
        glu=glu,
        tie_word_embeddings=tied,
        decoder_start_token_id=fields.get("decoder_start_token_id", fields["pad_token_id"]),
    )
    fields.check()
    return result


def t5_mappings(layers: int, decoder_layers: int, *, glu: bool, tied: bool) -> tuple[ParameterMapping, ...]:
    """Return the parameter mappings; with `tied` there is no separate output head."""
    return (
        ParameterMapping("shared.weight", ("shared", "weight")),
        *(() if tied else (ParameterMapping("lm_head.weight", ("lm_head", "weight")),)),
        *_stack_mappings("encoder", layers, cross=False, glu=glu),
        *_stack_mappings("decoder", decoder_layers, cross=True, glu=glu),
    )


def _stack_mappings(stack: str, layers: int, *, cross: bool, glu: bool) -> Iterator[ParameterMapping]:
    inner = (("wi_0", "gate"), ("wi_1", "up")) if glu else (("wi", "up"),)
    projections = tuple((name, name) for name in "qkvo")
    parts = [("SelfAttention", "self_attention", projections)]
    if cross:
        parts.append(("EncDecAttention", "cross_attention", projections))
    parts.append(("DenseReluDense", "feed_forward", (*inner, ("wo", "down"))))
    first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield ParameterMapping(first, (stack, "relative_attention_bias", "weight"))
    yield ParameterMapping(f"{stack}.final_layer_norm.weight", (stack, "norm", "weight"))
    for index, (theirs, ours, linears) in enumerate(parts):
        prefix = f"{stack}.block.{{layer}}.layer.{index}"
        yield ParameterMapping(f"{prefix}.layer_norm.weight", (stack, "layers", f"{ours}_norm", "weight"), layers)
        for their_linear, our_linear in linears:
            path = (stack, "layers", ours, our_linear, "weight")
            yield ParameterMapping(f"{prefix}.{theirs}.{their_linear}.weight", path, layers, linear=True)


def _feed_forward(fields: Fields) -> tuple[Activation, bool]:
    """Return (the activation, whether there is a gate) from the field feed_forward_proj."""
    value = fields["feed_forward_proj"]
    gate, _, name = value.rpartition("-")
    if value == "gated-gelu":  # T5 v1.1 was trained with the approximation by tanh, in spite of the name
        name = "gelu_new"
    if gate not in ("", "gated") or name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        fields.problems.append(
            f"feed_forward_proj: expected one of {known}, alone or after 'gated-', found {shortened(value)}"
        )
    return ACTIVATIONS.get(name, "relu"), gate == "gated"
