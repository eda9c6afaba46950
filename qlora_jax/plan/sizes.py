"""Published shapes of well-known models in the form of Hugging Face's config.json: a plan needs no download.

    name        hidden  inner  layers  heads  key-value heads  vocabulary  context  theta
    llama-65b     8192  22016      80     64               64       32000     2048  10000      one row a size

The values are those of the models' own configuration files, and only those that decide the shapes of the model.
"""

from typing import Any

_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
)

_ROWS: dict[str, tuple[int, int, int, int, int, int, int, float]] = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 100000.0),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000, 2048, 10000.0),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 2048, 10000.0),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 2048, 10000.0),
    "llama-33b": (6656, 17920, 60, 52, 52, 32000, 2048, 10000.0),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000, 2048, 10000.0),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 10000.0),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 10000.0),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 10000.0),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 500000.0),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256, 8192, 500000.0),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128256, 131072, 500000.0),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256, 131072, 500000.0),
    "llama-3.3-70b": (8192, 28672, 80, 64, 8, 128256, 131072, 500000.0),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 131072, 500000.0),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128256, 131072, 500000.0),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 151936, 40960, 1000000.0),
    "gemma-2-9b": (3584, 14336, 42, 16, 8, 256000, 8192, 10000.0),
}
_TIED = ("smollm2-135m", "llama-3.2-1b", "llama-3.2-3b")  # the embedding is the output head
_LLAMA3_ROPE = {  # the scaling of Llama 3.1 and 3.3 (by 8) and 3.2 (by 32)
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FACTORS = {"llama-3.1": 8.0, "llama-3.2": 32.0, "llama-3.3": 8.0}
_MORE: dict[str, dict[str, Any]] = {  # values that other families have beside these
    "llama-7b": {"rms_norm_eps": 1e-6},
    "llama-13b": {"rms_norm_eps": 1e-6},
    "qwen3-8b": {"model_type": "qwen3", "head_dim": 128, "rms_norm_eps": 1e-6},
    "gemma-2-9b": {"model_type": "gemma2", "head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
}


def _config(name: str) -> dict[str, Any]:
    factor = _FACTORS.get(name[:9])
    return {
        "model_type": "llama",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": name in _TIED,
        "rope_scaling": None if factor is None else {**_LLAMA3_ROPE, "factor": factor},
        **dict(zip(_FIELDS, _ROWS[name], strict=True)),
        **_MORE.get(name, {}),
    }


SIZES: dict[str, dict[str, Any]] = {name: _config(name) for name in _ROWS}
# Hub ids whose config.json is one of these, so that a plan of a file in recipes/ needs no network.
HUB_IDS = {
    "huggyllama/llama-7b": "llama-7b",
    "huggyllama/llama-13b": "llama-13b",
    "huggyllama/llama-30b": "llama-33b",
    "huggyllama/llama-65b": "llama-65b",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-hf": "llama-2-13b",
    "meta-llama/Llama-2-70b-hf": "llama-2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Meta-Llama-3-70B": "llama-3-70b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-70B-Instruct": "llama-3.1-70b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "google/gemma-2-9b": "gemma-2-9b",
    "google/gemma-2-9b-it": "gemma-2-9b",
}
