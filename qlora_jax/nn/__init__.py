"""Layers of transformers in Flax NNX, with frozen weights, optional adapters, and sharding over devices."""

from qlora_jax.nn.activation import Activation, activate, gated
from qlora_jax.nn.attention import (
    AttentionImplementation,
    biased_attention,
    cached_attention,
    causal_attention,
    default_implementation,
    with_prefix,
)
from qlora_jax.nn.delta import Delta, changed
from qlora_jax.nn.embedding import Embedding, Table
from qlora_jax.nn.host import HostArray, brought_to_device, fetched
from qlora_jax.nn.linear import AdapterConstant, Linear, LinearAdapter, MakesAdapter, ReadsWeight, WeightConstant
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.parallel import data_mesh, frozen_sharding, gather, mesh_context, place, split_axis
from qlora_jax.nn.relative import relative_position_bias
from qlora_jax.nn.residuals import checkpoint_name
from qlora_jax.nn.rope import RotaryEmbedding, rotate
from qlora_jax.nn.shifted import shifted_group_attention

__all__ = [
    "Activation",
    "AdapterConstant",
    "AttentionImplementation",
    "Delta",
    "Embedding",
    "HostArray",
    "LayerNorm",
    "Linear",
    "LinearAdapter",
    "MakesAdapter",
    "RMSNorm",
    "ReadsWeight",
    "RotaryEmbedding",
    "Table",
    "WeightConstant",
    "activate",
    "biased_attention",
    "brought_to_device",
    "cached_attention",
    "causal_attention",
    "changed",
    "checkpoint_name",
    "data_mesh",
    "default_implementation",
    "fetched",
    "frozen_sharding",
    "gated",
    "gather",
    "mesh_context",
    "place",
    "relative_position_bias",
    "rotate",
    "shifted_group_attention",
    "split_axis",
    "with_prefix",
]
