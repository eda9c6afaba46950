"""Folders of tiny random models as Hugging Face keeps them, with a tokenizer whose tokens are bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|im_start|>", "<|im_end|>", "<pad>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE without merges, a token a byte, which knows ChatML; returns the size of its vocabulary."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2], chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    return len(tokens)


def write_tiny_llama(folder: Path, *, seed: int = 0, **fields: Any) -> Path:
    """A Hugging Face folder; `fields` overrule its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": write_tokenizer(folder),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "dtype": "float32",
    } | fields
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, pairs = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (pairs, hidden),
        "self_attn.v_proj": (pairs, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    draws = np.random.default_rng(seed)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return scale * draws.standard_normal(shape, np.float32)

    tensors = {
        "model.embed_tokens.weight": normal(config["vocab_size"], hidden, scale=0.3),
        "model.norm.weight": 1 + normal(hidden, scale=0.1),
    }
    for layer in range(config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 1 + normal(hidden, scale=0.1)
        for name, shape in matrices.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape, scale=shape[1] ** -0.5)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
