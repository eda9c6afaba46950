"""What llama.cpp's converter does to the tensors of each architecture, as tables by which it is undone.

    names      GGUF's `blk.0.attn_q.weight` is Hugging Face's `model.layers.0.self_attn.q_proj.weight`
    row order  "pairs": the two halves of each rotary pair are next to each other, while in Hugging Face all first halves
               come before all second ones. Of a head with d rows, GGUF's row 2 i + j is Hugging Face's row j d/2 + i.
               "blocks": the queries of all heads come first, then all keys, then all values, while in Hugging Face each
               head's queries, keys and values are together
    offset     the norms of Gemma multiply by 1 + weight, and the file holds that sum

Source: llama.cpp, conversion/*.py (what is written) and src/models/*.cpp (what is read).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

__all__ = ["ARCHITECTURES", "Architecture", "Order", "row_order"]

Order = Literal["pairs", "blocks"]


@dataclass(frozen=True)
class Architecture:
    """The Hugging Face model of one value of `general.architecture`.

    Attributes:
        model_type, model_class: those of Hugging Face's config.json.
        layer: the names of a layer's modules, GGUF's to Hugging Face's.
        outer: the names of the modules outside the layers, likewise.
        prefix: what comes before the number of a layer in Hugging Face's names.
        orders: the modules whose rows are in another order, by GGUF's names.
        norm_offset: a number that is subtracted from the weights of a norm in the file.
    """

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    outer: Mapping[str, str] = field(
        default_factory=lambda: {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    )
    prefix: str = "model.layers"
    orders: Mapping[str, Order] = field(default_factory=dict)
    norm_offset: float = 0.0


_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_FEED_FORWARD = {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA = _ATTENTION | _FEED_FORWARD
_QUERY_KEY_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA2 = _LLAMA | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_GPT_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_GPT_NEOX_OUTER = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
}
_PAIRS: dict[str, Order] = {"attn_q": "pairs", "attn_k": "pairs"}

ARCHITECTURES: dict[str, Architecture] = {  # by general.architecture
    # Mistral's files have this name too; a file with a window is read as Mistral.
    "llama": Architecture("llama", "LlamaForCausalLM", _LLAMA, orders=_PAIRS),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LLAMA),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LLAMA | _QUERY_KEY_NORMS),
    "gemma": Architecture("gemma", "GemmaForCausalLM", _LLAMA, norm_offset=1.0),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", _GEMMA2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", _GEMMA2 | _QUERY_KEY_NORMS, norm_offset=1.0),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", _PHI3),
    "smollm3": Architecture("smollm3", "SmolLM3ForCausalLM", _LLAMA, orders=_PAIRS),
    "gptneox": Architecture(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _GPT_NEOX,
        outer=_GPT_NEOX_OUTER,
        prefix="gpt_neox.layers",
        orders={"attn_qkv": "blocks"},
    ),
}


def row_order(order: Order, rows: int, heads: int) -> np.ndarray:
    """Return int64 `[rows]`: for each row of GGUF's matrix, the number of that row in Hugging Face's matrix."""
    if order == "pairs":
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
