"""What the layers save for the backward pass, by shapes, and the shapes of a micro-batch that decide it."""

import jax.numpy as jnp

from qlora_jax.models import DecoderConfig, ModelSpec, T5Config
from qlora_jax.nn.attention_packed import padded_length
from qlora_jax.nn.attention_target import AttentionTarget, Kernel, choose_kernel
from qlora_jax.plan.seq2seq import seq2seq_residuals
from qlora_jax.train.spec import StepSpec


def residual_bytes(spec: StepSpec[ModelSpec], target: AttentionTarget) -> tuple[int, int]:
    """Return (device, host) bytes that the layers save for the backward pass of one micro-batch, on each device.

    They depend on remat, and the results of the attention on how it is computed on the target (`_attended`):

    full      the input of each layer
    offload   the input of each layer, in host memory
    dots      also the results of all matrix products, those inside adapters included, and of the attention
    none      also the values between these: norms, rotated queries and keys, the input of the down projection
    """
    if isinstance(config := spec.model.config, T5Config):
        return seq2seq_residuals(spec, config, target)
    size, tokens = jnp.dtype(spec.model.dtype).itemsize, positions_of(spec)
    layers, hidden, inner, heads, kv = widths_of(spec)
    stream = layers * tokens * hidden * size
    if spec.model.remat == "full":
        return stream, 0
    if spec.model.remat == "offload":
        return 0, stream
    # q, k, v, the attention's output twice (attended and o), gate and up; down ends the layer and is not needed again
    padding, sums = _attended(spec, config, target)
    products = tokens * (heads + 2 * kv + hidden + 2 * inner) * size + int(padding * tokens * heads) * size + sums
    method = spec.model.method
    lora = 0 if method is None else tokens * 7 * method.rank * size
    if method is not None and method.use_dora:  # each linear layer's result before its columns are scaled
        lora += tokens * (heads + 2 * kv + 2 * hidden + 2 * inner) * size
    saved = stream + layers * (products + lora)
    if spec.model.remat == "dots":
        return saved, 0
    rotated = int(padding * tokens * (heads + (2 if padding > 1 else 1) * kv))  # the values are copied if they are padded
    between = (tokens * (3 * hidden + inner) + rotated) * size
    return saved + layers * between, 0


def _attended(spec: StepSpec[ModelSpec], config: DecoderConfig, target: AttentionTarget) -> tuple[float, int]:
    """Return (how many times as large the padded heads of a kernel are, bytes of the sums that XLA's attention saves).

    A kernel is given padded rows and heads, and its padded result is saved. XLA's attention and that of packed rows on GPUs
    save a float32 sum for each head of each token as well.
    """
    keys = -(-keys_of(spec) // spec.objective.attention_groups)
    sums = positions_of(spec) * config.num_attention_heads * 4
    kernel = attention_kernel(spec, config, target, keys)
    if kernel.name == "blocks":
        return 1.0, sums
    if kernel.name == "cudnn" and spec.objective.packed:
        padding = padded_length(keys) / keys
        return padding * kernel.head_dim / config.head_dim, int(padding * sums)
    return kernel.length * kernel.head_dim / (keys * config.head_dim), 0


def attention_kernel(spec: StepSpec[ModelSpec], config: DecoderConfig, target: AttentionTarget, length: int) -> Kernel:
    """Return what computes the attention of rows of this length on a device."""
    method = spec.model.method
    return choose_kernel(
        target,
        head_dim=config.head_dim,
        length=length,
        dtype=spec.model.dtype,
        cap=config.score_cap,
        segmented=spec.objective.packed,
        shared=0 if method is None else method.virtual_tokens,
    )


def keys_of(spec: StepSpec[ModelSpec]) -> int:
    """Return the keys of a sequence, including those of virtual tokens."""
    method = spec.model.method
    return spec.batch.longest + (0 if method is None else method.virtual_tokens)


def positions_of(spec: StepSpec[ModelSpec]) -> int:
    """Return the tokens that a device's pass through the layers takes, including virtual tokens that have an embedding."""
    method = spec.model.method
    embedded = method is not None and method.virtual_tokens > 0 and not method.is_prefix
    return spec.sequences * (keys_of(spec) if embedded else spec.batch.longest)


def widths_of(spec: StepSpec[ModelSpec]) -> tuple[int, int, int, int, int]:
    """Return (layers, features, features of the feed-forward, of all query heads, of all key heads)."""
    config = spec.model.config
    if isinstance(config, DecoderConfig):
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, kv
    heads = config.num_heads * config.head_dim
    return config.num_layers + config.num_decoder_layers, config.hidden_size, config.intermediate_size, heads, heads
