"""A plan in seconds, by arithmetic: exact where shapes decide, and by measured factors where only a compiler knows.

    arguments    weights, adapter, optimizer: exact, from `jax.eval_shape` and the shardings of the job
    residuals    what the layers save for the backward pass, which depends on remat: from shapes
    gradients    the gradients of the adapter, in float32
    working      the memory beside these at the peak: estimated

The peak is at one of three moments. One is the loss, with a chunk of logits and before the gradients exist (several GPUs
allocate these while the head is gathered). One is a layer's backward pass, with its recomputed activations and with the
gradients. On one GPU, attention's backward pass within it is a moment of its own, which decides for long sequences, whose
feed-forward takes chunks. The working memory of each is a sum of sizes that shapes give (`features`), each multiplied by a
factor (`FACTORS`).

    quick peak = arguments + residuals + max(loss, gradients + layer, gradients + attention)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.models import DecoderConfig, ModelSpec, T5Config
from qlora_jax.models.chunks import chunk_count
from qlora_jax.nn import split_axis
from qlora_jax.nn.attention import scores_at_once
from qlora_jax.nn.attention_packed import heads_at_once, padded_length
from qlora_jax.nn.attention_target import AttentionTarget, Kernel, attention_target, choose_kernel
from qlora_jax.plan.factors import FACTORS
from qlora_jax.plan.seq2seq import seq2seq_residuals
from qlora_jax.plan.tree_bytes import tree_bytes
from qlora_jax.plan.workspace import attention_workspace
from qlora_jax.quant import PackedEmbedding
from qlora_jax.train.cross_entropy import chunk_tokens
from qlora_jax.train.spec import Step, StepSpec, build_step

# The size of the feature "program", the same for all steps: a TPU's program itself and its data in the chip's own memory.
_PROGRAM = 2**26
# Where the feed-forward takes chunks on a GPU, the peak of a layer is in attention's backward pass: the share of what is as
# large as the residual stream (by llama-2-7b and llama-3-8b at 1 x 32768).
_ATTENTION = 0.45


@dataclasses.dataclass(frozen=True)
class QuickPlan:
    """The memory of one training step on each device, in bytes.

    Attributes:
        packed_weights: the quantised matrices and embeddings.
        dense_weights: the other frozen weights.
        adapter: the trainable parameters in device memory.
        host_adapter: the trainable parameters in host memory, with their gradient.
        optimizer, host_optimizer: the optimizer's state, in device or in host memory.
        batch: the batch.
        residuals, host_residuals: what the layers save for the backward pass, in device or in host memory.
        gradients: the gradients of the adapter at the peak.
        working: the estimated rest at the peak.
        workspace: cuDNN's workspace in attention's backward pass (`plan.workspace`); it is part of `working` if the peak is
            there.
    """

    packed_weights: int
    dense_weights: int
    adapter: int
    host_adapter: int
    optimizer: int
    host_optimizer: int
    batch: int
    residuals: int
    host_residuals: int
    gradients: int
    working: int
    workspace: int = 0

    @property
    def exact(self) -> int:
        """The part of the peak that does not depend on a measured factor."""
        return self.peak - self.working

    @property
    def settled(self) -> int:
        """The part of the peak that is the same at every moment of the step."""
        return self.peak - self.working - self.gradients

    @property
    def peak(self) -> int:
        """The bytes of device memory while the step runs."""
        return (
            self.packed_weights
            + self.dense_weights
            + self.adapter
            + self.optimizer
            + self.batch
            + self.residuals
            + self.gradients
            + self.working
        )

    @property
    def host_peak(self) -> int:
        """The bytes of host memory while the step runs."""
        return self.host_optimizer + self.host_adapter + self.host_residuals


def quick_plan(
    spec: StepSpec[ModelSpec], platform: str | AttentionTarget, devices: int = 1, *, step: Step | None = None
) -> QuickPlan:
    """Return the plan of a step on a number of devices: a platform ("cuda", "tpu" or "cpu"), or the target of a device.

    Args:
        spec: describes the step.
        platform: the platform or the target.
        devices: the number of devices.
        step: the step of a spec that differs in its batch only, which saves most of the time; it is built if None.

    Raises:
        QLoRAError: the adapter does not fit the model.
    """
    target = attention_target(platform)
    step = build_step(spec, platform=target, devices=devices) if step is None else step
    packed, dense = _spread_bytes(step.frozen, devices)
    adapter, optimizer = tree_bytes(step.state.adapter), tree_bytes(step.state.opt_state)
    saved, saved_on_host = residual_bytes(spec, target)
    on_device = 0 if spec.optimizer.host_adapter else adapter
    gradients, working = worst_moment(features(spec, target, devices, on_device), FACTORS[kind_of(name_of(target), devices)])
    return QuickPlan(
        packed_weights=packed,
        dense_weights=dense,
        adapter=on_device,
        host_adapter=2 * adapter if spec.optimizer.host_adapter else 0,
        optimizer=0 if spec.optimizer.host_optimizer else optimizer,
        host_optimizer=optimizer if spec.optimizer.host_optimizer else 0,
        batch=tree_bytes(spec.batch_shapes(devices)) // devices,
        residuals=saved,
        host_residuals=saved_on_host,
        gradients=gradients,
        working=working,
        workspace=_workspace(spec, target),
    )


def kind_of(platform: str, devices: int) -> str:
    """Return the key of `FACTORS`. XLA schedules a program for several GPUs by other rules, which hide its gathers."""
    return "cuda, several" if platform == "cuda" and devices > 1 else platform


def name_of(target: AttentionTarget) -> str:
    """Return the name of a device's platform in `FACTORS`: "cuda", "tpu" or "cpu"."""
    return "cuda" if target.platform == "gpu" else target.platform


def _kernel(spec: StepSpec[ModelSpec], config: DecoderConfig, target: AttentionTarget, length: int) -> Kernel:
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


def _has_kernel(spec: StepSpec[ModelSpec], config: DecoderConfig, target: AttentionTarget, length: int) -> bool:
    """Return whether a kernel of the device computes the attention of rows of this length, rather than XLA."""
    return _kernel(spec, config, target, length).name != "blocks"


def worst_moment(sizes: dict[str, int], factors: dict[str, dict[str, float]]) -> tuple[int, int]:
    """Return (bytes of gradients, bytes of working memory) at the moment that needs more memory."""
    working = {moment: sum(factor * sizes[name] for name, factor in of.items()) for moment, of in factors.items()}
    loss, rest = working.pop("loss"), max(working.values())
    if loss > sizes["adapter"] + rest:
        return 0, int(loss)
    return sizes["adapter"], int(rest)


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
    size, tokens = jnp.dtype(spec.model.dtype).itemsize, _positions(spec)
    layers, hidden, inner, heads, kv = _sizes(spec)
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
    keys = -(-_keys(spec) // spec.objective.attention_groups)
    sums = _positions(spec) * config.num_attention_heads * 4
    kernel = _kernel(spec, config, target, keys)
    if kernel.name == "blocks":
        return 1.0, sums
    if kernel.name == "cudnn" and spec.objective.packed:
        return (padding := padded_length(keys) / keys) * kernel.head_dim / config.head_dim, int(padding * sums)
    return kernel.length * kernel.head_dim / (keys * config.head_dim), 0


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
    config, size, tokens = spec.model.config, jnp.dtype(spec.model.dtype).itemsize, _positions(spec)
    keys = _keys(spec)
    _, hidden, inner, heads, kv = _sizes(spec)
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
    return {
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
        "scores": spec.sequences * 2 * attention * queries * seen * 2,
    }


def _workspace(spec: StepSpec[ModelSpec], target: AttentionTarget) -> int:
    """Return the bytes of cuDNN's workspace for a micro-batch on each GPU."""
    config, groups = spec.model.config, spec.objective.attention_groups
    if target.platform != "gpu" or not isinstance(config, DecoderConfig):
        return 0
    kernel, rows = _kernel(spec, config, target, -(-_keys(spec) // groups)), spec.sequences * groups
    if kernel.name == "blocks":
        return 0
    if not spec.objective.packed:
        return attention_workspace(rows, config.num_attention_heads, kernel.length, kernel.head_dim)
    tokens = -(-rows * kernel.length // 2)  # those of the right halves
    return attention_workspace(1, _heads_at_once(spec, config), tokens, kernel.head_dim)


def _parts(spec: StepSpec[ModelSpec], target: AttentionTarget) -> int:
    """Return the bytes of the queries that attention of packed rows takes at a time on a GPU, 0 elsewhere."""
    config = spec.model.config
    if not spec.objective.packed or not isinstance(config, DecoderConfig) or not _workspace(spec, target):
        return 0
    return (
        spec.sequences * _keys(spec) * _heads_at_once(spec, config) * config.head_dim * jnp.dtype(spec.model.dtype).itemsize
    )


def _heads_at_once(spec: StepSpec[ModelSpec], config: DecoderConfig) -> int:
    """Return the heads that attention of packed rows computes at a time."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = jnp.dtype(spec.model.dtype).itemsize
    at_once = heads_at_once(spec.sequences * _keys(spec), heads, kv_heads, config.head_dim, size)
    return at_once * heads // kv_heads


def _keys(spec: StepSpec[ModelSpec]) -> int:
    """Return the keys of a sequence, including those of virtual tokens."""
    method = spec.model.method
    return spec.batch.longest + (0 if method is None else method.virtual_tokens)


def _positions(spec: StepSpec[ModelSpec]) -> int:
    """Return the tokens that a device's pass through the layers takes, including virtual tokens that have an embedding."""
    method = spec.model.method
    embedded = method is not None and method.virtual_tokens > 0 and not method.is_prefix
    return spec.sequences * (_keys(spec) if embedded else spec.batch.longest)


def _sizes(spec: StepSpec[ModelSpec]) -> tuple[int, int, int, int, int]:
    """Return (layers, features, features of the feed-forward, of all query heads, of all key heads)."""
    config = spec.model.config
    if isinstance(config, DecoderConfig):
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, kv
    heads = config.num_heads * config.head_dim
    return config.num_layers + config.num_decoder_layers, config.hidden_size, config.intermediate_size, heads, heads


def _spread_bytes(frozen: Any, devices: int) -> tuple[int, int]:
    """Return (bytes that are packed, bytes of the rest) on each device, spread as `nn.frozen_sharding` spreads them."""
    packed = dense = 0
    for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, PackedEmbedding)):
        quantized = isinstance(leaf, PackedEmbedding)
        for part in jax.tree.leaves(leaf):
            whole = split_axis(part.shape, devices) is None
            size = part.size * part.dtype.itemsize // (1 if whole else devices)
            packed, dense = (packed + size, dense) if quantized else (packed, dense + size)
    return packed, dense
