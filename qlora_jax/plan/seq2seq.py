"""The residuals of an encoder-decoder: what its layers save for the backward pass, by remat.

The layers of the decoder have cross-attention, whose keys and values have the length of the sources, and whose queries and
result have that of the targets. In units of an activation's size, with E and D for the tokens of all sources and of all
targets, h for the features of all heads, d for hidden_size and f for the feed-forward's inner features:

    remat             a layer of the encoder                      a layer of the decoder
    full, offload     E d                                         D d
    dots              E (2d + 4h + gf)                            D (3d + 6h + gf) + 2 E h
    none              E (2d + 5h + (1 + g) f)                     D (3d + 8h + (1 + g) f) + 2 E h

g is 2 with a gated feed-forward and 1 without. "dots" saves the input of the layer, the results of all linear layers but the
last, and those of attention. "none" saves the inputs of the linear layers, for their LoRA, the queries, keys, values and
results of attention, and the values that the activation needs (for a ReLU without a gate, 1 byte of each). XLA for CPUs
keeps an input of several linear layers once for each of them. Each attention adds a float32 number for each head of a token,
each norm in "none" its input and two numbers for each token in float32, and each LoRA its inner values. DoRA also saves the
result of each linear layer before its columns are scaled.
"""

import dataclasses

import jax.numpy as jnp

from qlora_jax.models import ModelSpec
from qlora_jax.models.t5_config import T5Config
from qlora_jax.nn.attention_target import AttentionTarget
from qlora_jax.train.spec import StepSpec

__all__ = ["seq2seq_residuals"]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A layer of one side: its tokens, its kinds of attention (1 or 2), and the tokens of cross-attention's keys."""

    tokens: int
    attentions: int
    keys: int = 0


def seq2seq_residuals(spec: StepSpec[ModelSpec], config: T5Config, target: AttentionTarget) -> tuple[int, int]:
    """Return (device, host) bytes that the layers save for the backward pass of one micro-batch, on each device."""
    method, rows = spec.model.method, spec.sequences
    embedded = 0 if method is None or method.is_prefix else method.virtual_tokens  # before the sources
    source = rows * (embedded + (spec.batch.source_length or spec.batch.length))
    encoder, decoder = _Layer(source, 1), _Layer(rows * spec.batch.length, 2, source)
    of_encoder, of_decoder = (_saved(spec, config, layer, target.platform == "cpu") for layer in (encoder, decoder))
    saved = config.num_layers * of_encoder + config.num_decoder_layers * of_decoder
    return (0, saved) if spec.model.remat == "offload" else (saved, 0)


def _saved(spec: StepSpec[ModelSpec], config: T5Config, layer: _Layer, separate: bool) -> int:
    """Return the bytes that one layer saves; `separate`: an input of several linear layers is kept for each of them."""
    method, size = spec.model.method, jnp.dtype(spec.model.dtype).itemsize
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    tokens, attentions = layer.tokens, layer.attentions
    stream = tokens * hidden * size
    if spec.model.remat in ("full", "offload"):
        return stream
    ups = 2 if config.glu else 1
    # Self-attention has q, k, v and its result; cross-attention has q and its result, and keys and values of the sources.
    attended = size * heads * (tokens * (2 + 2 * attentions) + 2 * layer.keys)
    sums = 4 * attentions * tokens * config.num_heads
    rank = 0 if method is None else method.rank
    lora = size * rank * (tokens * (2 + 2 * attentions + ups + 1) + 2 * layer.keys)
    if method is not None and method.use_dora:
        outputs = (2 + attentions) * heads + (attentions + 1) * hidden + ups * inner
        lora += size * (tokens * outputs + 2 * layer.keys * heads)
    if spec.model.remat == "dots":
        return stream + attended + sums + lora + tokens * size * (attentions * hidden + ups * inner)
    norms = 4 * tokens * (attentions + 1) * (hidden + 2)
    normed = 2 + attentions + ups if separate else attentions + 1
    inputs = tokens * size * (hidden * normed + attentions * heads + inner)
    activated = tokens * inner * (2 * size if config.glu else 1)
    return attended + sums + lora + norms + inputs + activated
