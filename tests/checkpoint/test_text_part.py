"""The text part of models that also read pictures, against the whole model in transformers; and heads that differ."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiers import tiered
from tiny_models import write_tiny_llama

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.text_part import text_name
from qlora_jax.errors import CheckpointError, UnsupportedError
from qlora_jax.export.drift import sample_logits
from qlora_jax.export.merge import merge

TEXT: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # class, text, vision, other fields
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
        VISION,
        {"mm_tokens_per_image": 4},
    ),
    "llava": ("Llava", {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}, {}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        MROPE,
        {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 16},
        {"image_token_id": 261, "video_token_id": 262, "vision_start_token_id": 259},
    ),
    "idefics3": ("Idefics3", {"model_type": "llama", "pad_token_id": 0}, VISION, {"image_token_id": 261, "pad_token_id": 0}),
}
TOKENS = np.random.default_rng(0).integers(0, 256, (1, 17), np.int32)


def logits_of(folder: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint = open_checkpoint(str(folder))
    return sample_logits(load_model(checkpoint, quantization=None, progress=False), [TOKENS])[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", tiered(KINDS, quick=["gemma3"]))
def test_logits_are_those_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    """About 3 CPU seconds a case. Files of older and newer names, and a text_config with little in it."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    transformers = pytest.importorskip("transformers")
    name, text, vision, fields = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(text_config=TEXT | text, vision_config=vision, **fields)
    torch.manual_seed(0)
    whole = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = whole(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()
    whole.save_pretrained(tmp_path)
    np.testing.assert_allclose(logits_of(tmp_path).reshape(expected.shape), expected, atol=1e-4)
    tensors = {name: tensor.numpy().copy() for name, tensor in whole.state_dict().items()}
    if whole.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})  # as the modules are called today
    stated = json.loads((tmp_path / "config.json").read_text())
    kept = (*TEXT, *text, "model_type", "layer_types")
    stated["text_config"] = {name: value for name, value in stated["text_config"].items() if name in kept}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.warns(UserWarning, match=r"is read as a language model .* left out"):
        checkpoint = open_checkpoint(str(tmp_path))
    np.testing.assert_allclose(logits_of(tmp_path).reshape(expected.shape), expected, atol=1e-4)
    folder = merge(checkpoint, None, tmp_path / "text", progress=False)
    alone = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(alone(torch.from_numpy(TOKENS).long()).logits.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.text_model.norm.weight", "model.norm.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("visual.blocks.0.attn.qkv.weight", None),
        ("model.vision_tower.vision_model.embeddings.position_embedding.weight", None),
    ],
)
def test_names(stored: str, expected: str | None) -> None:
    assert text_name(stored) == expected


def test_a_text_part_that_differs_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    config = {"model_type": "paligemma", "text_config": {"model_type": "gemma"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"paligemma.*a prompt attends to itself in both directions"):
        open_checkpoint(str(tmp_path))


def with_head(folder: Path, head: np.ndarray) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def test_a_head_that_differs_is_used_and_merged(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    tied = logits_of(folder)
    with_head(folder, embedding.astype(np.float32))
    assert open_checkpoint(str(folder)).config["tie_word_embeddings"] is True  # the same values: nothing is said
    head = embedding.copy()
    head[5] += 1
    with_head(folder, head)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight; the head is used"):
        checkpoint = open_checkpoint(str(folder))
    own = logits_of(folder)
    np.testing.assert_allclose(np.delete(own, 5, -1), np.delete(tied, 5, -1), atol=1e-4)
    assert np.abs(own[..., 5] - tied[..., 5]).min() > 1e-3
    merged = merge(checkpoint, None, tmp_path / "merged", progress=False)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(open_checkpoint(str(merged)).read("lm_head.weight"), head)
    with_head(folder, head[:-1])
    with pytest.warns(UserWarning, match="differs"), pytest.raises(CheckpointError, match=r"lm_head\.weight: expected"):
        load_model(open_checkpoint(str(folder)), progress=False)
