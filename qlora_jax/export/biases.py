"""Biases that a merged checkpoint needs and its base lacks: an adapter whose B has a bias (`lora_bias`) shifts its layers.

Such a layer is written with a bias. A family must have a field of config.json for it, and that field is about several layers
(`attention_bias`: those of attention); the others get a bias of zeros.
"""

import dataclasses

import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import QLoRAError, UnsupportedError, list_names
from qlora_jax.peft.lora_linear import LORA_BIAS

__all__ = ["with_biases"]

_FIELDS = (("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias"))


def with_biases(checkpoint: Checkpoint, adapter: Adapter | None) -> Checkpoint:
    """Return the checkpoint with biases of zeros where the adapter has a bias and the checkpoint none.

    Raises:
        UnsupportedError: the family has no such biases.
    """
    modules = [] if adapter is None else [module for module in adapter.modules if LORA_BIAS in adapter.of_module(module)]
    needed = {f"{module}.bias" for module in modules} - checkpoint.shapes.keys()
    if not needed:
        return checkpoint
    for fields in _FIELDS:
        changed = dataclasses.replace(checkpoint, config=checkpoint.config | dict.fromkeys(fields, True))
        try:
            mappings = changed.model_config.parameter_mappings
        except QLoRAError:
            continue
        names = {name for mapping in mappings for name in mapping.names() if name.endswith(".bias")}
        added = {
            name: (checkpoint.shapes[f"{name.removesuffix('bias')}weight"][0],) for name in names - checkpoint.shapes.keys()
        }
        if needed <= added.keys():
            read = checkpoint.read
            return dataclasses.replace(
                changed,
                shapes={**checkpoint.shapes, **added},
                read=lambda name: np.zeros(added[name], np.float32) if name in added else read(name),  # noqa: B023
            )
    raise UnsupportedError(
        f"{checkpoint.name}: expected layers with a bias for an adapter with lora_bias, found none in a "
        f"{checkpoint.model_config.family} ({list_names(sorted(needed))}): it cannot be merged; use it beside the base"
    )
