"""Adapters with many settings of PEFT: loaded, merged and saved again, each against PEFT's own logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft_peer import Peer
from tiers import tiered
from tiny_models import write_tokenizer

from qlora_jax import from_pretrained, merge, save_pretrained
from qlora_jax.errors import UnsupportedError
from qlora_jax.export.drift import sample_logits

# PEFT warns of many of these settings, and calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # (family, whether tied, fields of LoraConfig)
    "head": ("llama", False, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head and table": (
        "llama",
        True,
        {
            "target_modules": ["q_proj", "embed_tokens", "lm_head"],
            "rank_pattern": {"embed_tokens": 3, "lm_head": 5},
            "alpha_pattern": {"lm_head": 7},
            "use_rslora": True,
        },
    ),
    "kept tied": ("llama", True, {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
    "kept tied as a whole": (
        "llama",
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "head beside rows": ("llama", True, {"target_modules": ["lm_head"], "trainable_token_indices": [3, 9]}),
    "NeoX": ("gpt_neox", False, {"target_modules": ["query_key_value", "embed_in", "lm_head"]}),
    "bias of the targets": ("qwen2", False, {"target_modules": ["q_proj"], "bias": "lora_only", "layers_to_transform": [1]}),
    "all biases": ("gpt_neox", False, {"target_modules": ["dense"], "bias": "all", "lora_bias": True}),
    "bias of B": (
        "llama",
        False,
        {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "rank_pattern": {"q_proj": 2}},
    ),
    "linear layers as a whole": ("llama", False, {"target_modules": "all-linear", "modules_to_save": ["gate_proj"]}),
    "one linear layer": ("qwen2", False, {"target_modules": ["q_proj"], "modules_to_save": ["1.self_attn.k_proj"]}),
    "a module with parts": ("llama", False, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "repeated layers": (
        "llama",
        False,
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]], "rank_pattern": {"layers.3.*": 2}},
    ),
    "OLoRA": ("llama", False, {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": "olora"}),
    "names that match nothing": (
        "llama",
        False,
        {
            "target_modules": ["q_proj", "c_attn"],
            "modules_to_save": ["lm_head", "wte"],
            "exclude_modules": ["fc2"],
            "rank_pattern": {"mlp.fc1": 3, "lm_head": 8},
        },
    ),
}
VOCABULARY = 264  # the tokenizer of `write_tokenizer` has 259 tokens
QUICK = ["tied head and table", "linear layers as a whole", "all biases"]


@pytest.mark.parametrize("case", tiered(CASES, quick=QUICK))
def test_there_merged_and_back(tmp_path: Path, case: str) -> None:
    """About 3 CPU seconds a case."""
    family, tied, fields = CASES[case]
    peer = Peer(tmp_path / "base", family, tie_word_embeddings=tied, vocab_size=VOCABULARY)
    write_tokenizer(peer.folder)
    config = peer.peft.LoraConfig(r=4, task_type="CAUSAL_LM", **fields)
    model = peer.peft.get_peft_model(peer.base(), config)
    with peer.torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * peer.torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 12), np.int32)

    def logits(model: Any) -> np.ndarray:
        with peer.torch.no_grad():
            return model.eval()(peer.torch.from_numpy(tokens).long()).logits.numpy()

    def with_adapter(name: str) -> np.ndarray:
        return logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / name))

    expected = with_adapter("adapter")
    # Float32's rounding grows with the logits, which an adapter on a tied table makes up to ten times larger than the others
    # do: PEFT's own logits differ from those in float64 by 3e-7 of the largest one.
    bound = 3e-6 * float(np.abs(expected).max())
    assert np.abs(expected - logits(peer.base())).max() > 0.01
    ours, _ = from_pretrained(tmp_path / "base", tmp_path / "adapter", quantization=None, progress=False)
    np.testing.assert_allclose(sample_logits(ours, [tokens])[0].reshape(expected.shape), expected, atol=bound, rtol=0)
    save_pretrained(ours, tmp_path / "again")
    np.testing.assert_allclose(with_adapter("again"), expected, atol=bound, rtol=0)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    merged = peer.kind.from_pretrained(tmp_path / "merged", dtype=peer.torch.float32)
    np.testing.assert_allclose(logits(merged), expected, atol=bound, rtol=0)


def test_a_bias_that_the_family_has_no_place_for(tmp_path: Path) -> None:
    peer = Peer(tmp_path / "base", "qwen2", vocab_size=VOCABULARY)
    write_tokenizer(peer.folder)
    peer.random_adapter(tmp_path / "adapter", target_modules=["down_proj"], lora_bias=True)
    with pytest.raises(UnsupportedError, match="it cannot be merged; use it beside the base"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
