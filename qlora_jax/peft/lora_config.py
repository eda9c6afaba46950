"""The conversion between the fields of PEFT's LoraConfig and those of `LoRA`."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

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
from qlora_jax.peft.method import Bias
from qlora_jax.peft.targets import ALL_LINEAR

# Fields of PEFT that do not change the mathematics: descriptions of the run, settings that act only at initialization, and
# settings of features that are switched off.
_INERT = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",  # of Conv1D layers, which no model here has; PEFT resets it for linear ones
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

# The initializations of saved adapters that can be loaded: those that leave the base weights unchanged, and pissa and olora,
# whose changed base can be computed again from the original weights.
_LOADABLE_INITIALIZATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "pissa", "olora")
_PLAIN = (False, None, "mica")  # those among them that have no meaning once A and B are trained


def _same(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of PEFT's LoraConfig that `LoRA` has too.

    Attributes:
        name: the field of `LoRA`.
        fits: whether a value is of the right kind.
        expected: the right kind in words.
        default: PEFT's value where the file has none.
        read: PEFT's value to that of `LoRA`.
    """

    name: str
    fits: Callable[[Any], bool]
    expected: str
    default: Any = None
    read: Callable[[Any], Any] = _same


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _targets(value: str | list[str]) -> str | tuple[str, ...]:
    return ALL_LINEAR if isinstance(value, str) and value.lower() == ALL_LINEAR else as_names(value)


def _items(value: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(value.items())


def _tokens(value: list[int] | dict[str, list[int]]) -> tuple[Any, ...]:
    return tuple((name, tuple(rows)) for name, rows in value.items()) if isinstance(value, dict) else tuple(value)


_NAMES = "names or one regular expression"
_FIELDS: dict[str, _Field] = {
    "r": _Field("rank", is_whole, "a whole number"),
    "lora_alpha": _Field("alpha", is_number, "a number"),
    "lora_dropout": _Field("dropout", is_number, "a number", 0.0),
    "target_modules": _Field("target_modules", is_names, _NAMES, None, _targets),
    "exclude_modules": _Field("exclude_modules", is_names, _NAMES, [], as_names),
    "layers_to_transform": _Field(
        "layers_to_transform",
        lambda x: is_whole(x) or is_list(x, is_whole),
        "numbers of layers",
        [],
        lambda x: (x,) if isinstance(x, int) else tuple(x),
    ),
    "layers_pattern": _Field(
        "layers_pattern", is_names, "names of lists of layers", [], lambda x: (x,) if isinstance(x, str) else tuple(x)
    ),
    "rank_pattern": _Field("rank_pattern", lambda x: is_mapping(x, is_whole), "whole numbers by pattern", {}, _items),
    "alpha_pattern": _Field("alpha_pattern", lambda x: is_mapping(x, is_number), "numbers by pattern", {}, _items),
    "modules_to_save": _Field(
        "modules_to_save", lambda x: is_list(x, lambda name: isinstance(name, str)), "names of modules", [], tuple
    ),
    "trainable_token_indices": _Field(
        "trainable_token_indices", is_token_indices, "token ids, or token ids by name of an embedding", [], _tokens
    ),
    "use_rslora": _Field("use_rslora", _is_flag, "true or false", False),
    "use_dora": _Field("use_dora", _is_flag, "true or false", False),
    "bias": _Field("bias", lambda x: x in get_args(Bias), f"one of {', '.join(get_args(Bias))}", "none"),
    "lora_bias": _Field("lora_bias", _is_flag, "true or false", False),
    "ensure_weight_tying": _Field("ensure_weight_tying", _is_flag, "true or false", False),
    "layer_replication": _Field(
        "layer_replication",
        lambda x: is_list(x, lambda pair: is_list(pair, is_whole) and len(pair) == 2),
        "pairs of layers (start, end)",
        [],
        lambda x: tuple((start, end) for start, end in x),
    ),
}
_READ = frozenset((*_FIELDS, "init_lora_weights", "peft_type"))


def read_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `LoRA` that the fields describe.

    Raises:
        FieldErrors: fields with no meaning here, or values of another kind.
    """
    fields = Fields(config, read=_READ, inert=_INERT)
    found = {name: fields.get(name, field.fits, field.expected, field.default) for name, field in _FIELDS.items()}
    initialization = config.get("init_lora_weights")
    if initialization not in _LOADABLE_INITIALIZATIONS:
        fields.problems.append(
            f"init_lora_weights = {json.dumps(initialization)[:80]} is not supported: it changed the weights of the base; "
            "PEFT converts such an adapter (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    fields.check()
    if found["layers_to_transform"] == []:  # older versions of PEFT wrote the pattern all the same, with no meaning
        found["layers_pattern"] = []
    values = {field.name: field.read(found[name]) for name, field in _FIELDS.items()}
    return values | {"init_lora_weights": True if initialization in _PLAIN else initialization, "from_files": True}


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
        "bias": lora.bias,
        **({"ensure_weight_tying": True} if lora.ensure_weight_tying else {}),
        **({"eva_config": _EVA} if lora.init_lora_weights == "eva" else {}),
        "exclude_modules": as_list(lora.exclude_modules),
        "fan_in_fan_out": False,
        # pissa and loftq change the base, but saved files fit the original weights (adapters/weight_init.py).
        "init_lora_weights": True if reads_weights(lora.init_lora_weights) else lora.init_lora_weights,
        "layer_replication": [list(pair) for pair in lora.layer_replication] or None,
        "layers_pattern": as_list(lora.layers_pattern),
        "layers_to_transform": list(lora.layers_to_transform) or None,
        "loftq_config": {},
        "lora_alpha": _number(lora.alpha),
        "lora_bias": lora.lora_bias,
        "lora_dropout": lora.dropout,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": as_list(lora.modules_to_save),
        "r": lora.rank,
        "rank_pattern": dict(lora.rank_pattern),
        "target_modules": targets,
        "trainable_token_indices": _trainable_tokens(lora),
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _trainable_tokens(lora: Any) -> list[int] | dict[str, list[int]] | None:
    rows = lora.trainable_tokens()
    if rows and rows[0][0] is None:
        return list(rows[0][1])
    return {str(table): list(tokens) for table, tokens in rows} or None
