"""What is planned: a model, an adapter, an optimizer and a batch, and all of it as shapes.

Recipe                 every option of a run that changes the memory of its step
abstract_step(recipe)  the model in parts, the optimizer, the loss and the batch, built as the job builds them, with no
                       memory behind any leaf
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.models import T5, CausalLM, DecoderConfig, ModelConfig, Remat
from qlora_jax.nn import default_implementation
from qlora_jax.peft import LoRA, Method, PromptMethod
from qlora_jax.quant import EmbeddingStorage, PackedEmbedding, Quantization
from qlora_jax.train.dpo import PAIRS, dpo_loss, with_reference
from qlora_jax.train.loss import language_model_loss, seq2seq_loss
from qlora_jax.train.offload import host_offload
from qlora_jax.train.optim import OptimizerName, learning_rate_schedule, optimizer
from qlora_jax.train.step import TOKENS, LossFunction, TrainState, Transformation, Unit, init_state, split

PlannedObjective = Literal["sft", "dpo"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, as far as its memory goes.

    Attributes:
        config: of the model.
        quantization: of the linear layers; None keeps them dense.
        embedding_storage: storage of the token table and the output head.
        dtype: of activations and dense weights.
        batch_size: sequences of a micro-batch on each device, or pairs of them for DPO.
        micro_batches: whose gradients are added up in a step.
        length: tokens of a sequence; of an encoder-decoder, of its source and of its target.
        packed: whether batches say which document each token belongs to, which those of pairs never do.
        host_optimizer: whether the optimizer's state lives in pinned host memory.
        host_adapter: whether the adapter and its gradient do, and the optimizer's state with them.
        attention_groups: of LongLoRA's attention; 1 for dense attention.
        reference: whether DPO's reference is a copy of the adapter, as where a run goes on from one; else it is the base.
    """

    config: ModelConfig
    quantization: Quantization | None = Quantization()
    embedding_storage: EmbeddingStorage = "none"
    method: Method = LoRA()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: Remat = "full"
    objective: PlannedObjective = "sft"
    batch_size: int = 1
    micro_batches: int = 1
    length: int = 512
    packed: bool = True
    optimizer: OptimizerName = "adamw"
    host_optimizer: bool = False
    host_adapter: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float | None = 0.3
    neftune_alpha: float = 0.0
    attention_groups: int = 1
    reference: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches", "length", "attention_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.host_adapter and not self.host_optimizer:
            raise ValueError("host_adapter: expected host_optimizer beside it, found none")
        if self.objective == "dpo" and not isinstance(self.config, DecoderConfig):
            raise ValueError("objective: expected sft with an encoder-decoder, found dpo")

    @property
    def sequences(self) -> int:
        """Sequences that a device's pass through the model sees."""
        return self.batch_size * (2 if self.objective == "dpo" else 1)

    @property
    def tokens(self) -> int:
        """Tokens that a device's pass through the model sees."""
        return self.sequences * self.length

    @property
    def keys(self) -> int:
        """Keys of a sequence, with those of virtual tokens."""
        return self.length + (self.method.virtual_tokens if isinstance(self.method, PromptMethod) else 0)

    @property
    def positions(self) -> int:
        """Tokens that a device's pass through the layers sees, with virtual ones."""
        embedded = isinstance(self.method, PromptMethod) and not self.method.is_prefix
        return self.sequences * (self.keys if embedded else self.length)


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """What a training step is made of, as shapes.

    Attributes:
        graphdef, adapter, frozen: the model in parts, as `train.split` gives them.
        batch: of all devices, `[micro-batches, rows, t]`.
    """

    graphdef: Any
    adapter: Any
    frozen: Any
    tx: Transformation
    state: TrainState
    loss: LossFunction
    unit: Unit
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_step(recipe: Recipe, platform: str, devices: int = 1) -> AbstractStep:
    """The parts of a recipe's training step.

    Args:
        platform: whose attention kernel the model takes.

    Raises:
        ValueError: LoRA targets that match nothing.
    """
    graphdef, adapter, frozen = split(abstract_model(recipe, platform))
    tx = optimizer(
        recipe.optimizer,
        learning_rate_schedule("constant", 2e-4, 100),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )
    tx = host_offload(tx, adapter=recipe.host_adapter) if recipe.host_optimizer else tx
    state = jax.eval_shape(lambda adapter: init_state(tx, adapter), adapter)
    loss, unit = _loss(recipe)
    return AbstractStep(graphdef, adapter, frozen, tx, state, loss, unit, abstract_batch(recipe, devices))


def abstract_model(recipe: Recipe, platform: str) -> Any:
    """The model of a recipe, without memory."""
    family = CausalLM if isinstance(recipe.config, DecoderConfig) else T5

    def build() -> Any:
        model = family(
            recipe.config,  # type: ignore[arg-type]
            quantization=recipe.quantization,
            embedding_storage=recipe.embedding_storage,
            method=recipe.method,
            dtype=jnp.dtype(recipe.dtype),
            attention=default_implementation(platform),
            remat=recipe.remat,
            rngs=nnx.Rngs(0),
        )
        return with_reference(model) if recipe.objective == "dpo" and recipe.reference else model

    return nnx.eval_shape(build)


def _loss(recipe: Recipe) -> tuple[LossFunction, Unit]:
    if recipe.objective == "dpo":
        return dpo_loss, PAIRS
    if not isinstance(recipe.config, DecoderConfig):
        return seq2seq_loss, TOKENS
    loss = partial(language_model_loss, neftune_alpha=recipe.neftune_alpha, attention_groups=recipe.attention_groups)
    return loss, TOKENS


def abstract_batch(recipe: Recipe, devices: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data` hands to a training step."""
    shape = (recipe.micro_batches, recipe.batch_size * devices, recipe.length)
    whole = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in ("inputs", "targets")}
    whole["loss_mask"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if not isinstance(recipe.config, DecoderConfig):
        return whole | {
            "sources": jax.ShapeDtypeStruct(shape, jnp.int32),
            "source_mask": jax.ShapeDtypeStruct(shape, jnp.bool_),
        }
    if recipe.objective == "dpo":
        return {f"{side}_{name}": x for side in ("chosen", "rejected") for name, x in whole.items()}
    more = ("segment_ids", "positions") if recipe.packed else ()
    return whole | {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in more}


def weight_bytes(frozen: Any) -> tuple[int, int]:
    """(bytes of quantised matrices and tables, bytes of everything else) of a frozen tree, on each device."""
    leaves = jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, PackedEmbedding))
    packed = sum(tree_bytes(leaf) for leaf in leaves if isinstance(leaf, PackedEmbedding))
    return packed, tree_bytes(frozen) - packed


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes, on each device where they say how they are spread."""
    return sum(_leaf_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _leaf_bytes(leaf: Any) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    size = 1
    for side in shape:
        size *= side
    return size * leaf.dtype.itemsize
