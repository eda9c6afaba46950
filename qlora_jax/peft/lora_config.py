"""The conversion between the fields of PEFT's LoraConfig and those of `LoRA`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.peft.fields import (
    Fields,
    as_list,
    as_names,
    is_list,
    is_mapping,
    is_names,
    is_number,
    is_token_indices,
    is_whole,
)
from qlora_jax.peft.initialization import reads_weights
from qlora_jax.peft.targets import ALL_LINEAR

# Fields of PEFT that do not change the mathematics: descriptions of the run, settings that act only at initialization, and
# settings of features that are switched off.
_INERT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    )
)
# Fields that are read, and those that are supported at these values only.
_READ = frozenset(
    (
        "alpha_pattern",
        "ensure_weight_tying",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    )
)
_EXPECTED: dict[str, tuple[object, ...]] = {
    "bias": ("none", None),
}


# The initializations of saved adapters that can be loaded: those that leave the base weights unchanged, and pissa, whose
# changed base can be computed again from the original weights.
_LOADABLE_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "pissa")


def read_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LoRA` that the fields of a LoraConfig describe.

    Raises:
        FieldErrors: some fields are not supported, or some values are invalid.
    """
    fields = Fields(config, read=_READ, inert=_INERT, expected=_EXPECTED)
    names = "names or one regular expression"
    rank = fields.get("r", is_whole, "a whole number")
    alpha = fields.get("lora_alpha", is_number, "a number")
    dropout = fields.get("lora_dropout", is_number, "a number", 0.0)
    targets = fields.get("target_modules", is_names, names)
    excluded = fields.get("exclude_modules", is_names, names, [])
    layers = fields.get("layers_to_transform", lambda x: is_whole(x) or is_list(x, is_whole), "numbers of layers", [])
    lists = fields.get("layers_pattern", is_names, "names of lists of layers", [])
    ranks = fields.get("rank_pattern", lambda x: is_mapping(x, is_whole), "whole numbers by pattern", {})
    alphas = fields.get("alpha_pattern", lambda x: is_mapping(x, is_number), "numbers by pattern", {})
    saved = fields.get("modules_to_save", lambda x: is_list(x, lambda name: isinstance(name, str)), "names of modules", [])
    tokens = fields.get("trainable_token_indices", is_token_indices, "token ids, or token ids by name of an embedding", [])
    if saved and config.get("ensure_weight_tying"):
        fields.problems.append("ensure_weight_tying = true beside modules_to_save is not supported")
    rslora, dora = (
        fields.get(name, lambda x: isinstance(x, bool), "true or false", False) for name in ("use_rslora", "use_dora")
    )
    initialization = config.get("init_lora_weights")
    if initialization not in _LOADABLE_INITIALIZATIONS:
        found = json.dumps(initialization)
        fields.problems.append(f"init_lora_weights = {found} is not supported: it changed the weights of the base")
    fields.check()
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        targets = ALL_LINEAR
    return {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": as_names(targets),
        "use_rslora": rslora,
        "use_dora": dora,
        "init_lora_weights": initialization or True,
        "exclude_modules": as_names(excluded),
        "layers_to_transform": (layers,) if isinstance(layers, int) else tuple(layers),
        # It has no meaning without layers_to_transform, but older versions of PEFT wrote it even so.
        "layers_pattern": () if layers == [] else (lists,) if isinstance(lists, str) else tuple(lists),
        "rank_pattern": tuple(ranks.items()),
        "alpha_pattern": tuple(alphas.items()),
        "modules_to_save": tuple(saved),
        "trainable_token_indices": tuple(
            ((name, tuple(rows)) for name, rows in tokens.items()) if isinstance(tokens, dict) else tokens
        ),
    }


# The settings of EVA that eva.py implements: ranks are not redistributed (rho 1), and every token except padding counts.
_EVA = {
    "adjust_scaling_factors": True,
    "label_mask_value": -100,
    "rho": 1.0,
    "tau": 0.99,
    "use_label_mask": False,
    "whiten": False,
}


def write_lora(lora: Any, modules: Sequence[str]) -> dict[str, Any]:
    """Return the fields that PEFT writes for a `LoRA` in these modules.

    Fields that only newer versions of PEFT know are omitted, so that they have their default values.
    """
    if lora.target_modules == ALL_LINEAR:
        targets: str | list[str] | None = sorted({name.rsplit(".", 1)[-1] for name in modules})
    else:
        targets = lora.target_modules if isinstance(lora.target_modules, str) else sorted(lora.target_modules)
    # The patterns keep their order, because the first that matches applies.
    return {
        "alpha_pattern": {name: _number(alpha) for name, alpha in lora.alpha_pattern},
        "bias": "none",
        **({"eva_config": _EVA} if lora.init_lora_weights == "eva" else {}),
        "exclude_modules": as_list(lora.exclude_modules),
        "fan_in_fan_out": False,
        # pissa and loftq change the base, but saved files fit the original weights (adapters/weight_init.py).
        "init_lora_weights": True if reads_weights(lora.init_lora_weights) else lora.init_lora_weights,
        "layer_replication": None,
        "layers_pattern": as_list(lora.layers_pattern),
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "loftq_config": {},
        "lora_alpha": _number(lora.alpha),
        "lora_bias": False,
        "lora_dropout": lora.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": as_list(lora.modules_to_save),
        "r": lora.rank,
        "rank_pattern": dict(lora.rank_pattern),
        "target_modules": targets,
        "trainable_token_indices": _token_rows(lora),
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _token_rows(lora: Any) -> list[int] | dict[str, list[int]] | None:
    rows = lora.token_rows()
    if rows and rows[0][0] is None:
        return list(rows[0][1])
    return {str(table): list(tokens) for table, tokens in rows} or None
