"""The model families: one line each in `FAMILIES`, by the `model_type` of their config.json.

A family is a file that reads Hugging Face's config.json and names the tensors of a checkpoint (`parameter_mapping.py`). All
decoder-only families share one model (`causal_lm.py`), the encoder-decoders another (`t5.py`).
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qlora_jax.errors import UnsupportedError, shortened
from qlora_jax.models import gpt_neox, llama
from qlora_jax.models.causal_lm import CausalLM
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.gemma import gemma2_config, gemma3_config, gemma_config
from qlora_jax.models.gpt_neox import gpt_neox_config
from qlora_jax.models.llama import llama_config
from qlora_jax.models.mistral import mistral_config
from qlora_jax.models.phi3 import phi3_config
from qlora_jax.models.qwen import qwen2_config, qwen3_config
from qlora_jax.models.smollm3 import smollm3_config
from qlora_jax.models.t5 import T5
from qlora_jax.models.t5_config import IGNORED as T5_IGNORED
from qlora_jax.models.t5_config import T5Config, t5_config

Model = CausalLM | T5
ModelConfig = DecoderConfig | T5Config


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        config: function that parses Hugging Face's config.json.
        ignored: regular expressions of tensors that old checkpoints contain and the model does not need.
        model: the class of the model; it takes the result of `config` and the arguments of `CausalLM`.
        linear: regular expression of the full names of the linear modules.
        architecture: the name of transformers' class.
        tied: (name of a tensor, name of the tensor that it equals) where config.json ties the two and the file may hold
            only the second.
    """

    config: Callable[[Mapping[str, Any]], ModelConfig]
    ignored: tuple[str, ...] = ()
    model: Callable[..., Model] = CausalLM
    linear: str = r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    tied: tuple[str, str] | None = None
    architecture: str = "LlamaForCausalLM"


FAMILIES: dict[str, Family] = {  # by model_type
    "llama": Family(llama_config, llama.IGNORED),
    "mistral": Family(mistral_config, architecture="MistralForCausalLM"),
    "qwen2": Family(qwen2_config, architecture="Qwen2ForCausalLM"),
    "qwen3": Family(qwen3_config, architecture="Qwen3ForCausalLM"),
    "gemma": Family(gemma_config, architecture="GemmaForCausalLM"),
    "gemma2": Family(gemma2_config, architecture="Gemma2ForCausalLM"),
    "gemma3_text": Family(gemma3_config, architecture="Gemma3ForCausalLM"),
    "phi3": Family(
        phi3_config,
        linear=r"model\.layers\.\d+\.(self_attn\.(qkv|o)_proj|mlp\.(gate_up|down)_proj)",
        architecture="Phi3ForCausalLM",
    ),
    "smollm3": Family(smollm3_config, architecture="SmolLM3ForCausalLM"),
    "gpt_neox": Family(
        gpt_neox_config, gpt_neox.IGNORED, linear=r"gpt_neox\.layers\.\d+\..*", architecture="GPTNeoXForCausalLM"
    ),
    "t5": Family(
        t5_config,
        T5_IGNORED,
        T5,
        linear=r"(encoder|decoder)\.block\.\d+\..*",
        tied=("lm_head.weight", "shared.weight"),
        architecture="T5ForConditionalGeneration",
    ),
}


# What config.json has in `architectures`, for a file without model_type.
CLASSES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",  # of the first conversions
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
    "GPTNeoXForCausalLM": "gpt_neox",
    "T5ForConditionalGeneration": "t5",
}


def with_model_type(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a config.json with its model_type, which the class in `architectures` gives where the file has none.

    Args:
        config: the config.json.
        place: the model, for the message.

    Raises:
        UnsupportedError: neither field names an architecture.
    """
    kind = config.get("model_type")
    if isinstance(kind, str) and kind:
        return dict(config)
    listed = config.get("architectures")
    classes = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    found = next((CLASSES[name] for name in classes if name in CLASSES), None)
    if found is None:
        raise UnsupportedError(
            f"{place}: config.json: expected a model_type, found {shortened(kind)} (architectures {shortened(listed)}). If "
            f'it is one of {", ".join(FAMILIES)}, add it to config.json: "model_type": "llama"'
        )
    return {**config, "model_type": found}


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face config.json.

    Raises:
        UnsupportedError: the architecture is not supported; the message lists those that are.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        architectures = config.get("architectures")
        raise UnsupportedError(
            f"model_type {shortened(kind)} (architectures {shortened(architectures)}) is not supported; supported: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def families_with(modules: Iterable[str]) -> list[str]:
    """Return the model_types of the families whose linear modules have names of this form (full names)."""
    modules = list(modules)
    return [kind for kind, family in FAMILIES.items() if all(re.fullmatch(family.linear, name) for name in modules)]


def causal_family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, for code that works with decoder-only models only.

    Raises:
        UnsupportedError: the architecture is not supported, or is no decoder-only model.
    """
    family = family_of(config)
    if family.model is not CausalLM:
        causal = ", ".join(name for name, family in FAMILIES.items() if family.model is CausalLM)
        raise UnsupportedError(f"expected a decoder-only model ({causal}), found model_type {config['model_type']!r}")
    return family
