"""Translates the metadata of a GGUF file to Hugging Face's config.json.

Every entry that begins with the name of the architecture is either translated here or known to change nothing
(metadata.py). Where llama.cpp has a constant in its code instead of an entry in the file (which layers of Gemma have a
window, which layers of SmolLM3 have no positions), the constant is here.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.checkpoint.gguf.architectures import ARCHITECTURES
from qlora_jax.checkpoint.gguf.header import Header
from qlora_jax.checkpoint.gguf.metadata import Metadata
from qlora_jax.checkpoint.gguf.values import read_values
from qlora_jax.errors import shortened

__all__ = ["ROPE_TENSORS", "read_config"]

# These tensors are no weights: rope scaling divides the frequencies by them (Llama 3.1; the two lists of LongRoPE).
ROPE_FREQUENCIES, ROPE_LONG, ROPE_SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = {"llama": (ROPE_FREQUENCIES,), "smollm3": (ROPE_FREQUENCIES,), "phi3": (ROPE_LONG, ROPE_SHORT)}

# llama.cpp knows these two models by their number of layers; their scores are scaled by another size than that of a head.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
MANY_LAYERS = 1024  # which no model has: of fewer layers, the missing tensors are listed
TOKEN_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_config(header: Header, problems: list[str]) -> dict[str, Any]:
    """Return the config.json of a file; an empty one after adding everything that is wrong with the file to `problems`."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        problems.append(
            f"general.architecture: expected one of {', '.join(ARCHITECTURES)}; found {shortened(architecture)}."
        )
        return {}
    if (kind := header.metadata.get("general.type", "model")) != "model":
        problems.append(f"general.type: expected 'model', found {shortened(kind)}.")
        return {}
    metadata = Metadata(header, architecture, problems)
    if metadata.count("expert_count", 0, least=0) > 0:
        problems.append("is a mixture of experts; expected a dense model.")
        return {}

    config = _sizes(metadata)
    if problems:  # the rest is computed from the sizes
        return {}
    family = ARCHITECTURES[architecture]
    config |= {"architectures": [family.model_class], "model_type": family.model_type}
    match architecture:
        case "llama":
            config |= _llama(metadata)
        case "qwen3":
            config["attention_bias"] = metadata.has(".attn_q.bias")
        case "smollm3":
            layers = config["num_hidden_layers"]
            config["attention_bias"] = metadata.has(".attn_q.bias")
            config["mlp_bias"] = metadata.has(".ffn_up.bias")
            config["no_rope_layers"] = [int((layer + 1) % 4 != 0) for layer in range(layers)]
        case "gemma" | "gemma2" | "gemma3":
            config |= _gemma(metadata, config)
        case "phi3":
            # The converter writes 0 for a model without a window. llama.cpp itself ignores the entry; the model has it.
            config["sliding_window"] = metadata.count("attention.sliding_window", 0, least=0) or None
            if metadata.get("rope.scaling.original_context_length") is not None:
                config["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
        case "gptneox":
            config["hidden_act"] = "gelu"
            config["use_parallel_residual"] = bool(metadata.get("use_parallel_residual", True))
            config["attention_bias"] = metadata.has(".attn_qkv.bias")
            config["rotary_emb_base"] = config["rope_theta"]
    config["rope_parameters"] = _rope(metadata, config)
    if architecture == "gemma3":
        near = float(metadata.number("rope.freq_base_swa", 10000.0))
        config["rope_local_base_freq"] = near
        config["rope_parameters"] = {
            "full_attention": config["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": near},
        }
    for name, key in TOKEN_IDS.items():
        if (token := header.metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    if metadata.get("attention.causal", True) is not True:
        metadata.problem("attention.causal", "expected true, found false.")
    metadata.check_all_known(_values_without(metadata, config))
    return {} if problems else config


def _values_without(metadata: Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the model has without some entries of newer converters."""
    head_dim = config["head_dim"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length_out": config["hidden_size"],
        "attention.key_length_swa": head_dim,
        "attention.value_length_swa": head_dim,
        "rope.dimension_count_swa": metadata.get("rope.dimension_count", head_dim),
        "rope.freq_base_swa": config["rope_theta"],
        "rope.scaling.yarn_ext_factor": float(metadata.get("rope.scaling.type") == "yarn"),
    }


def _sizes(metadata: Metadata) -> dict[str, Any]:
    """Return the fields that all architectures have."""
    header = metadata.header
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    head_dim = metadata.count("attention.key_length", max(hidden // heads, 1))
    if (value := metadata.count("attention.value_length", head_dim)) != head_dim:
        metadata.problem("attention.value_length", f"expected the size of a head, {head_dim}, found {value}.")
    rotated = metadata.count("rope.dimension_count", head_dim)
    partial = metadata.architecture in ("phi3", "gptneox")
    if rotated != head_dim and not (partial and rotated < head_dim):
        metadata.problem("rope.dimension_count", f"expected the size of a head, {head_dim}, found {rotated}.")
    if (layers := metadata.count("block_count")) > max(len(header.tensors), MANY_LAYERS):
        metadata.problem("block_count", f"expected at most the {len(header.tensors)} tensors of the file, found {layers}.")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    norm = "layer_norm_epsilon" if metadata.architecture == "gptneox" else "layer_norm_rms_epsilon"
    config = {
        "vocab_size": metadata.count("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "layer_norm_eps" if metadata.architecture == "gptneox" else "rms_norm_eps": metadata.number(f"attention.{norm}"),
        "max_position_embeddings": metadata.count("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        # Older readers of config.json look here; newer ones in rope_parameters.
        "rope_theta": metadata.number("rope.freq_base", 10000.0),
        # The dtype that reading returns; the packed types of the file have no name in config.json.
        "dtype": "float32",
    }
    if partial:
        config["partial_rotary_factor"] = rotated / head_dim
    if metadata.architecture == "gptneox" and head_dim * heads != hidden:
        metadata.problem("attention.key_length", f"expected {hidden} / {heads}, found {head_dim}.")
    return config


def _llama(metadata: Metadata) -> dict[str, Any]:
    config: dict[str, Any] = {"attention_bias": metadata.has(".attn_q.bias"), "mlp_bias": metadata.has(".ffn_up.bias")}
    if window := metadata.count("attention.sliding_window", 0, least=0):
        config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config


def _gemma(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    version, layers, head_dim = metadata.architecture, config["num_hidden_layers"], config["head_dim"]
    result: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if version == "gemma":
        return result
    result["sliding_window"] = metadata.count("attention.sliding_window")
    near = metadata.get("attention.sliding_window_pattern")
    if not isinstance(near, list):  # a number: the last layer of each group of so many has no window
        pattern = metadata.count("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[version])
        near = [(layer + 1) % pattern != 0 for layer in range(layers)]
    if len(near) != layers:
        metadata.problem("attention.sliding_window_pattern", f"expected {layers} values, found {len(near)}.")
    result["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in near]
    hidden, heads = config["hidden_size"], max(config["num_attention_heads"], 1)
    result["query_pre_attn_scalar"] = hidden // heads if layers == GEMMA_27B[version] else head_dim
    if (scale := metadata.optional_number("attention.scale")) is not None:
        result["query_pre_attn_scalar"] = scale**-2
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if version == "gemma2" else {}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        result[cap] = caps.get(cap) if metadata.get(cap) is None else metadata.optional_number(cap)
    return result


def _rope(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return the rope_parameters. A scaling is given by an entry or by tensors."""
    theta, tensors = float(config["rope_theta"]), metadata.header.tensors
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if "partial_rotary_factor" in config:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    factors = ROPE_TENSORS.get(metadata.architecture, ())
    if factors == (ROPE_FREQUENCIES,) and ROPE_FREQUENCIES in tensors:
        return rope | _llama3(metadata, theta, config["head_dim"])
    if ROPE_LONG in factors and (ROPE_LONG in tensors or ROPE_SHORT in tensors):
        return rope | _longrope(metadata, config)
    old = metadata.optional_number("rope.scale_linear")  # the factor, in the first files
    kind = metadata.get("rope.scaling.type", "none" if old is None else "linear")
    match kind:
        case "none":
            metadata.get("rope.scaling.factor")  # it has no effect, in llama.cpp as well
            _ignore_yarn(metadata)
            return rope
        case "linear":
            _ignore_yarn(metadata)
            return rope | {"rope_type": "linear", "factor": float(metadata.number("rope.scaling.factor", old))}
        case "yarn":
            return rope | _yarn(metadata)
    metadata.problem("rope.scaling.type", f"expected none, linear or yarn, found {shortened(kind)}.")
    return rope


def _ignore_yarn(metadata: Metadata) -> None:
    """Take note of the entries that are about YaRN alone, which have no effect where the scaling is another one."""
    for name in ("original_context_length", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier"):
        metadata.get(f"rope.scaling.{name}")


def _yarn(metadata: Metadata) -> dict[str, Any]:
    """Return the fields of YaRN.

    Two entries are about the factor on cosine and sine, which YaRN has 1 + 0.1 ln(factor) for:

        attn_factor           is multiplied with it, as llama.cpp does
        yarn_attn_factor      replaces it: the converter writes transformers' `attention_factor` there. 1 is llama.cpp's
                              default for every model, and then it remains
    """
    result: dict[str, Any] = {"rope_type": "yarn", "factor": float(metadata.number("rope.scaling.factor"))}
    result["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
    for name in ("beta_fast", "beta_slow"):
        if (value := metadata.optional_number(f"rope.scaling.yarn_{name}")) is not None:
            result[name] = value
    own = 1 + 0.1 * math.log(max(result["factor"], 1))
    stated = metadata.optional_number("rope.scaling.yarn_attn_factor")
    total = own if stated is None or stated == 1 else stated
    total *= metadata.optional_number("rope.scaling.attn_factor") or 1
    if total != own:
        result["attention_factor"] = total
    if metadata.get("rope.scaling.yarn_log_multiplier") not in (None, 0):
        # DeepSeek's converter writes 0.1 mscale_all_dim there, Mistral's mscale_all_dim; llama.cpp reads it for these two.
        metadata.problem(
            "rope.scaling.yarn_log_multiplier",
            f"expected none with YaRN, found {metadata.get('rope.scaling.yarn_log_multiplier')!r}: it has a meaning for "
            f"DeepSeek's and Mistral 3's attention only, and llama.cpp does not read it for {metadata.architecture}. Remove "
            "it (gguf-new-metadata --remove-metadata) to use the model as llama.cpp does.",
        )
    return result


def _longrope(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    size = round(config["head_dim"] * config["partial_rotary_factor"]) // 2
    result: dict[str, Any] = {"rope_type": "longrope"}
    metadata.get("rope.scaling.type")  # the tensors show the type already
    result["original_max_position_embeddings"] = metadata.count("rope.scaling.original_context_length")
    if (factor := metadata.optional_number("rope.scaling.attn_factor")) is not None:
        result["attention_factor"] = factor
    for name, stored in (("long_factor", ROPE_LONG), ("short_factor", ROPE_SHORT)):
        values = _values(metadata, stored)
        if len(values) != size:
            metadata.problems.append(f"tensor {stored!r}: expected {size} factors, found {len(values)}.")
        result[name] = values.tolist()
    return result


def _values(metadata: Metadata, name: str) -> np.ndarray:
    """Return the values of a vector as float64; an empty vector where the tensor is missing."""
    if name not in metadata.header.tensors:
        return np.zeros(0)
    return read_values(metadata.header, name).reshape(-1).astype(np.float64)


def _llama3(metadata: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3.1's parameters from the divisors of the frequencies that GGUF stores in their place.

    With wavelength w = 2π / frequency, trained context c and factor f, a frequency is divided by 1 where
    w < c / high, by f where w > c / low, and between them by 1 / ((1 - s) / f + s), where
    s = (c / w - low) / (high - low). The published models have low 1, high 4, c 8192; f is the largest
    divisor. The divisors are computed again and compared, so that divisors of another kind are an error.
    """
    metadata.get("rope.scaling.type")  # some converters say "none" or "llama3" beside the divisors
    found = _values(metadata, ROPE_FREQUENCIES)
    usable = bool(np.all((found > 0) & np.isfinite(found)))
    low, high, context, factor = 1.0, 4.0, 8192, float(found.max(initial=1.0)) if usable else 1.0
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if not usable or found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        metadata.problems.append(
            f"tensor {ROPE_FREQUENCIES!r}: expected {head_dim // 2} divisors of Llama 3.1's kind (low 1, "
            f"high 4, context 8192), found {np.array2string(found[:8], precision=4)} … ({found.size})."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
