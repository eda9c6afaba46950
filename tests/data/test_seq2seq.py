"""Pairs of texts: tokens, the shift of the targets, padding, and the order of batches."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, Seq2SeqExample, encode_all_seq2seq, encode_seq2seq, seq2seq_batches
from qlora_jax.data.render import ALPACA_PROMPT_WITH_INPUT, render
from qlora_jax.data.schemas import parse
from qlora_jax.data.seq2seq import split_target

SHAPE: dict[str, int] = {"batch_size": 3, "source_length": 5, "target_length": 4, "pad_id": 9, "decoder_start_id": 7}


def example(source: list[int], target: list[int]) -> Seq2SeqExample:
    return Seq2SeqExample(np.array(source, np.int32), np.array(target, np.int32))


def letters(**special: str) -> PreTrainedTokenizerFast:
    """A token a letter; what it puts behind a text by itself is not asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(["</s>", *"abcdef"])}, unk_token="f"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 0)])  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_both_sides_end_in_eos_as_the_tokenizer_ends_a_text(tmp_path: Path) -> None:
    tokenizer = letters(eos_token="</s>")
    found = encode_seq2seq("abc", "de", tokenizer)
    assert found.source.tolist() == tokenizer("abc")["input_ids"] == [1, 2, 3, 0]
    assert found.target.tolist() == tokenizer("de")["input_ids"] == [4, 5, 0]
    assert encode_seq2seq("abc", "de</s>", tokenizer).target.tolist() == [4, 5, 0]  # one end, whoever wrote it
    cut = encode_seq2seq("abcd", "", tokenizer, max_source_length=3, max_target_length=1)
    assert cut.source.tolist() == tokenizer("abcd", truncation=True, max_length=3)["input_ids"] == [1, 2, 0]
    assert cut.target.tolist() == [0]
    with pytest.raises(DataError, match="at least 1 token, found 0"):
        encode_seq2seq("a", "b", tokenizer, max_source_length=0)
    with pytest.raises(DataError, match="eos_token_id None"):
        encode_seq2seq("a", "b", letters())


def test_a_batch_spelled_out() -> None:
    """A row without an example is padding alone, and teaches nothing."""
    two = [example([1, 2, 3], [4, 5, 0]), example([1, 2, 3, 4, 5], [6])]
    (batch,) = seq2seq_batches(two, **SHAPE, shuffle=False, epochs=1)
    expected: dict[str, Any] = {
        "sources": [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5], [9] * 5],
        "source_mask": [[1, 1, 1, 0, 0], [1] * 5, [0] * 5],
        "inputs": [[7, 4, 5, 9], [7, 9, 9, 9], [9] * 4],
        "targets": [[4, 5, 0, 9], [6, 9, 9, 9], [9] * 4],
        "loss_mask": [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4],
    }
    assert batch.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_array_equal(batch[name], rows)
    assert {name: array.dtype for name, array in batch.items()} == {
        "sources": np.int32,
        "source_mask": bool,
        "inputs": np.int32,
        "targets": np.int32,
        "loss_mask": np.float32,
    }
    with pytest.raises(DataError, match=r"example 1: expected at most 5 source and 4 target .* found 1 and 5"):
        seq2seq_batches([example([1], [0]), example([1], [1, 2, 3, 4, 0])], **SHAPE)


@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_rows_stay_pairs_and_resume_anywhere(stop: int) -> None:
    examples = [example([index] * (1 + index % 5), [index] * (1 + index % 4)) for index in range(10, 21)]
    whole = list(islice(seq2seq_batches(examples, **SHAPE, seed=3), 8))
    for batch in whole:
        assert (batch["sources"][:, 0] == batch["targets"][:, 0]).all()
    first, second = (seq2seq_batches(examples, **SHAPE, seed=3) for _ in range(2))
    list(islice(first, stop))
    second.set_state(json.loads(json.dumps(first.get_state())))
    for expected, found in zip(whole[stop:], second, strict=False):
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
    assert first.batches_in_epoch() == 4


PAIR: dict[str, Any] = {"max_source_length": 8, "max_target_length": 4}


def test_records_of_all_schemas_become_pairs() -> None:
    tokenizer = letters(eos_token="</s>")
    rows = [
        {"input": "ab", "output": "c"},
        {"prompt": "ab", "completion": "c"},
        {"question": "ab", "answer": "c"},
        {"text": "### Human: ab### Assistant: c### Human: d### Assistant:e"},
    ]
    found, report = encode_all_seq2seq(rows[:3], tokenizer, **PAIR)
    assert [pair.source.tolist() for pair in found] == [[1, 2, 0]] * 3
    assert [pair.target.tolist() for pair in found] == [[3, 0]] * 3
    assert report.templates == {"plain": 3}
    ((flat,),) = render([parse(rows[3])], tokenizer, "auto")
    assert split_target(flat) == (rows[3]["text"][:-1], "e")
    ((alpaca,),) = render([parse({"instruction": "Add.", "input": "1 2", "output": "3"})], tokenizer, "auto")
    assert split_target(alpaca) == (ALPACA_PROMPT_WITH_INPUT.format(instruction="Add.", input="1 2"), "3")


def test_what_becomes_of_long_and_empty_rows() -> None:
    tokenizer = letters(eos_token="</s>")
    rows = [{"input": "abcdefabc", "output": "a"}, {"input": "a", "output": "abcd"}, {"input": "a", "output": " "}]
    rows.append({"input": "a", "output": "b"})
    found, report = encode_all_seq2seq(rows, tokenizer, **PAIR)
    assert [pair.source.tolist() for pair in found] == [[1, 2, 3, 4, 5, 6, 1, 0], [1, 0], [1, 0]]
    assert [pair.target.tolist() for pair in found] == [[1, 0], [1, 2, 3, 4], [2, 0]]
    text = "2 cut to 8 source and 4 target tokens (the longest had 10 and 5); 1 left out: the target is empty"
    assert str(report) == f"3 of 4 rows kept as pairs of source and target: plain; {text}"
    found, report = encode_all_seq2seq(rows, tokenizer, **PAIR, on_long="drop")
    assert (len(found), report.dropped_long, report.truncated) == (1, 2, 0)
    with pytest.raises(DataError, match=r"row 0 .*at most 8 source and 4 target tokens, found 10 and 2; raise"):
        encode_all_seq2seq(rows, tokenizer, **PAIR, on_long="error")
    with pytest.raises(DataError, match="expected at least one pair of source and target, found none: 0 of 1 rows"):
        encode_all_seq2seq(rows[2:3], tokenizer, **PAIR)
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): expected a text before the answer, .* found none"):
        encode_all_seq2seq([rows[3], {"completion": "a"}], tokenizer, **PAIR)


def test_an_epoch_has_each_example_once() -> None:
    examples = [example([index], [index]) for index in range(1, 8)]

    def order(seed: int, **options: Any) -> list[int]:
        batches = list(seq2seq_batches(examples, **SHAPE, seed=seed, **options))
        assert all(batch["targets"].shape == (3, 4) for batch in batches)
        return [int(x) for batch in batches for x in batch["targets"][batch["loss_mask"] > 0]]

    assert order(0, shuffle=False, epochs=1) == list(range(1, 8))
    twice = order(0, epochs=2)
    assert sorted(twice[:7]) == sorted(twice[7:]) == list(range(1, 8))
    assert twice[:7] != twice[7:] != list(range(1, 8))
    assert order(0, epochs=1) == twice[:7] != order(1, epochs=1)
    with pytest.raises(DataError, match="at least one, found none"):
        next(seq2seq_batches([], **SHAPE))
