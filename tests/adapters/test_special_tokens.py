"""New special tokens: in the tokenizer, as rows of the table and the head, and in PEFT over a base that it has resized."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from peft_peer import VOCABULARY, Peer, largest, randomised, run
from tiers import tiered
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.special_tokens import add_special_tokens, resized_for_adapter, train_token_rows, with_token_rows
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer, save_tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.export.merge import merge
from qlora_jax.peft import LoRA

# PEFT calls a property of transformers that is to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BASES = [("llama", True), ("llama", False), ("gpt_neox", False)]  # family, and whether the head is the token embedding


def test_the_tokenizer_knows_them(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    size, pad = len(tokenizer), tokenizer.pad_token_id
    tokens = add_special_tokens(tokenizer, ["<|a|>", "<|b c|>"])
    assert tokens == (size, size + 1)
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    ids = again("x<|a|>y <|b c|>")["input_ids"]
    assert [token for token in ids if token >= size] == list(tokens)
    assert again.decode(ids, skip_special_tokens=True) == "xy "
    assert again.pad_token_id == pad != again.eos_token_id


def test_padding_that_was_eos_gets_a_token_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    backend = load_tokenizer(tiny_llama).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    size = len(tokenizer)
    tokens = add_special_tokens(tokenizer, ["<|a|>"])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in tokens
    assert len(tokenizer) == max(size, *tokens, tokenizer.pad_token_id) + (max(tokens) >= size)
    save_tokenizer(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|im_end|>"], "expected tokens that the vocabulary lacks, found '<|im_end|>'"),
        (["<|a|>", "<|a|>"], "expected each once, found '<|a|>' twice"),
        ([" "], "expected text, found ' '"),
    ],
)
def test_tokens_that_are_none(tiny_llama: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        add_special_tokens(load_tokenizer(tiny_llama), tokens)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_rows_are_the_mean_of_the_others(tiny_llama: Path, dtype: type) -> None:
    opened = open_checkpoint(str(tiny_llama))
    size, name = opened.config["vocab_size"], "model.embed_tokens.weight"
    checkpoint = Checkpoint("here", opened.config, opened.shapes, lambda name: opened.read(name).astype(dtype))
    table = opened.read(name).astype(dtype).astype(np.float64)
    appended = with_token_rows(checkpoint, [size + 1])
    assert appended.config["vocab_size"] == size + 2
    assert appended.shapes[name] == (size + 2, 64) == appended.read(name).shape
    np.testing.assert_array_equal(appended.read(name)[:size].astype(np.float64), table)
    np.testing.assert_allclose(appended.read(name)[size:].astype(np.float64), [table.mean(0)] * 2, atol=2e-3)
    spare = with_token_rows(checkpoint, [5, 9])
    others = np.delete(table, [5, 9], 0)
    assert spare.shapes == checkpoint.shapes
    np.testing.assert_allclose(spare.read(name)[[5, 9]].astype(np.float64), [others.mean(0)] * 2, atol=2e-3)
    np.testing.assert_array_equal(np.delete(spare.read(name).astype(np.float64), [5, 9], 0), others)


@pytest.mark.parametrize(("family", "tied"), tiered(BASES, quick=BASES[:1]))
def test_peft_computes_the_same_over_a_resized_base(tmp_path: Path, family: str, tied: bool) -> None:
    """Two appended rows and a spare one; saved here, loaded here, in PEFT, and merged."""
    peer = Peer(tmp_path / "peer", family, tie_word_embeddings=tied)
    tokens = (60, VOCABULARY, VOCABULARY + 1)
    checkpoint = open_checkpoint(str(peer.folder))
    larger = with_token_rows(checkpoint, tokens)
    lora = train_token_rows(LoRA(rank=4), larger, tokens)
    model = randomised(load_model(larger, quantization=None, method=lora, progress=False))
    save_adapter(model, tmp_path / "adapter")

    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.method == LoRA(**(vars(lora) | {"target_modules": adapter.method.target_modules}))
    rows = [tensor.shape for name, tensor in adapter.tensors.items() if "trainable_tokens" in name]
    assert rows == [(3, 32)] * (1 if tied else 2)
    base = peer.base()
    base.resize_token_embeddings(VOCABULARY + 2)
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert theirs.shape[-1] == VOCABULARY + 2
    assert largest(run(model), theirs) < 5e-4
    loaded = load_adapter(
        load_model(resized_for_adapter(checkpoint, adapter), quantization=None, method=adapter.method, progress=False),
        adapter,
    )
    assert largest(run(loaded), theirs) < 5e-4
    merge(resized_for_adapter(checkpoint, adapter), adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = peer.kind.from_pretrained(tmp_path / "merged", dtype=peer.torch.float32)
    assert largest(peer.logits(merged), theirs) < 5e-4


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning")
@pytest.mark.parametrize(
    ("family", "tied", "both"),  # of a tied head, only with the embedding
    tiered(
        [(family, tied, both) for family, tied in BASES for both in (True, False) if both or not tied],
        quick=[("llama", True, True)],
    ),
)
def test_rows_of_whole_tables_find_room(tmp_path: Path, family: str, tied: bool, both: bool) -> None:
    """Saved here, loaded here, in PEFT, and merged; a head that is not saved trains its rows."""
    peer = Peer(tmp_path / "peer", family, tie_word_embeddings=tied)
    tokens = (VOCABULARY, VOCABULARY + 1)
    checkpoint = open_checkpoint(str(peer.folder))
    larger = with_token_rows(checkpoint, tokens)
    table = "embed_in" if family == "gpt_neox" else "embed_tokens"
    lora = train_token_rows(LoRA(rank=4, modules_to_save=(table, "lm_head")[: 1 + both]), larger, tokens)
    assert lora.trainable_tokens() == (() if both else (("lm_head", tokens),))
    model = randomised(load_model(larger, quantization=None, method=lora, progress=False))
    save_adapter(model, tmp_path / "adapter")

    adapter = read_adapter(tmp_path / "adapter")
    room = resized_for_adapter(checkpoint, adapter)
    loaded = load_adapter(load_model(room, quantization=None, method=adapter.method, progress=False), adapter)
    assert largest(run(loaded), run(model)) < 1e-4
    base = peer.base()
    base.resize_token_embeddings(VOCABULARY + 2)
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    assert largest(run(loaded), theirs) < 5e-4
    merge(room, adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = peer.kind.from_pretrained(tmp_path / "merged", dtype=peer.torch.float32)
    assert largest(peer.logits(merged), theirs) < 5e-4


def test_only_their_rows_and_lora_train(make_tiny_llama: Callable[..., Path]) -> None:
    checkpoint = with_token_rows(open_checkpoint(str(make_tiny_llama())), [259, 260])
    lora = train_token_rows(LoRA(rank=2), checkpoint, (259, 260))
    model = load_model(checkpoint, quantization=None, method=lora, progress=False)
    sizes = {path: leaf.size for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert sum(size for path, size in sizes.items() if path[-1] not in ("lora_a", "lora_b")) == 2 * 64


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",)])
def test_a_head_that_would_not_learn_them_is_an_error(tiny_llama: Path, saved: tuple[str, ...]) -> None:
    checkpoint = with_token_rows(open_checkpoint(str(tiny_llama)), [259])
    with pytest.raises(ValueError, match="expected both the token embedding and lm_head in modules_to_save"):
        train_token_rows(LoRA(modules_to_save=saved), checkpoint, (259,))
    both = LoRA(modules_to_save=("embed_tokens", "lm_head"))
    assert train_token_rows(both, checkpoint, (259,)) == both


def test_rows_far_beyond_the_base_are_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    lora = LoRA(rank=2, trainable_token_indices=(1000,))
    checkpoint = open_checkpoint(str(tiny_llama))
    larger = load_model(with_token_rows(checkpoint, [1000]), quantization=None, method=lora, progress=False)
    save_adapter(larger, tmp_path)
    with pytest.raises(CheckpointError, match="expected trainable_token_indices below 259 or next to it, found 1000"):
        resized_for_adapter(checkpoint, read_adapter(tmp_path))


def test_a_model_of_two_stacks_is_an_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(Peer(tmp_path, "t5").folder))
    with pytest.raises(ValueError, match="special_tokens: expected a decoder-only model, found t5"):
        with_token_rows(checkpoint, [VOCABULARY])
