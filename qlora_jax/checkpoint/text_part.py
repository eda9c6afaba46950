"""The text part of a model that also reads pictures or sound: a language model of a family that is supported here.

config.json of such a model holds the language model's own config in `text_config`; the first Qwen-VL models have its fields
beside those of their `vision_config`. The names of the language model's tensors carry a prefix, which files of different
years write differently:

    language_model.model.layers.0…          language_model.lm_head.weight      files of transformers up to 4.51
    model.language_model.layers.0…          lm_head.weight                     newer ones
    model.text_model.layers.0…              lm_head.weight                     Idefics, SmolVLM
    model.layers.0…  beside  visual.…       lm_head.weight                     Qwen2-VL, Qwen2.5-VL

`text_part` returns the language model under its own names. For text alone it computes what the whole model computes. All
other parts (towers of vision and sound, and what joins them to the text) are left out, and a warning says so.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import QLoRAError, UnsupportedError, shortened
from qlora_jax.models import FAMILIES, family_of, with_model_type

__all__ = ["TOWERS", "needed_tensors", "text_name", "text_part"]

# Language models that compute the same as one of another name does, as long as there is only text: their rotary positions
# have a section for each axis of a picture, and all axes of a text are alike.
_SAME = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
}
_MROPE = ("mrope_section", "mrope_interleaved")
# Models whose text part attends otherwise than the language model by itself.
_DIFFERENT = {"paligemma": "a prompt attends to itself in both directions there"}
_TEXT = re.compile(r"(?:model\.)?(?P<part>language_model|text_model)\.(?:model\.)?(?P<rest>.*)")
# The first parts of the names of modules that are no part of the language model.
TOWERS = frozenset(
    (
        *("vision_tower", "vision_model", "vision_encoder", "visual", "vision", "multi_modal_projector", "mm_projector"),
        *("audio_tower", "audio_model", "audio_encoder", "audio_projector", "connector", "aligner", "image_newline"),
        *("embed_vision", "embed_audio", "vision_embed_tokens", "vqmodel", "generation_embeddings", "generation_head"),
        *("view_separator", "image_projector", "vision_projection", "perceiver", "resampler", "mlp1", "audio_adapter"),
    )
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_name(name: str) -> str | None:
    """Return the name that the language model by itself gives to a tensor or module; None for one of another part."""
    if match := _TEXT.fullmatch(name):
        rest = match["rest"]
        return rest if rest.startswith(("lm_head", "gpt_neox.")) else f"model.{rest}"
    first, _, second = name.partition(".")
    return None if first in TOWERS or (first == "model" and second.partition(".")[0] in TOWERS) else name


def needed_tensors(config: dict) -> Callable[[str], bool]:
    """Return a function that says whether the language model of a config.json needs the tensor of a name.

    The parts of a tensor that is quantised already (`NAME.absmax` …) are needed with it. If the config is not supported, all
    tensors are needed.
    """
    try:
        config = with_model_type(config, "config.json")
        text = _text_config(config)
        own = text or config
        names = {name for mapping in family_of(own).config(own).parameter_mappings for name in mapping.names()}
    except QLoRAError:
        return lambda name: True

    def needs(name: str) -> bool:
        ours = name if text is None else text_name(name)
        return ours is not None and (ours in names or f"{ours.partition('.weight.')[0]}.weight" in names)

    return needs


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """Return the text part of a checkpoint; a checkpoint of a language model alone is returned as it is.

    Raises:
        UnsupportedError: the text part differs from the language model that it is made of.
    """
    config = _text_config(checkpoint.config)
    if config is None:
        return checkpoint
    kind = checkpoint.config["model_type"]
    if kind in _DIFFERENT:
        raise UnsupportedError(
            f"{checkpoint.name}: the text part of model_type {shortened(kind)} is not supported: {_DIFFERENT[kind]}"
        )
    prefixed = any(_TEXT.fullmatch(name) for name in checkpoint.shapes)
    stored: dict[str, str] = {}
    left: dict[str, int] = {}
    for name in checkpoint.shapes:
        ours = text_name(name)
        if ours is None or (prefixed and not _TEXT.fullmatch(name) and not name.startswith("lm_head.")):
            part = name.removeprefix("model.").partition(".")[0]
            left[part] = left.get(part, 0) + 1
        else:
            stored[ours] = name
    if "lm_head.weight" not in stored:
        config["tie_word_embeddings"] = True
    if left:
        warnings.warn(
            f"{checkpoint.name}: this {kind} is read as a language model ({config['model_type']}); "
            f"{', '.join(f'{part} ({count} tensors)' for part, count in left.items())} left out",
            stacklevel=3,
        )
    inner = "text_model" if any("text_model." in name for name in stored.values()) else "language_model"
    return dataclasses.replace(checkpoint.renamed(stored, config), text_prefix=f"model.{inner}.")


def _text_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the config.json of the text part; None where the model is a language model alone, or one of no known family."""
    kind, text = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind in FAMILIES:
        return None
    if isinstance(text, dict):
        inner = text.get("model_type", kind)
        fields = dict(text)
    elif isinstance(config.get("vision_config"), dict):
        inner = kind
        fields = {name: value for name, value in config.items() if not name.endswith("_config")}
    else:
        return None
    family = _SAME.get(inner, inner) if isinstance(inner, str) else None
    if family not in FAMILIES:
        return None
    for name in ("model_type", "architectures", "_name_or_path", "quantization_config"):
        fields.pop(name, None)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(scaling := fields.get(name), dict):
            plain = {key: value for key, value in scaling.items() if key not in _MROPE}
            fields[name] = {key: "default" if value == "mrope" else value for key, value in plain.items()}
    for name in (*_TOKENS, "tie_word_embeddings"):
        if name not in fields and config.get(name) is not None:
            fields[name] = config[name]
    result = _complete(inner if inner == family or inner.endswith("_text") else f"{inner}_text", fields)
    for name in ("dtype", "torch_dtype"):
        if config.get(name) is not None:
            result[name] = config[name]
    return result | {"model_type": family, "architectures": [FAMILIES[family].architecture]}


def _complete(kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config of this model_type, with those that a `text_config` leaves out at transformers'
    defaults."""
    from transformers import AutoConfig

    try:
        values = AutoConfig.for_model(kind, **fields).to_dict()
    except Exception:  # fields of a wrong kind, which our own reading of the config names
        return dict(fields)
    return {name: value for name, value in values.items() if value is not None or name in fields}
