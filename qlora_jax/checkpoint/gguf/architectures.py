"""What llama.cpp's converter does to the tensors of each architecture, as a table to undo it by.

    names      GGUF's `blk.0.attn_q.weight` is Hugging Face's `model.layers.0.self_attn.q_proj.weight`
    row order  "pairs": the two halves of each rotary pair lie next to each other, in Hugging Face all first halves
               come before all second ones. Of a head with d rows, GGUF's row 2 i + j is Hugging Face's row j d/2 + i.
               "blocks": queries, keys and values of all heads one after the other, in Hugging Face head by head
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
    """How one value of `general.architecture` stands to a model of Hugging Face.

    Attributes:
        model_type, model_class: of Hugging Face's config.json.
        layer: GGUF's names of the modules of a layer to Hugging Face's.
        outer: the same, outside the layers.
        prefix: of a layer's modules in Hugging Face's names.
        orders: by GGUF's names, the modules whose rows lie in another order.
        norm_offset: subtracted from what the file holds of a norm.
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
    # Mistral goes by this name too; a file with a window is read as one.
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
    """For each row of GGUF's matrix, int64 `[rows]`, the row that it is in Hugging Face's."""
    if order == "pairs":
        return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1)
