"""Perplexity against transformers' sliding window and against NumPy, on a tiny random model. (About 4 CPU-s.)"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.commands.evaluate import main
from qlora_jax.data import DataError
from qlora_jax.errors import OptionError
from qlora_jax.evaluate import (
    Document,
    Perplexity,
    compare_perplexities,
    evaluate_perplexity,
    read_documents,
    sliding_windows,
    token_scores,
)

TEXT = "The quick brown fox jumps over the lazy dog, ünd dann schläft er in der Sonne. " * 4


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Any, Any, Any]:
    graphdef, state = nnx.split(load_model(open_checkpoint(str(tiny_llama)), quantization=None, dtype=jnp.float32))
    return graphdef, state, load_tokenizer(tiny_llama)


def peer_perplexity(folder: Path, tokens: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' guide to perplexity, with the sum of its losses and not the mean of their means."""
    torch = pytest.importorskip("torch", reason="the peers (torch, transformers' models) are not installed")
    from transformers import LlamaForCausalLM

    peer = LlamaForCausalLM.from_pretrained(folder).eval()
    ids, total, count, before = torch.tensor([tokens]), 0.0, 0, 0
    for start in range(0, len(tokens), stride):
        stop = min(start + max_length, len(tokens))
        window, labels = ids[:, start:stop], ids[:, start:stop].clone()
        labels[:, : -(stop - before)] = -100
        with torch.no_grad():
            losses = int((labels[:, 1:] != -100).sum())
            total += float(peer(window, labels=labels).loss) * losses
        count += losses
        before = stop
        if stop == len(tokens):
            break
    return float(np.exp(total / count)), count


@pytest.mark.parametrize(("max_length", "stride"), [(64, 20), (64, 64), (1024, 512)])
def test_a_sliding_window_is_that_of_transformers(
    tiny: tuple[Any, Any, Any], tiny_llama: Path, max_length: int, stride: int
) -> None:
    graphdef, state, tokenizer = tiny
    tokens = tokenizer(TEXT)["input_ids"]
    document = Document(np.asarray(tokens, np.int32), np.arange(len(tokens)) > 0)
    found = evaluate_perplexity(graphdef, state, [document], tokenizer, max_length=max_length, stride=stride, batch_size=2)
    expected, count = peer_perplexity(tiny_llama, tokens, max_length, stride)
    assert found.perplexity().value == pytest.approx(expected, rel=1e-4)
    assert found.tokens.sum() == count
    if stride < max_length:  # the bytes of all but the first token, a byte of this tokenizer
        assert found.bytes.sum() == len(TEXT.encode()) - 1
        assert found.bits_per_byte().value == pytest.approx(np.log2(expected) * count / (len(TEXT.encode()) - 1), rel=1e-4)
    interval = found.perplexity()
    assert found.kind == "windows"
    assert np.isnan(interval.low) == (max_length > len(tokens)), "one window has no interval"


def test_scores_are_those_of_single_rows(tiny: tuple[Any, Any, Any]) -> None:
    """Rows of several lengths in padded batches, against the logits of each row alone."""
    graphdef, state, _ = tiny
    draws = np.random.default_rng(0)
    rows = [draws.integers(3, 259, length).astype(np.int32) for length in (2, 1, 150, 40)]
    found = token_scores(graphdef, state, rows, batch_size=3)
    model = nnx.merge(graphdef, state)
    for row, scores in zip(rows, found, strict=True):
        logits = np.asarray(model(jnp.asarray(row[None])), np.float64)[0, :-1]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(scores.log_probabilities, expected[np.arange(len(row) - 1), row[1:]], atol=1e-4)
        np.testing.assert_array_equal(scores.greedy, logits.argmax(-1) == row[1:])


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(1, 4, 2), (10, 4, 1), (10, 4, 3), (10, 4, 4), (10, 30, 7), (8, 4, 2)]
)
def test_windows_score_each_token_once(length: int, window: int, stride: int) -> None:
    found = sliding_windows(length, window, stride)
    scored = [token for one in found for token in range(one.scored, one.stop)]
    assert scored == sorted(set(scored))
    missing = set(range(length)) - set(scored)
    assert missing == (set(range(0, length, stride)) if stride == window else {0})
    for one in found:
        assert one.stop - one.start <= window
        assert one.start < one.scored
    with pytest.raises(OptionError, match=f"stride: expected 1 to max_length \\({window}\\), found {window + 1}"):
        sliding_windows(length, window, window + 1)


def test_intervals_and_differences_resample_the_same_texts() -> None:
    draws = np.random.default_rng(1)
    tokens = draws.integers(5, 50, 200)
    difficulty = draws.normal(2, 0.8, 200)
    one = Perplexity(tokens * difficulty, tokens, 4 * tokens, tokens // 2, "documents")
    other = Perplexity(tokens * (difficulty - 0.1), tokens, 4 * tokens, tokens // 2, "documents")
    value, change = one.perplexity(), compare_perplexities(other, one)
    assert value.value == pytest.approx(np.exp((tokens * difficulty).sum() / tokens.sum()))
    assert value.low < value.value < value.high
    # Every text gains the same: the difference has no spread, however different the texts are.
    assert (change.value, change.low, change.high) == pytest.approx((100 * np.expm1(-0.1),) * 3)
    # The spread of a mean over texts, by the delta method.
    spread = np.sqrt(((tokens * (difficulty - one.loss)) ** 2).sum()) / tokens.sum()
    assert np.log(value.high / value.low) == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert one.bits_per_byte().value == pytest.approx(one.loss / np.log(2) / 4)
    with pytest.raises(DataError, match="expected those of the same tokens"):
        compare_perplexities(one, Perplexity(one.nats, tokens + 1, tokens, tokens, "documents"))


def test_documents_are_those_of_training(tiny: tuple[Any, Any, Any], tmp_path: Path) -> None:
    _, _, tokenizer = tiny
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}] * 3
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, note = read_documents(str(tmp_path / "chat.jsonl"), tokenizer, limit=2)
    assert len(documents) == 2
    assert tokenizer.decode(documents[0].tokens[documents[0].scored]) == "ho<|im_end|>"
    assert "2 of 2 rows kept" in note
    whole, _ = read_documents(str(tmp_path / "chat.jsonl"), tokenizer, whole=True)
    assert whole[0].scored.sum() == len(whole[0].tokens) - 1
    (tmp_path / "texts.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    (joined,), _ = read_documents(str(tmp_path / "texts.jsonl"), tokenizer, join=True)
    assert tokenizer.decode(joined.tokens) == "ab\n\ncd"
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): expected a text to join, found None"):
        read_documents(str(tmp_path / "chat.jsonl"), tokenizer, join=True)


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    command = ["perplexity", "--model", str(tiny_llama), "--data-type", "none", "--data", str(tmp_path / "book.txt")]
    assert main([*command, "--max-length", "64", "--stride", "20", "--batch-size", "2"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert found["perplexity"]["tokens"] == len(TEXT.encode()) - 1
    assert found["perplexity"]["low"] < found["perplexity"]["value"] < found["perplexity"]["high"]
    assert (found["max_length"], found["stride"]) == (64, 20)
    assert captured.out.startswith("| data")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --data: expected a text file, a file of rows or a data set, found none"),
        (["--data", "none.txt"], "none.txt"),
        (["--data", "empty.txt"], "empty.txt: expected a text of at least two tokens, found 0"),
        (["--data", "latin.txt"], "latin.txt: expected UTF-8, found byte 0xe9 at 1"),
        (["--data", "book.txt", "--join"], "join: expected none for book.txt, which is one text"),
        (["--data", "book.txt", "--max-length", "9999"], "max_length: expected at most the 512 positions of the model"),
        (["--data", "book.txt", "--max-length", "8", "--stride", "9"], "stride: expected 1 to max_length (8), found 9"),
    ],
)
def test_one_line_for_what_is_wrong(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("some text")
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("hé".encode("latin-1"))
    assert main(["perplexity", "--model", str(tiny_llama), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_an_encoder_decoder_is_refused(make_tiny_llama: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny_llama()
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "t5", "architectures": ["T5"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["perplexity", "--model", str(folder), "--data", "x.txt"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
