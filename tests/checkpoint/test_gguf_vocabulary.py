"""What a GGUF file does not say, from its vocabulary: the pre-tokenizer with which a vocabulary was trained is found again.

About 5 seconds: each vocabulary is trained on code and conversations in a second.
"""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiers import tiered
from tokenizers import Tokenizer, models, trainers

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.splits import named_pre_tokenizer
from qlora_jax.checkpoint.gguf.vocabulary import FINEST_FIRST, conclude_pre
from qlora_jax.checkpoint.tokenizer import load_tokenizer, stop_ids
from qlora_jax.data import PLAIN_ANSWERS
from qlora_jax.errors import CheckpointError

NORMAL, CONTROL = 1, 3
TEXT = "In 2024, I'LL pay 123456!!\n\nOK  two  spaces; self.getElementById('x1') /* 3 */\n    return"


@cache
def corpus() -> tuple[str, ...]:
    """Conversations, and the code of the standard library with years and line ends."""
    import argparse
    import datetime
    import http.client

    code = [inspect.getsource(module) for module in (argparse, datetime, http.client)]
    numbers = " ".join(f"{year} ({year}); getElementById{year % 7} toString isValid" for year in range(1900, 2100)) * 9
    marks = "हिन्दी में लिखा हुआ वाक्य और नमस्ते दुनिया, सब लोग अच्छे हैं 東京タワー 東京です! " * 40
    return (Path(PLAIN_ANSWERS).read_text(encoding="utf-8"), *code, numbers, marks)


def write(path: Path, tokens: list[str], merges: list[str], specials: list[str], **changes: Any) -> Path:
    entries: dict[str, Any] = {
        "model": "gpt2",
        "tokens": tokens + specials,
        "merges": merges,
        "token_type": [NORMAL] * len(tokens) + [CONTROL] * len(specials),
        "eos_token_id": len(tokens),  # the first of the specials
    }
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "llama"))
    for key, value in (entries | changes).items():
        add: Any = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array, type(None): lambda *_: None}
        add[type(value)](f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def trained(pre: str) -> tuple[list[str], list[str]]:
    """The tokens and merges of byte-level BPE that was trained with a pre-tokenizer."""
    import json

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = named_pre_tokenizer(pre)  # pyright: ignore
    backend.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=3000, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


@pytest.mark.parametrize("pre", tiered(FINEST_FIRST, quick=("qwen2", "llama-bpe", "gpt-2")))
def test_the_pre_tokenizer_of_a_vocabulary_is_found(pre: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, merges = trained(pre)
    found = load_tokenizer(write(tmp_path / "m.gguf", tokens, merges, ["<|end|>"]))
    assert f"does not name its pre-tokenizer (tokenizer.ggml.pre): '{pre}' is used" in caplog.text
    named = load_tokenizer(write(tmp_path / "n.gguf", tokens, merges, ["<|end|>"], pre=pre))
    for text in (TEXT, *corpus()[:2]):
        assert found(text).input_ids == named(text).input_ids


def test_a_name_that_is_not_known_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens, merges = trained("llama-bpe")
    found = load_tokenizer(write(tmp_path / "m.gguf", tokens, merges, ["<|end|>"], pre="llama-next"))
    assert "names a pre-tokenizer 'llama-next' that is not known (tokenizer.ggml.pre): 'llama-bpe' is used" in caplog.text
    named = load_tokenizer(write(tmp_path / "n.gguf", tokens, merges, ["<|end|>"], pre="llama-bpe"))
    assert found(TEXT).input_ids == named(TEXT).input_ids


def test_the_pre_tokenizer_of_a_real_vocabulary_is_found(caplog: pytest.LogCaptureFixture) -> None:
    try:
        path = fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    facts = {key.removeprefix("tokenizer.ggml."): value for key, value in read_header(path).metadata.items()}
    assert conclude_pre(path, facts, "llama") == facts["pre"]
    assert "'smollm' is used" in caplog.text


@pytest.mark.parametrize(
    ("specials", "architecture", "pre", "expected"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "llama", None, "llama-bpe"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "llama", "default", "llama-bpe"),
        (["<|endoftext|>", "<|im_end|>"], "qwen2", None, "qwen2"),
        (["<|endoftext|>", "<|im_end|>"], "qwen3", None, "qwen2"),
        (["<|endoftext|>"], "gptneox", None, "gpt-2"),
        (["<|endoftext|>"], "llama", None, "gpt-2"),
    ],
)
def test_a_vocabulary_that_tells_nothing(
    specials: list[str], architecture: str, pre: str | None, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    path = write(tmp_path / "m.gguf", tokens, ["a b"], specials, architecture=architecture, pre=pre)
    load_tokenizer(path)
    assert f"'{expected}' is used, by its special tokens and its architecture" in caplog.text


@pytest.mark.parametrize(
    ("specials", "changes", "expected", "warning"),
    [
        (["<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"], {}, {3, 4, 5}, "'<|eot_id|>', '<|eom_id|>'"),
        (["<|endoftext|>", "<|user|>", "<|end|>"], {}, {3, 5}, "'<|end|>'"),
        (["<eos>", "<end_of_turn>"], {}, {3, 4}, "'<end_of_turn>'"),
        (["<|end_of_text|>", "<|eot_id|>"], {"eot_token_id": 4}, {3, 4}, None),
        (["<|im_end|>", "<|endoftext|>"], {}, {3}, None),
        (["</s>"], {}, {3}, None),
        (["<x>", "</s>"], {"eos_token_id": None}, {4}, "names no end of a text"),
        (["<x>", "<y>"], {"eos_token_id": None}, set(), None),
    ],
)
def test_tokens_that_end_an_answer(
    specials: list[str],
    changes: dict[str, Any],
    expected: set[int],
    warning: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(tmp_path / "m.gguf", ["a", "b", "ab"], ["a b"], specials, pre="gpt-2", **changes)
    tokenizer = load_tokenizer(path)
    assert stop_ids(path, tokenizer) == stop_ids(path, tokenizer) == expected
    assert (warning in caplog.text) if warning else not caplog.text
    assert len(caplog.records) <= 1  # said once
