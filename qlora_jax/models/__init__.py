"""Model families: their configurations, their modules, and the names of their parameters in checkpoints."""

from qlora_jax.models.causal_lm import CausalLM
from qlora_jax.models.config import AttentionKind, DecoderConfig
from qlora_jax.models.families import (
    FAMILIES,
    Family,
    Model,
    ModelConfig,
    causal_family_of,
    families_with,
    family_of,
    with_model_type,
)
from qlora_jax.models.kv_cache import KVCache
from qlora_jax.models.origin import Origin, ResizedEmbeddings
from qlora_jax.models.parameter_mapping import ParameterMapping, linear_mappings, linear_modules
from qlora_jax.models.scaling import RopeKind, RopeScaling, factor_for, scaled, unscaled_context
from qlora_jax.models.shape import check_heads, method_for, positions_left, shape_of
from qlora_jax.models.spec import ModelSpec
from qlora_jax.models.stack import Remat
from qlora_jax.models.t5 import T5, Seq2SeqCache
from qlora_jax.models.t5_config import T5Config
from qlora_jax.models.trainable import TrainableBase, tied_head

__all__ = [
    "FAMILIES",
    "T5",
    "AttentionKind",
    "CausalLM",
    "DecoderConfig",
    "Family",
    "KVCache",
    "Model",
    "ModelConfig",
    "ModelSpec",
    "Origin",
    "ParameterMapping",
    "Remat",
    "ResizedEmbeddings",
    "RopeKind",
    "RopeScaling",
    "Seq2SeqCache",
    "T5Config",
    "TrainableBase",
    "causal_family_of",
    "check_heads",
    "factor_for",
    "families_with",
    "family_of",
    "linear_mappings",
    "linear_modules",
    "method_for",
    "positions_left",
    "scaled",
    "shape_of",
    "tied_head",
    "unscaled_context",
    "with_model_type",
]
