"""The folder of a tiny random T5 as Hugging Face keeps it, with a tokenizer whose tokens are words."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

COLOURS = ("red", "green", "blue", "black")
WORDS = ("<pad>", "</s>", "<unk>", "what", "colour", "is", "it", "?", *COLOURS, *map(str, range(24)))
SIZES: dict[str, int] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def write_tiny_t5(folder: Path) -> Path:
    """Write a random T5 v1.0 with a tokenizer whose tokens are words, and return its folder."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True) for token in WORDS[:3]])
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])  # pyright: ignore
    names: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    config = {"model_type": "t5", "vocab_size": len(WORDS), "eos_token_id": 1, "pad_token_id": 0, **SIZES}
    (folder / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 0}), encoding="utf-8")
    draws = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return scale * draws.standard_normal(shape, np.float32)

    hidden, inner = SIZES["d_model"], SIZES["d_ff"]
    tensors = {"shared.weight": normal(len(WORDS), hidden, scale=1.0)}
    for stack, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors |= {first: normal(32, 4, scale=1.0), f"{stack}.final_layer_norm.weight": np.ones(hidden, np.float32)}
        for block in range(SIZES["num_layers"]):
            for layer, part in enumerate((*parts, "DenseReluDense")):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                tensors[f"{prefix}.layer_norm.weight"] = np.ones(hidden, np.float32)
                shapes = {"wi": (inner, hidden), "wo": (hidden, inner)} if part == "DenseReluDense" else {}
                for name, shape in (shapes or dict.fromkeys("qkvo", (hidden, hidden))).items():
                    scale = (shape[1] * (16 if name == "q" else 1)) ** -0.5
                    tensors[f"{prefix}.{part}.{name}.weight"] = normal(*shape, scale=scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
