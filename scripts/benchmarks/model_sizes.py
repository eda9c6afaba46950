"""Models by the name of their size, for programs that compile without weights."""

from collections.abc import Iterable
from typing import Any

from qlora_jax.errors import OptionError
from qlora_jax.models import ModelConfig, family_of
from qlora_jax.plan import SIZES

# The usual model of each family, by model_type: its name and what its config.json says of shapes.
USUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama-3.1-8B", SIZES["llama-3.1-8b"]),
    "mistral": (
        "Mistral-7B-v0.1",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "sliding_window": 4096,
        },
    ),
    "qwen2": (
        "Qwen2.5-7B",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "use_sliding_window": False,
        },
    ),
    "qwen3": ("Qwen3-8B", SIZES["qwen3-8b"]),
    "gemma": (
        "Gemma-7B",
        {
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "vocab_size": 256000,
        },
    ),
    "gemma2": ("Gemma-2-9B", SIZES["gemma-2-9b"]),
    "gemma3_text": (
        "Gemma-3-4B",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "sliding_window": 1024,
        },
    ),
    "phi3": (
        "Phi-3-mini-4k",
        {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32064,
            "sliding_window": 2047,
        },
    ),
    "smollm3": (
        "SmolLM3-3B",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (
        "Pythia-6.9B",
        {
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "vocab_size": 50432,
        },
    ),
    "t5": (
        "Flan-T5-XL",
        {
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_heads": 32,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
}


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise OptionError for the first name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            raise OptionError(f"{option}: expected some of {', '.join(known)}, found {name}")


def config_of(name: str) -> ModelConfig:
    """Return the config of a model by the name of its size, or that of the usual model of a family."""
    config = {"model_type": name, **USUAL[name][1]} if name in USUAL else SIZES[name]
    return family_of(config).config(config)
