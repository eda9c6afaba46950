"""A plan in seconds, by arithmetic: exact where shapes say it, and a few measured factors where only a compiler knows.

    arguments    weights, adapter, optimizer: exactly, from `jax.eval_shape` and the shardings of the job
    residuals    what each layer keeps for the backward pass, by its remat, times the layers: from shapes
    gradients    of the adapter, float32
    working      what lives beside these at the worst moment

The worst moment is one of two: the loss, with a chunk of logits and before the gradients (several GPUs allocate these while
the head is gathered), or a layer's backward pass, with its recomputed activations and with the gradients. Either's working
memory is a sum of sizes that shapes give (`features`), each times a factor (`FACTORS`) that scripts/measure_plan.py fits to
compiled plans; it prints them with the error left.

    quick peak = arguments + residuals + max(loss, gradients + layer)

Only the factors are empirical; they belong to the train step as it is, and are measured anew when it changes.
"""

import dataclasses
from typing import Any

import jax

from qlora_jax.models import DecoderConfig
from qlora_jax.models.chunks import chunk_count
from qlora_jax.nn import split_axis
from qlora_jax.nn.attention import block_of_queries
from qlora_jax.peft import LoRA
from qlora_jax.plan.recipe import Recipe, abstract_step, tree_bytes
from qlora_jax.quant import PackedEmbedding
from qlora_jax.train.loss import chunk_tokens

ERROR = 0.05  # the relative error of the peak that scripts/measure_plan.py holds it to
_PROGRAM = 2**26  # of a feature that is the same for all: a TPU's program itself and what it holds in the chip's own memory
# Where the feed-forward takes chunks on a GPU, attention's backward pass is the worst moment of a layer: the share of what
# is as large as the stream that it holds, and how much more of a mask (by llama-2-7b and llama-3-8b at 1 x 32768).
_ATTENTION, _CHUNKED_MASK = 0.45, 1.95
# Bytes of working memory for each byte of a feature, by platform and moment; scripts/measure_plan.py prints this table.
FACTORS: dict[str, dict[str, dict[str, float]]] = {
    "cuda": {
        "loss": {
            "program": 0.0,
            "logits": 1.962,
            "chunks": 0.0,
            "hidden": 7.412,
            "adapter": 0.0,
            "table": 0.0,
            "hoisted": 0.0,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.0,
            "inner": 2.159,
            "stream": 17.861,
            "held": 0.0,
            "heads": 0.433,
            "normed": 0.0,
            "matrix": 0.0,
            "adapter": 0.305,
            "mask": 0.89,
            "table": 0.0,
            "hoisted": 0.0,
        },
    },
    "cuda, several": {
        "loss": {
            "program": 1.141,
            "logits": 1.222,
            "chunks": 0.0,
            "hidden": 5.352,
            "adapter": 0.537,
            "table": 0.142,
            "hoisted": 0.221,
            "looped": 0.201,
        },
        "layer": {
            "program": 0.362,
            "inner": 4.397,
            "stream": 0.0,
            "held": 0.0,
            "heads": 4.177,
            "normed": 0.0,
            "matrix": 2.316,
            "adapter": 0.142,
            "mask": 1.608,
            "table": 0.028,
            "hoisted": 0.031,
        },
    },
    "tpu": {
        "loss": {
            "program": 3.106,
            "logits": 1.116,
            "chunks": 1.937,
            "hidden": 9.816,
            "adapter": 1.116,
            "table": 0.46,
            "hoisted": 0.4,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.001,
            "inner": 0.048,
            "stream": 9.415,
            "held": 20.804,
            "heads": 6.568,
            "normed": 9.18,
            "matrix": 5.372,
            "adapter": 1.198,
            "mask": 0.0,
            "table": 0.0,
            "hoisted": 0.0,
        },
    },
    "cpu": {
        "loss": {
            "program": 0.0,
            "logits": 3.0,
            "chunks": 0.5,
            "hidden": 2.0,
            "adapter": 0.5,
            "table": 1.0,
            "hoisted": 0.5,
            "looped": 0.0,
        },
        "layer": {
            "program": 0.0,
            "inner": 8.0,
            "stream": 8.0,
            "held": 0.0,
            "heads": 4.0,
            "normed": 0.0,
            "matrix": 2.0,
            "adapter": 1.0,
            "mask": 4.0,
            "table": 1.0,
            "hoisted": 0.5,
        },
    },
}


@dataclasses.dataclass(frozen=True)
class QuickPlan:
    """One training step on each device, in bytes.

    Attributes:
        host_adapter: the adapter in host memory, and its gradient.
        host_residuals: what remat "offload" keeps in host memory.
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

    @property
    def exact(self) -> int:
        """What takes no factor."""
        return self.peak - self.working

    @property
    def settled(self) -> int:
        """What is the same at every moment of the step."""
        return self.peak - self.working - self.gradients

    @property
    def peak(self) -> int:
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
        return self.host_optimizer + self.host_adapter + self.host_residuals


def quick_plan(recipe: Recipe, platform: str, devices: int = 1) -> QuickPlan:
    """The plan of a recipe on so many devices of a platform ("cuda", "tpu" or "cpu").

    Raises:
        ValueError: LoRA targets that match nothing.
    """
    step = abstract_step(recipe, platform, devices)
    packed, dense = _spread_bytes(step.frozen, devices)
    adapter, optimizer = tree_bytes(step.state.adapter), tree_bytes(step.state.opt_state)
    kept, kept_by_host = residual_bytes(recipe)
    on_device = 0 if recipe.host_adapter else adapter
    gradients, working = worst_moment(features(recipe, platform, devices, on_device), FACTORS[kind_of(platform, devices)])
    return QuickPlan(
        packed_weights=packed,
        dense_weights=dense,
        adapter=on_device,
        host_adapter=2 * adapter if recipe.host_adapter else 0,
        optimizer=0 if recipe.host_optimizer else optimizer,
        host_optimizer=optimizer if recipe.host_optimizer else 0,
        batch=tree_bytes(step.batch) // devices,
        residuals=kept,
        host_residuals=kept_by_host,
        gradients=gradients,
        working=working,
    )


def kind_of(platform: str, devices: int) -> str:
    """The key of `FACTORS`: XLA orders a program for several GPUs by other rules, which hide its gathers."""
    return "cuda, several" if platform == "cuda" and devices > 1 else platform


def worst_moment(sizes: dict[str, int], factors: dict[str, dict[str, float]]) -> tuple[int, int]:
    """(bytes of gradients, of working memory) at the moment that takes more."""
    loss, layer = (sum(factor * sizes[name] for name, factor in factors[moment].items()) for moment in ("loss", "layer"))
    if loss > sizes["adapter"] + layer:
        return 0, int(loss)
    return sizes["adapter"], int(layer)


def residual_bytes(recipe: Recipe) -> tuple[int, int]:
    """(device, host) bytes that the layers keep for the backward pass of one micro-batch, on each device.

    full      the input of each layer
    offload   the same, in host memory
    dots      also the results of all products, adapters' inner ones among them, and the attention's
    none      beside those of "dots" what stands between them: norms, rotated queries and keys, what goes into down
    """
    size, tokens = 2 if recipe.dtype == "bfloat16" else 4, recipe.positions
    layers, hidden, inner, heads, kv = _sizes(recipe)
    stream = layers * tokens * hidden * size
    if recipe.remat == "full":
        return stream, 0
    if recipe.remat == "offload":
        return 0, stream
    # q, k, v, the attention's output twice (out and o), gate and up; down ends the layer, and nothing needs it again
    products = tokens * (2 * heads + 2 * kv + hidden + 2 * inner) * size
    lora = tokens * 7 * (recipe.method.rank if isinstance(recipe.method, LoRA) else 0) * size
    if isinstance(recipe.method, LoRA) and recipe.method.use_dora:  # each layer's result before its columns are scaled
        lora += tokens * (heads + 2 * kv + 2 * hidden + 2 * inner) * size
    kept = stream + layers * (products + lora)
    if recipe.remat == "dots":
        return kept, 0
    between = tokens * (3 * hidden + heads + kv + inner) * size
    return kept + layers * between, 0


def features(recipe: Recipe, platform: str, devices: int, adapter: int) -> dict[str, int]:
    """Sizes, in bytes on each device, that working memory is made of: a layer's activations, a matrix, a chunk of logits."""
    config, size, tokens = recipe.config, 2 if recipe.dtype == "bfloat16" else 4, recipe.positions
    _, hidden, inner, heads, kv = _sizes(recipe)
    decoder = isinstance(config, DecoderConfig)
    attention = config.num_attention_heads if decoder else config.num_heads
    # cuDNN takes a mask as a bias, one for all heads; XLA's attention stores the scores of all of them.
    fused = platform != "cpu" and decoder and config.score_cap is None and recipe.dtype == "bfloat16"
    masked = recipe.packed and platform == "cuda"
    scores = (1 if masked else 0) if fused else 2 * attention
    queries = recipe.keys if fused or not decoder else min(block_of_queries(recipe.keys), recipe.keys)  # at a time
    of_value = {"none": size, "int8": 1, "nf4": 0.516}[recipe.embedding_storage]  # bytes in a table
    table = int(config.vocab_size * hidden * of_value) if devices > 1 else 0  # gathered
    tables = 2 if decoder and not config.tie_word_embeddings else 1
    spread = devices if config.vocab_size % devices == 0 else 1  # over whom the loss spreads the rows of the head
    # of each device's tokens
    chunk = chunk_tokens(config.vocab_size // spread, cpu=platform == "cpu" and devices == 1) // spread
    logits = min(chunk, recipe.tokens) * config.vocab_size * 4
    looped = recipe.tokens > chunk and recipe.micro_batches == 1  # over chunks, outside of a loop over micro-batches
    seen = -(-recipe.keys // recipe.attention_groups)  # tokens that a token may see
    at_once = -(-tokens // chunk_count(tokens, recipe.remat)) if decoder else tokens  # in the feed-forward
    in_chunks = platform == "cuda" and devices == 1 and at_once < tokens
    stream = round(_ATTENTION * tokens + (1 - _ATTENTION) * at_once) if in_chunks else tokens
    return {
        "inner": at_once * inner * size,
        "hidden": tokens * hidden * size,
        "stream": stream * hidden * size,
        "held": 0 if recipe.remat == "offload" else stream * hidden * size,  # a layer's input, in the stack of all
        "heads": tokens * (heads + 2 * kv) * size,
        "normed": tokens * (heads + kv) * size if decoder and config.query_key_norm else 0,
        "matrix": hidden * inner * size,
        "logits": logits,
        "program": _PROGRAM,
        "chunks": logits if looped else 0,
        "looped": table if looped and tables == 2 else 0,  # a head of its own is laid anew
        "table": table,
        "hoisted": tables * table if recipe.micro_batches > 1 else 0,  # out of the loop over micro-batches
        "adapter": adapter,
        "mask": int((_CHUNKED_MASK if in_chunks else 1) * recipe.sequences * scores * queries * seen * 2),
    }


def _sizes(recipe: Recipe) -> tuple[int, int, int, int, int]:
    """(layers, features, those of the feed-forward, of all query heads, of all key heads)."""
    config = recipe.config
    if isinstance(config, DecoderConfig):
        heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        return config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads, kv
    heads = config.num_heads * config.head_dim
    return config.num_layers + config.num_decoder_layers, config.hidden_size, config.intermediate_size, heads, heads


def _spread_bytes(frozen: Any, devices: int) -> tuple[int, int]:
    """(bytes of what is packed, bytes of the rest) on each of so many devices, as `nn.frozen_sharding` spreads them."""
    packed = dense = 0
    for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, PackedEmbedding)):
        quantized = isinstance(leaf, PackedEmbedding)
        for part in jax.tree.leaves(leaf):
            whole = split_axis(part.shape, devices) is None
            size = part.size * part.dtype.itemsize // (1 if whole else devices)
            packed, dense = (packed + size, dense) if quantized else (packed, dense + size)
    return packed, dense
