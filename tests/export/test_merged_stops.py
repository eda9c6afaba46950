"""Models of every family: merged with an adapter, transformers' `generate` stops where the adapter on its base stops here.

The model is a random one of transformers' own class, the adapter one of PEFT with random values. The token that ends a turn
is one that the adapter on its base says after a few others, and not the tokenizer's EOS. Together about a CPU minute.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import SPECIAL, write_tokenizer

from qlora_jax import merge
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.models import FAMILIES, T5
from qlora_jax.serve import generate, generate_seq2seq

# PEFT asks transformers a question by an old name.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

VOCABULARY = 264  # the tokenizer of `write_tokenizer` has 259 tokens
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {  # by model_type: transformers' name, what differs from SIZES
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("Gemma3", {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "t5": ("T5", {}),
}
PROMPT = [5, 17, 200, 33]
LONGEST = 12


class Peer:
    """A random model of a family in a folder, an adapter on it, and what transformers generates of a folder."""

    def __init__(self, folder: Path, family: str) -> None:
        self.torch: Any = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
        peft: Any = pytest.importorskip("peft", reason="PEFT, to compare with, is not installed")
        self.transformers: Any = pytest.importorskip("transformers")
        name, fields = PEERS[family]
        self.is_t5, self.base, self.adapter = family == "t5", folder / "base", folder / "adapter"
        config = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
        self.torch.manual_seed(0)
        self.model = self.kind(name)(getattr(self.transformers, config)(**((T5_SIZES if self.is_t5 else SIZES) | fields)))
        self.randomise(self.model)
        self.model.save_pretrained(self.base)
        write_tokenizer(self.base)
        task = "SEQ_2_SEQ_LM" if self.is_t5 else "CAUSAL_LM"
        adapted = peft.get_peft_model(self.model, peft.LoraConfig(r=4, task_type=task, target_modules="all-linear"))
        self.randomise(adapted, only_trained=True)
        adapted.save_pretrained(self.adapter)

    def kind(self, name: str) -> Any:
        return getattr(self.transformers, f"{name}{'ForConditionalGeneration' if self.is_t5 else 'ForCausalLM'}")

    def randomise(self, model: Any, *, only_trained: bool = False) -> None:
        of_table = 0.05 if "Gemma" in type(model).__name__ else 0.5  # Gemma's embeddings are scaled
        with self.torch.no_grad():
            for name, parameter in model.named_parameters():
                table = any(part in name for part in ("embed", "lm_head", "shared", "bias"))
                if only_trained and parameter.requires_grad:
                    parameter.add_(0.3 * self.torch.randn(parameter.shape))
                elif not only_trained and parameter.ndim == 2:
                    parameter.normal_(0.0, of_table if table else parameter.shape[1] ** -0.5)

    def answer(self, folder: Path) -> list[int]:
        """What `generate` says after the prompt, with the settings that the folder states."""
        auto = self.transformers.AutoModelForSeq2SeqLM if self.is_t5 else self.transformers.AutoModelForCausalLM
        model = auto.from_pretrained(folder)
        assert model.dtype == self.torch.float32, "the base's dtype"
        tokens = self.torch.tensor([PROMPT])
        found = model.generate(input_ids=tokens, max_new_tokens=LONGEST, do_sample=False)[0].tolist()
        return found[1 if self.is_t5 else len(PROMPT) :]


class Ours:
    """An adapter on its base here."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.model = open_pretrained(base, adapter, quantization=None, dtype=jnp.float32).load(progress=False)

    def answer(self, stop_ids: frozenset[int] = frozenset()) -> list[int]:
        """What is said after the prompt, without the token that ends it."""
        say: Any = generate_seq2seq if isinstance(self.model, T5) else generate
        return say(*nnx.split(self.model), [PROMPT], max_new_tokens=LONGEST, eos_ids=stop_ids)[0]


def stop_ids(base: Path, adapter: Path) -> frozenset[int]:
    return open_pretrained(base, adapter, quantization=None).stop_ids


def turn_end(answer: list[int]) -> tuple[int, int]:
    """(place, token): a token of an answer that is new there and not the first; it will end a turn."""
    place = next(place for place in range(2, len(answer)) if answer[place] not in (*answer[:place], 1))
    return place, answer[place]


def test_every_family_is_here() -> None:
    assert set(PEERS) == set(FAMILIES)


@pytest.mark.parametrize("family", PEERS)
def test_it_stops_where_the_adapter_on_its_base_stopped(tmp_path: Path, family: str) -> None:
    """With several ends in generation_config.json, and with config.json alone."""
    peer = Peer(tmp_path, family)
    ours = Ours(peer.base, peer.adapter)
    answer = ours.answer()
    place, end = turn_end(answer)
    assert peer.answer(peer.base)[: place + 1] != answer[: place + 1], "the adapter changes what is said"
    stated, config = peer.base / "generation_config.json", peer.base / "config.json"
    fields = {"eos_token_id": [1, VOCABULARY - 1, end]} | ({"decoder_start_token_id": 0} if peer.is_t5 else {})
    stated.write_text(json.dumps(fields), encoding="utf-8")
    assert ours.answer(stop_ids(peer.base, peer.adapter)) == answer[:place]
    merged = merge(peer.base, peer.adapter, tmp_path / "merged", progress=False)
    assert peer.answer(merged) == answer[: place + 1]

    stated.unlink()
    fields = json.loads(config.read_text(encoding="utf-8")) | {"eos_token_id": end}
    config.write_text(json.dumps(fields), encoding="utf-8")
    assert ours.answer(stop_ids(peer.base, peer.adapter)) == answer[:place]
    merged = merge(peer.base, peer.adapter, tmp_path / "merged again", progress=False)
    assert peer.answer(merged) == answer[: place + 1]


def write_gguf(path: Path, peer: Peer, architecture: str, end: int | None) -> Path:
    """The model of a peer as llama.cpp writes it, with its tokenizer; `end` is the end of a turn."""
    config, layers = peer.model.config, SIZES["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(SIZES["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(1e6)
    alphabet = json.loads((peer.base / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    tokens = [*alphabet, *(f"<|{number}|>" for number in range(VOCABULARY - len(alphabet) - 1)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL or token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    if end is not None:
        writer.add_eot_token_id(end)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, layers)
    for name, value in peer.transformers.AutoModelForCausalLM.from_pretrained(peer.base).named_parameters():
        module, suffix = name.rsplit(".", 1)
        offset = 1.0 if architecture == "gemma3" and "norm" in name else 0.0
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", np.ascontiguousarray(value.detach().numpy() + offset))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(("family", "architecture"), [("qwen2", "qwen2"), ("gemma3_text", "gemma3")])
def test_from_gguf(tmp_path: Path, family: str, architecture: str) -> None:
    """With an end of a turn in the file; generation_config.json of the merged folder is made from it."""
    peer = Peer(tmp_path, family)
    ours = Ours(write_gguf(tmp_path / "a.gguf", peer, architecture, None), peer.adapter)
    answer = ours.answer()
    place, end = turn_end(answer)
    file = write_gguf(tmp_path / "b.gguf", peer, architecture, end)
    assert ours.answer(stop_ids(file, peer.adapter)) == answer[:place]
    merged = merge(file, peer.adapter, tmp_path / "merged", dtype="float32", progress=False)
    assert peer.answer(merged) == answer[: place + 1]
