"""Adapters of a base that PEFT had resized, whose files hold its token table and head: here, back in PEFT, and merged."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from peft_peer import VOCABULARY, Peer, largest, run
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import Adapter, read_adapter
from qlora_jax.adapters.special_tokens import resized_for_adapter
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.peft import LoRA

pytestmark = [
    # PEFT calls a property of transformers that is to be renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer:UserWarning"),
]

TOLERANCE = 5e-5  # on logits whose standard deviation is about 3
BOTH: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"]}
CASES: dict[str, tuple[str, bool, int, dict[str, Any]]] = {  # (family, whether tied, rows, fields of LoraConfig)
    "LoRA": ("llama", False, VOCABULARY + 3, {}),
    "tied LoRA": ("llama", True, VOCABULARY + 3, {}),
    "fewer rows": ("llama", False, VOCABULARY - 3, {"modules_to_save": ["lm_head"]}),
    "tied table and head": ("llama", True, VOCABULARY + 3, BOTH),
    "tied head": ("llama", True, VOCABULARY + 3, {"modules_to_save": ["lm_head"]}),
    "table": ("llama", False, VOCABULARY + 3, {"modules_to_save": ["embed_tokens"]}),
    "rows": ("llama", False, VOCABULARY + 3, {"trainable_token_indices": [5, VOCABULARY]}),
    "tied rows": ("llama", True, VOCABULARY + 3, {"trainable_token_indices": [5, VOCABULARY]}),
    "NeoX": ("gpt_neox", False, VOCABULARY + 3, {"modules_to_save": ["embed_in"]}),
    "T5": ("t5", True, VOCABULARY + 3, {}),
}


def resized(peer: Peer, rows: int, seed: int) -> Any:
    """The base with random rows beyond its own: other rows with another seed."""
    peer.torch.manual_seed(seed)
    base = peer.base()
    base.resize_token_embeddings(rows)
    with peer.torch.no_grad():
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            module.weight[min(rows, VOCABULARY) - 8 :].normal_()
    return base


@pytest.mark.parametrize("case", tiered(CASES, quick=["LoRA", "tied rows"]))
def test_there_and_back_and_merged(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tied, rows, fields = CASES[case]
    monkeypatch.setattr("peft_peer.VOCABULARY", min(rows, VOCABULARY))  # of the tokens that are asked
    peer = Peer(tmp_path / "peer", family, tie_word_embeddings=tied)
    config = peer.peft.LoraConfig(
        r=4, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM", target_modules="all-linear", **fields
    )
    model = peer.peft.get_peft_model(resized(peer, rows, 1), config)
    with peer.torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * peer.torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "theirs")
    expected = peer.logits(model)

    checkpoint, adapter = open_checkpoint(str(peer.folder)), read_adapter(tmp_path / "theirs")
    room = resized_for_adapter(checkpoint, adapter)
    loaded = load_adapter(load_model(room, quantization=None, method=adapter.method, progress=False), adapter)
    assert run(loaded).shape[-1] == rows
    assert largest(run(loaded), expected) < TOLERANCE

    save_adapter(loaded, tmp_path / "ours", resized_embeddings=adapter.resized_embeddings)
    again = read_adapter(tmp_path / "ours")
    for saved, before in ((again.resized_embeddings, adapter.resized_embeddings), (again.tensors, adapter.tensors)):
        assert all(largest(saved[name], before[name]) < 1e-6 for name in saved)
    assert again.resized_embeddings.keys() == adapter.resized_embeddings.keys()
    theirs = peer.peft.PeftModel.from_pretrained(resized(peer, rows, 2), tmp_path / "ours")
    assert largest(peer.logits(theirs), expected) < TOLERANCE

    merge(resized_for_adapter(checkpoint, again), again, tmp_path / "merged", dtype="float32", progress=False)
    merged = peer.kind.from_pretrained(tmp_path / "merged", dtype=peer.torch.float32)
    assert largest(peer.logits(merged), expected) < TOLERANCE


def made(tables: dict[str, np.ndarray], trained: dict[str, np.ndarray] | None = None) -> Adapter:
    """An adapter with tables of these modules, and whole modules that it has trained."""
    named = [{f"base_model.model.{name}.weight": value for name, value in part.items()} for part in (trained or {}, tables)]
    return Adapter("here", LoRA(), None, *named)


def zeros(rows: int, features: int = 64) -> np.ndarray:
    return np.zeros((rows, features), np.float32)


@pytest.fixture(scope="module")
def untied(make_tiny_llama: Callable[..., Path]) -> Checkpoint:
    """Of headers alone."""
    tied = open_checkpoint(str(make_tiny_llama()))
    shapes = {**tied.shapes, "lm_head.weight": (259, 64)}
    return dataclasses.replace(tied, config=tied.config | {"tie_word_embeddings": False}, shapes=shapes)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"model.embed_tokens": zeros(262, 32)}, r"embed_tokens\.weight: expected \[rows, 64\], found \[262, 32\]"),
        ({"model.embed_tokens": np.full((262, 64), np.nan)}, r"embed_tokens\.weight: expected finite floats"),
        ({"model.embed_tokens": zeros(262)}, r"as many rows .*'model.embed_tokens.weight': 262, 'lm_head.weight': 259"),
        ({"gpt_neox.embed_in": zeros(262)}, r"no place for \(1\): base_model\.model\.gpt_neox\.embed_in\.weight"),
    ],
)
def test_tables_that_do_not_fit(untied: Checkpoint, tables: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)^here: this adapter holds the embeddings of a resized base.*{message}"):
        resized_for_adapter(untied, made(tables))


def test_a_table_and_the_head_that_is_one_with_it_differ(tiny_llama: Path) -> None:
    tables = {"model.embed_tokens": zeros(262), "lm_head": zeros(262) + 1}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected a copy of \S+embed_tokens\.weight, found other"):
        resized_for_adapter(open_checkpoint(str(tiny_llama)), made(tables))


def test_a_head_that_is_trained_needs_no_other(untied: Checkpoint) -> None:
    room = resized_for_adapter(untied, made({"model.embed_tokens": zeros(262)}, {"lm_head": zeros(262)}))
    assert room.shapes["lm_head.weight"] == room.shapes["model.embed_tokens.weight"] == (262, 64)


def test_values_that_are_trained_twice_have_to_agree(tmp_path: Path) -> None:
    """PEFT writes what it trains of such a table under two names."""
    peer = Peer(tmp_path / "peer", "llama")
    peer.random_adapter(tmp_path / "adapter", modules_to_save=["lm_head"])
    file, head = tmp_path / "adapter" / "adapter_model.safetensors", "base_model.model.lm_head."
    tensors = safetensors.numpy.load_file(file)
    twice = tensors | {f"{head}modules_to_save.weight": tensors[f"{head}weight"]}
    safetensors.numpy.save_file(twice, file)
    assert read_adapter(tmp_path / "adapter").tensors.keys() == tensors.keys()
    twice[f"{head}modules_to_save.weight"] = twice[f"{head}weight"] + 1
    safetensors.numpy.save_file(twice, file)
    with pytest.raises(CheckpointError, match=r"found \(1\): base_model\.model\.lm_head\.modules_to_save\.weight"):
        read_adapter(tmp_path / "adapter")
