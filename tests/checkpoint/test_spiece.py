"""A tokenizer that comes as spiece.model alone, as T5 v1.1's does, against the sentencepiece library itself."""

import struct
from pathlib import Path

import pytest

from qlora_jax.checkpoint.tokenizer import load_tokenizer

# Its C++ types have no module, of which Python 3.12 warns.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")

NORMAL, UNKNOWN, CONTROL = 1, 2, 3
PIECES = [
    ("<pad>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    ("<unk>", 0.0, UNKNOWN),
    ("▁the", -1.0, NORMAL),
    ("▁cat", -2.0, NORMAL),
    ("▁", -3.0, NORMAL),
    *((letter, -4.0 - index / 100, NORMAL) for index, letter in enumerate("acehst.")),
]


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low]) if not rest else bytes([low | 128]) + varint(rest)


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A unigram model in the message of sentencepiece_model.proto: pieces 1, trainer 2, normalizer 3."""
    pieces = b"".join(field(1, field(1, text.encode()) + field(2, score) + field(3, kind)) for text, score, kind in PIECES)
    nothing = (1 << 64) - 1  # -1: no token begins a text
    trainer = field(2, field(3, 1) + field(40, 2) + field(41, nothing) + field(42, 1) + field(43, 0))
    normalizer = field(3, field(1, b"identity") + field(3, 1) + field(4, 1) + field(5, 1))
    (tmp_path / "spiece.model").write_bytes(pieces + trainer + normalizer)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    return tmp_path


def test_ids_are_those_of_sentencepiece(folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(folder / "spiece.model"))  # pyright: ignore[reportCallIssue]
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    for text in ("the cat", "the cat sat.", "sat  the", "thecat"):
        expected = processor.encode(text)
        assert tokenizer(text)["input_ids"] == [*expected, 1]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.decode(tokenizer("the cat sat.")["input_ids"], skip_special_tokens=True) == "the cat sat."


def test_a_sentencepiece_model_with_tokens_beside_it(tmp_path: Path) -> None:
    """As adapters of 2023 have it: tokenizer.model, added_tokens.json and no tokenizer.json; with ChatML's tokens."""
    import io
    import json

    from sentencepiece import SentencePieceTrainer
    from transformers import AutoTokenizer

    from qlora_jax.checkpoint.tokenizer import save_tokenizer
    from qlora_jax.data import PLAIN_ANSWERS

    model = io.BytesIO()
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(Path(PLAIN_ANSWERS).read_text(encoding="utf-8").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        minloglevel=2,
    )
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    config = names | {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "chat_template": "{{ messages[0].content }}",
        "added_tokens_decoder": {"500": {"content": "<|im_end|>"} | flags, "501": {"content": "<|im_start|>"} | flags},
    }
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    for name, value in {
        "added_tokens": {"<|im_start|>": 501, "<|im_end|>": 500},
        "special_tokens_map": names | {"pad_token": "</s>"},
        "tokenizer_config": config,
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    peer, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    save_tokenizer(ours, tmp_path / "saved")
    for tokenizer in (ours, load_tokenizer(tmp_path / "saved")):
        assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template) == (502, 500, config["chat_template"])
        for text in ("<|im_start|>What is the capital?<|im_end|>\n", "two  spaces 北 ", " x"):
            assert tokenizer(text)["input_ids"] == peer(text)["input_ids"]
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == peer.decode(peer(text)["input_ids"])
