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
from qlora_jax.nn.hosts import any_process, check_same, is_main, main_bytes, of_main, put, several, to_numpy, together
from qlora_jax.nn.linear import AdapterConstant, Linear, LinearAdapter, MakesAdapter, ReadsWeight, WeightConstant
from qlora_jax.nn.mesh import MeshShape, context_mesh, data_mesh, mesh_context, row_shards, shape_on
from qlora_jax.nn.norm import LayerNorm, RMSNorm
from qlora_jax.nn.parallel import (
    abstract_module,
    frozen_sharding,
    frozen_shardings,
    gather,
    laid_out,
    over_heads,
    put_adapter,
    put_on_mesh,
    put_rows,
    split_heads,
    spread_rows,
    with_whole_features,
)
from qlora_jax.nn.relative import relative_position_bias
from qlora_jax.nn.residuals import checkpoint_name
from qlora_jax.nn.roles import ROLES, Role, role_of, split_axis
from qlora_jax.nn.rope import RotaryEmbedding, rotate
from qlora_jax.nn.shifted import shifted_group_attention

__all__ = [
    "CPU",
    "ROLES",
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
    "MeshShape",
    "RMSNorm",
    "ReadsWeight",
    "Role",
    "RotaryEmbedding",
    "VocabularyMatrix",
    "WeightConstant",
    "abstract_module",
    "activate",
    "add_delta",
    "any_process",
    "attention_target",
    "biased_attention",
    "cached_attention",
    "causal_attention",
    "check_same",
    "checkpoint_name",
    "context_mesh",
    "copy_to_device",
    "data_mesh",
    "fetch_to_device",
    "frozen_sharding",
    "frozen_shardings",
    "gather",
    "glu",
    "is_main",
    "laid_out",
    "main_bytes",
    "mesh_context",
    "of_main",
    "over_heads",
    "put",
    "put_adapter",
    "put_on_mesh",
    "put_rows",
    "relative_attention",
    "relative_position_bias",
    "role_of",
    "rotate",
    "row_shards",
    "several",
    "shape_on",
    "shifted_group_attention",
    "split_axis",
    "split_heads",
    "spread_rows",
    "to_numpy",
    "together",
    "with_prefix",
    "with_whole_features",
]
