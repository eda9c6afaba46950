"""Layers of transformers in Flax NNX, with frozen weights, optional adapters, and sharding over devices."""

from qlora_jax.nn.activation import Activation, activate, glu
from qlora_jax.nn.attention import (
    biased_attention,
    cached_attention,
    causal_attention,
    relative_attention,
    with_prefix,
)
from qlora_jax.nn.attention_target import CPU, AttentionTarget, attention_target
from qlora_jax.nn.context import LayerContext
from qlora_jax.nn.delta import Delta, add_delta
from qlora_jax.nn.embedding import Embedding, VocabularyMatrix
from qlora_jax.nn.host import HostArray, copy_to_device, fetch_to_device
from qlora_jax.nn.linear import AdapterConstant, Linear, LinearAdapter, MakesAdapter, ReadsWeight, WeightConstant
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.parallel import abstract_module, data_mesh, frozen_sharding, gather, mesh_context, put_on_mesh, split_axis
from qlora_jax.nn.relative import relative_position_bias
from qlora_jax.nn.residuals import checkpoint_name
from qlora_jax.nn.rope import RotaryEmbedding, rotate
from qlora_jax.nn.shifted import shifted_group_attention

__all__ = [
    "CPU",
    "Activation",
    "AdapterConstant",
    "AttentionTarget",
    "Delta",
    "Embedding",
    "HostArray",
    "LayerContext",
    "LayerNorm",
    "Linear",
    "LinearAdapter",
    "MakesAdapter",
    "RMSNorm",
    "ReadsWeight",
    "RotaryEmbedding",
    "VocabularyMatrix",
    "WeightConstant",
    "abstract_module",
    "activate",
    "add_delta",
    "attention_target",
    "biased_attention",
    "cached_attention",
    "causal_attention",
    "checkpoint_name",
    "copy_to_device",
    "data_mesh",
    "fetch_to_device",
    "frozen_sharding",
    "gather",
    "glu",
    "mesh_context",
    "put_on_mesh",
    "relative_attention",
    "relative_position_bias",
    "rotate",
    "shifted_group_attention",
    "split_axis",
    "with_prefix",
]
