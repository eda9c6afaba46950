"""The sizes that make up the working memory of a step: of a layer's activations, a matrix, a chunk of logits and others.

Each is in bytes on each device, by shapes alone. `plan.quick` multiplies each by a factor of `plan.factors`.
"""

import jax.numpy as jnp

from qlora_jax.models import DecoderConfig, ModelSpec
from qlora_jax.models.chunks import chunk_count
from qlora_jax.nn.attention import scores_at_once
from qlora_jax.nn.attention_packed import heads_at_once
from qlora_jax.nn.attention_target import AttentionTarget, attention_target
from qlora_jax.plan.residuals import attention_kernel, keys_of, positions_of, widths_of
from qlora_jax.plan.workspace import attention_workspace
from qlora_jax.train.cross_entropy import chunk_tokens
from qlora_jax.train.spec import StepSpec

# The size of the feature "program", the same for all steps: a TPU's program itself and its data in the chip's own memory.
_PROGRAM = 2**26
# The bytes of a TPU core's own memory (VMEM) that libtpu gives to arrays of the program.
_VMEM = 112 * 2**20
_LANES = 128  # a TPU pads the last axis of an array to a multiple of this
# Where the feed-forward takes chunks on a GPU, the peak of a layer is in attention's backward pass: the share of what is as
# large as the residual stream (by llama-2-7b and llama-3-8b at 1 x 32768).
_ATTENTION = 0.45


def features(spec: StepSpec[ModelSpec], platform: str | AttentionTarget, devices: int, adapter: int) -> dict[str, int]:
    """Return the sizes, in bytes on each device, that make up working memory, such as a layer's activations.

    Args:
        spec: the step.
        platform: "cuda", "tpu" or "cpu", or the target of a device.
        devices: the number of devices.
        adapter: the bytes of the adapter in device memory.
    """
    target = attention_target(platform)
    platform = name_of(target)
    config, size, tokens = spec.model.config, jnp.dtype(spec.model.dtype).itemsize, positions_of(spec)
    keys = keys_of(spec)
    _, hidden, inner, heads, kv = widths_of(spec)
    decoder = isinstance(config, DecoderConfig)
    attention = config.num_attention_heads if decoder else config.num_heads
    groups = spec.objective.attention_groups
    seen = -(-keys // groups)  # tokens that a token may see
    fused = decoder and _has_kernel(spec, config, target, seen)
    queries = 0
    if not fused:  # XLA's attention stores the scores of all heads, a block at a time
        queries, seen = scores_at_once(seen, target, causal=decoder)
        queries *= groups
    of_value = {"none": size, "int8": 1, "nf4": 0.516}[spec.model.embedding_storage]  # bytes in an embedding
    table = int(config.vocab_size * hidden * of_value) if devices > 1 else 0  # gathered
    tables = 2 if decoder and not config.tie_word_embeddings else 1
    spread = (
        devices if config.vocab_size % devices == 0 else 1
    )  # the devices over which the loss spreads the rows of the head
    # The chunk of each device's own tokens.
    chunk = chunk_tokens(config.vocab_size // spread, cpu=platform == "cpu" and devices == 1) // spread
    logits = min(chunk, spec.tokens) * config.vocab_size * 4
    looped = spec.tokens > chunk and spec.batch.micro_batches == 1  # over chunks, outside of a loop over micro-batches
    at_once = -(-tokens // chunk_count(tokens, spec.model.remat)) if decoder else tokens  # in the feed-forward
    in_chunks = platform == "cuda" and devices == 1 and at_once < tokens
    stream = round(_ATTENTION * tokens + (1 - _ATTENTION) * at_once) if in_chunks else tokens
    sizes = {
        "inner": at_once * inner * size,
        "hidden": tokens * hidden * size,
        "stream": stream * hidden * size,
        "held": 0 if spec.model.remat == "offload" else stream * hidden * size,  # a layer's input, in the stack of all
        "heads": tokens * (heads + 2 * kv) * size,
        "normed": tokens * (heads + kv) * size if decoder and config.query_key_norm else 0,
        "matrix": hidden * inner * size,
        "logits": logits,
        "program": _PROGRAM,
        "chunks": logits if looped else 0,
        "looped": table if looped and tables == 2 else 0,  # a head that is not tied is copied
        "table": table,
        "hoisted": tables * table if spec.batch.micro_batches > 1 else 0,  # moved out of the loop over micro-batches
        "adapter": adapter,
        "parts": _parts(spec, target),
        "scores": spec.sequences * 2 * attention * queries * seen * 2 if decoder else 0,
        # With a bias on the scores, as XLA's report of flan-t5-xl at 1 x 1024 on an H100 has it: scores, their gradient and
        # the bias in float32, and probabilities.
        "biased": 0 if decoder else spec.sequences * attention * queries * seen * (3 * 4 + size),
    }
    on_tpu = platform == "tpu"
    return sizes | {
        "outside": logits if on_tpu and logits > _VMEM else 0,  # the second array of logits, if it is not in VMEM
        "wide": max(0, _wide(sizes["inner"], sizes["matrix"]) - _VMEM) if on_tpu else 0,
        "sums": tokens * attention * _LANES * 4 if on_tpu and fused else 0,
        "offloaded": sizes["hidden"] if on_tpu and spec.model.remat == "offload" else 0,
        "padded": _padded(spec) if on_tpu else 0,
    }


def _wide(inner: int, matrix: int) -> int:
    """Return the bytes of the feed-forward's backward pass: six activations and a matrix, or later four and two matrices."""
    return max(6 * inner + matrix, 4 * inner + 2 * matrix)


def _padded(spec: StepSpec[ModelSpec]) -> int:
    """Return the bytes of the copies that a TPU makes of an embedding and of packed codes whose rows it pads."""
    config = spec.model.config
    layers, hidden, inner, *_ = widths_of(spec)
    if hidden % _LANES == 0:
        return 0
    tied = isinstance(config, DecoderConfig) and config.tie_word_embeddings and spec.model.embedding_storage == "none"
    table = config.vocab_size * jnp.dtype(spec.model.dtype).itemsize if tied else 0
    return -(-hidden // _LANES) * _LANES * (table + layers * inner // 2)


def name_of(target: AttentionTarget) -> str:
    """Return the name of a device's platform in `FACTORS`: "cuda", "tpu" or "cpu"."""
    return "cuda" if target.platform == "gpu" else target.platform


def workspace_of(spec: StepSpec[ModelSpec], target: AttentionTarget) -> int:
    """Return the bytes of cuDNN's workspace for a micro-batch on each GPU."""
    config, groups = spec.model.config, spec.objective.attention_groups
    if target.platform != "gpu" or not isinstance(config, DecoderConfig):
        return 0
    kernel, rows = attention_kernel(spec, config, target, -(-keys_of(spec) // groups)), spec.sequences * groups
    if kernel.name == "blocks":
        return 0
    if not spec.objective.packed:
        return attention_workspace(rows, config.num_attention_heads, kernel.length, kernel.head_dim)
    tokens = -(-rows * kernel.length // 2)  # those of the right halves
    return attention_workspace(1, _heads_at_once(spec, config), tokens, kernel.head_dim)


def _has_kernel(spec: StepSpec[ModelSpec], config: DecoderConfig, target: AttentionTarget, length: int) -> bool:
    """Return whether a kernel of the device computes the attention of rows of this length, rather than XLA."""
    return attention_kernel(spec, config, target, length).name != "blocks"


def _parts(spec: StepSpec[ModelSpec], target: AttentionTarget) -> int:
    """Return the bytes of the queries that attention of packed rows takes at a time on a GPU, 0 elsewhere."""
    config = spec.model.config
    if not spec.objective.packed or not isinstance(config, DecoderConfig) or not workspace_of(spec, target):
        return 0
    features, size = _heads_at_once(spec, config) * config.head_dim, jnp.dtype(spec.model.dtype).itemsize
    return spec.sequences * keys_of(spec) * features * size


def _heads_at_once(spec: StepSpec[ModelSpec], config: DecoderConfig) -> int:
    """Return the heads that attention of packed rows computes at a time."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = jnp.dtype(spec.model.dtype).itemsize
    at_once = heads_at_once(spec.sequences * keys_of(spec), heads, kv_heads, config.head_dim, size)
    return at_once * heads // kv_heads
