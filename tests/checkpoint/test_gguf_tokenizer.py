"""SentencePiece vocabularies in GGUF files: against llama.cpp's algorithm, written out here, and transformers' reading."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from qlora_jax.checkpoint.tokenizer import load_tokenizer, stop_ids
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.errors import CheckpointError

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "The capital of France is Paris.",
    "two  spaces,   three; 12345\n\n\ttabs",
    "Größe, naïve, 北京, 🎉 and e\u0301",
    "def f(x):\n    return {'a': x[0] ** 2}\r\n",
    "x",
    "What is the capital? Write, writing, written, rewritten.",
]


def trained_pieces() -> list[str]:
    """Pieces of real text, in the order in which BPE found them."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])  # pyright: ignore
    backend.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # pyright: ignore[reportAttributeAccessIssue]
    backend.train([PLAIN_ANSWERS], trainers.BpeTrainer(vocab_size=700, show_progress=False))
    return [piece for piece, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1]) if "<" not in piece]


@pytest.fixture(scope="module")
def vocabulary() -> list[tuple[str, float, int]]:
    """(piece, score, type), as the converter writes Llama 2's: specials, bytes, then pieces by falling score."""
    specials = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<turn>", -1000.0, CONTROL)]
    octets = [(f"<0x{octet:02X}>", 0.0, BYTE) for octet in range(256)]
    pieces = trained_pieces()
    assert len(pieces) > 600
    whole = [(piece, -float(index), NORMAL) for index, piece in enumerate(piece for piece in pieces if len(piece) > 1)]
    single = [(piece, -1e4 - index, NORMAL) for index, piece in enumerate(piece for piece in pieces if len(piece) == 1)]
    return [*specials, *octets, *whole, *single, ("<think>", -1000.0, USER_DEFINED)]


def write(path: Path, vocabulary: list[tuple[str, float, int]], architecture: str = "llama", **changes: Any) -> Path:
    entries: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in vocabulary],
        "tokenizer.ggml.scores": [score for _, score, _ in vocabulary],
        "tokenizer.ggml.token_type": [kind for _, _, kind in vocabulary],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries.items():
        if value is not None:
            add: Any = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_llama_cpp(text: str, vocabulary: list[tuple[str, float, int]]) -> list[int]:
    """llm_tokenizer_spm: of all neighbours that together are a piece, join those of the highest score, leftmost first."""
    ids = {piece: index for index, (piece, _, _) in enumerate(vocabulary)}
    symbols = list(text.replace(" ", SPACE))
    while True:
        pairs = [
            (-vocabulary[ids[left + right]][1], place)
            for place, (left, right) in enumerate(pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        place = min(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    result: list[int] = []
    for symbol in symbols:
        result += [ids[symbol]] if symbol in ids else [ids[f"<0x{octet:02X}>"] for octet in symbol.encode()]
    return result


def test_equals_the_algorithm_of_llama_cpp(tmp_path: Path, vocabulary: list[tuple[str, float, int]]) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", vocabulary))
    for text in TEXTS:
        found = tokenizer(text).input_ids
        assert found == [1, *by_llama_cpp(" " + text, vocabulary)], text
        assert tokenizer.decode(found, skip_special_tokens=True) == text
    # Each stretch between special tokens is a text of its own.
    found = tokenizer("<turn>Paris</s> is", add_special_tokens=False).input_ids
    assert found == [3, *by_llama_cpp(" Paris", vocabulary), 2, *by_llama_cpp("  is", vocabulary)]
    assert tokenizer("<think>", add_special_tokens=False).input_ids == [len(vocabulary) - 1]
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer.unk_token == "<unk>"
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == ""
    assert len(tokenizer) == len(vocabulary)


def test_equals_transformers(
    tmp_path: Path, vocabulary: list[tuple[str, float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="transformers reads a GGUF tokenizer only with PyTorch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path / "m.gguf", vocabulary)
    peer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = load_tokenizer(path)
    for text in TEXTS:
        assert ours(text).input_ids == peer(text).input_ids, text
    assert ours.get_vocab() == peer.get_vocab()


def test_no_space_and_no_bos_where_the_file_says_so(tmp_path: Path, vocabulary: list[tuple[str, float, int]]) -> None:
    changes: dict[str, Any] = {"add_space_prefix": False, "add_bos_token": False, "add_eos_token": True}
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", vocabulary, **changes))
    for text in TEXTS:
        assert tokenizer(text).input_ids == [*by_llama_cpp(text, vocabulary), 2], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_gemma(tmp_path: Path, vocabulary: list[tuple[str, float, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of spaces are pieces that stand in the file as spaces; merges go by place, whatever the scores."""
    runs = [(" " * length, -1000.0, USER_DEFINED) for length in (2, 3, 4)]
    pieces = [(piece, 0.0 if kind == NORMAL else score, kind) for piece, score, kind in vocabulary[:-1]]
    pieces = pieces[:260] + runs + pieces[260:]
    path = write(tmp_path / "m.gguf", pieces, "gemma2", add_space_prefix=False)
    ours = load_tokenizer(path)
    by_place = [(piece.replace(" ", SPACE), -float(index), kind) for index, (piece, _, kind) in enumerate(pieces)]
    for text in TEXTS:
        assert ours(text).input_ids == [1, *by_llama_cpp(text, by_place)], text
    assert 262 in ours("a    b").input_ids
    pytest.importorskip("torch", reason="transformers reads a GGUF tokenizer only with PyTorch")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert ours(text).input_ids == peer(text).input_ids, text


def test_the_end_of_a_turn_stops(tmp_path: Path, vocabulary: list[tuple[str, float, int]]) -> None:
    path = write(tmp_path / "m.gguf", vocabulary, eot_token_id=3)
    assert stop_ids(path, load_tokenizer(path)) == {2, 3}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores: expected a list of numbers, found nothing"),
        ({"scores": [0.0]}, r"scores: expected \d+, one for each token, found 1"),
        ({"token_type": None}, r"token_type: expected a list of numbers, found nothing"),
    ],
)
def test_unusable_metadata(
    tmp_path: Path, vocabulary: list[tuple[str, float, int]], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load_tokenizer(write(tmp_path / "m.gguf", vocabulary, **changes))
