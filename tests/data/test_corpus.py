"""Whole data sets: the account adds up, unusable rows are named, the held-out rows stay the same."""

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import (
    DataError,
    encode,
    encode_all,
    encode_all_seq2seq,
    encode_preferences,
    load_records,
    train_eval_split,
)
from qlora_jax.errors import OptionError

SHORT = {"question": "Why?", "answer": "So."}
LONG = {"question": "Why?", "answer": "So it is. " * 50}
UNANSWERED = {"messages": [{"role": "user", "content": "Hello?"}]}
EMPTY = {"question": "Why?", "answer": ""}
LONG_QUESTION = {"question": "Why? " * 100, "answer": "So."}


def test_report_adds_up(chatml: PreTrainedTokenizerFast) -> None:
    records = [SHORT, LONG, UNANSWERED, EMPTY, LONG_QUESTION, SHORT]
    examples, report = encode_all(records, chatml, max_length=40, progress=False)
    assert (report.rows, report.kept, report.truncated, report.dropped_long, report.without_target) == (
        6,
        3,
        1,
        0,
        3,
    )
    assert report.tokens == sum(len(example) for example in examples)
    assert report.learned_tokens == sum(example.loss_mask.sum() for example in examples)
    assert report.longest_row == max(len(encode(row, chatml)) for row in (LONG, LONG_QUESTION))
    assert str(report).startswith("3 of 6 rows kept: question/answer as chat; 1 cut to 40 tokens (the longest had ")
    assert (report.without_answer, report.empty) == (1, 1)
    reasons = "1 left out: no answer to learn; 1 left out: the answer is empty; 1 left out: nothing to learn in 40 tokens"
    assert f"; {reasons}; " in str(report)
    for example, row in zip(examples, (SHORT, LONG, SHORT), strict=True):
        alone = encode(row, chatml, max_length=40)
        np.testing.assert_array_equal(example.tokens, alone.tokens)
        np.testing.assert_array_equal(example.loss_mask, alone.loss_mask)


def test_long_rows_may_be_dropped_or_refused(chatml: PreTrainedTokenizerFast) -> None:
    examples, report = encode_all([SHORT, LONG], chatml, max_length=40, on_long="drop", progress=False)
    assert len(examples) == report.kept == report.dropped_long == 1
    assert "1 left out: over 40 tokens" in str(report)
    with pytest.raises(DataError, match=r"row 2 \(counted from 0\): expected at most 40 tokens, found \d+"):
        encode_all([SHORT, UNANSWERED, LONG], chatml, max_length=40, on_long="error", progress=False)
    with pytest.raises(OptionError, match="on_long: expected one of split, cut, error, drop, found 'truncate'"):
        encode_all([SHORT], chatml, max_length=40, on_long="truncate", progress=False)  # pyright: ignore[reportArgumentType]


BOOK = "Once upon a time, in a house by the river; nobody knew when. " * 12


@pytest.mark.parametrize("max_length", [16, 17, 40, 63, 64, 1000])
@pytest.mark.parametrize("column", ["text", "completion"])
def test_a_long_text_is_split_and_each_token_is_learned_once(
    chatml: PreTrainedTokenizerFast, inst: PreTrainedTokenizerFast, max_length: int, column: str
) -> None:
    for tokenizer in (chatml, inst):  # without and with a token before a text
        whole = encode({column: BOOK}, tokenizer)
        examples, report = encode_all([{column: BOOK}], tokenizer, max_length=max_length, progress=False)
        learned = np.concatenate([example.tokens[example.loss_mask] for example in examples])
        np.testing.assert_array_equal(learned, whole.tokens[1:])
        assert whole.tokens[-1] == tokenizer.eos_token_id
        assert (learned == tokenizer.eos_token_id).sum() == 1
        assert all(len(example) <= max_length for example in examples)
        # As few rows as possible, each of which starts with the token before its first one or with the tokenizer's own.
        assert len(examples) == -(-(len(whole) - 1) // (max_length - 1))
        for before, example in itertools.pairwise(examples):
            own = tokenizer is inst
            assert example.tokens[0] == (tokenizer.bos_token_id if own else before.tokens[-1])
            assert len(example) - len(before) in (-1, 0, 1)
        split = len(examples) > 1
        assert (report.kept, report.split, report.truncated, report.examples) == (1, int(split), 0, len(examples))
        assert ("; 1 split, over " in str(report)) == split
        cut, report = encode_all([{column: BOOK}], tokenizer, max_length=max_length, on_long="cut", progress=False)
        np.testing.assert_array_equal(cut[0].tokens, whole.tokens[:max_length])
        assert (report.split, report.truncated) == (0, int(split))


def test_what_has_turns_is_cut(chatml: PreTrainedTokenizerFast) -> None:
    for row in (
        LONG,
        {"prompt": "Why?", "completion": BOOK},
        {"text": f"### Human: Why? ### Assistant: {BOOK}"},
        {"completion": f"### Human: Why? ### Assistant: {BOOK}"},
    ):
        (example,), report = encode_all([row], chatml, max_length=40, progress=False)
        whole = encode(row, chatml)
        np.testing.assert_array_equal(example.tokens, whole.tokens[:40])
        assert report.truncated == 1
        assert chatml.eos_token_id not in example.tokens[-10:]
    # Limits of the two parts are for cutting.
    options: dict[str, Any] = {"max_length": 40, "target_max_length": 20, "progress": False}
    (example,), _ = encode_all([{"text": BOOK}], chatml, **options)
    assert len(example) == 20


def test_an_end_that_is_written_is_the_only_one(chatml: PreTrainedTokenizerFast) -> None:
    for completion in ("A", "A<|im_end|>", "A<|im_end|>\n", "A<|im_end|> \n\n"):
        example = encode({"prompt": "Q", "completion": completion}, chatml)
        assert (example.tokens == chatml.eos_token_id).sum() == 1
        assert str(chatml.decode(example.tokens)) == "Q" + (completion if "<" in completion else "A<|im_end|>")


def test_nothing_to_learn_at_all(chatml: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="expected at least one row with something to learn, found none: 0 of 2 rows"):
        encode_all([UNANSWERED, EMPTY], chatml, max_length=40, progress=False)
    with pytest.raises(
        DataError, match=r"found none: 0 of 2 rows kept; 2 left out: no answer to learn; train_on_source learns prompts too$"
    ):
        encode_all([UNANSWERED] * 2, chatml, max_length=40, progress=False)
    with pytest.raises(DataError, match="0 of 0 rows"):
        encode_all([], chatml, max_length=40, progress=False)
    examples, _ = encode_all([UNANSWERED], chatml, max_length=40, train_on_source=True, progress=False)
    assert examples[0].loss_mask[1:].all()


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " \n"}]},
        {"prompt": "Why?", "completion": " "},
        {"instruction": "Why?", "output": ""},
        {"text": "### Human: Why? ### Assistant: "},
        {"text": "\n"},
    ],
    ids=str,
)
def test_white_space_is_no_answer(chatml: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    _, report = encode_all([SHORT, row], chatml, max_length=40, progress=False)
    assert (report.kept, report.empty, report.without_target) == (1, 1, 1)
    assert "; 1 left out: the answer is empty; " in str(report)


def test_rows_are_named_by_their_number(chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small chunks: the number must count over all of them, and over rows that were left out.
    monkeypatch.setattr("qlora_jax.data.corpus.CHUNK", 2)
    with pytest.raises(DataError, match=r"row 3 \(counted from 0\): unknown schema: found the columns \['prompt'\]"):
        encode_all([SHORT, SHORT, SHORT, {"prompt": "x"}], chatml, max_length=40, progress=False)
    records = [SHORT, UNANSWERED, UNANSWERED, {"text": "No turns"}]
    with pytest.raises(DataError, match=r"row 3 \(counted from 0\): template 'chat': expected a conversation"):
        encode_all(records, chatml, max_length=40, template="chat", progress=False)


def test_split_is_deterministic_and_complete() -> None:
    everything = list(range(100))
    train, held_out = train_eval_split(everything, eval_fraction=0.1, seed=3)
    assert len(held_out) == 10
    assert sorted(train + held_out) == everything
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert train_eval_split(everything, eval_count=10, seed=3) == (train, held_out)
    assert train_eval_split(everything, eval_count=10, seed=4) != (train, held_out)


@pytest.mark.parametrize(
    ("fraction", "count"),
    [(None, None), (0.1, 10), (0.0, None), (1.0, None), (0.001, None), (None, 100), (None, 0)],
)
def test_split_needs_something_on_both_sides(fraction: float | None, count: int | None) -> None:
    with pytest.raises(ValueError, match="expected"):
        train_eval_split(list(range(100)), eval_fraction=fraction, eval_count=count)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("oasst_guanaco", "text as guanaco"),
        ("code_alpaca", "alpaca as alpaca"),
        ("gsm8k", "question/answer as chat"),
        ("mmlu_zero_shot", "input/output as chat"),
    ],
)
def test_real_data_sets(chatml: PreTrainedTokenizerFast, shared_data: Path, name: str, form: str) -> None:
    rows = load_records(str(shared_data / f"{name}.jsonl"), "train[:300]").to_list()
    examples, report = encode_all(rows, chatml, max_length=1000, progress=False)
    assert report.forms == {form: len(rows) - sum(row.get("output") == "" for row in rows)}
    assert report.kept + report.without_target == len(rows)
    for example in examples:
        learned = np.flatnonzero(example.loss_mask)
        assert len(example) <= 1000
        assert example.tokens[learned[-1]] == chatml.eos_token_id or len(example) == 1000


def test_rows_with_a_token_without_an_embedding(chatml: PreTrainedTokenizerFast) -> None:
    """They are rows that cannot be used, for each objective."""
    tokenizer = copy.deepcopy(chatml)
    tokenizer.add_tokens(["<image>"])
    vocabulary = tokenizer.convert_tokens_to_ids("<image>")
    bad = {"question": "What is on <image>?", "answer": "So."}
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    cases: list[tuple[Any, Any, Any, dict[str, Any]]] = [
        (encode_all, SHORT, bad, {"max_length": 40, "progress": False}),
        (encode_preferences, pair, pair | {"rejected": "<image>"}, {"max_length": 40}),
        (encode_all_seq2seq, SHORT, bad, {"max_source_length": 40, "max_target_length": 9}),
    ]
    for encode_rows, good, odd, limits in cases:
        rows = [good] * 10 + [odd]
        assert len(encode_rows(rows, tokenizer, **limits)[0]) == 11
        examples, report = encode_rows(rows, tokenizer, on_bad_row="skip", vocabulary=vocabulary, **limits)
        assert len(examples) == 10
        assert "1 left out: cannot be used (row 10: expected tokens for which the model has an embedding" in str(report)
        with pytest.raises(DataError, match=rf"row 10 .counted from 0.: .* found '<image>' .{vocabulary}."):
            encode_rows(rows, tokenizer, vocabulary=vocabulary, **limits)


def test_a_tokenizer_without_an_end_has_a_way_out(chatml: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"found none. Name the token that ends a text of this model in its tokenizer_config"
    ):
        encode_all([{"text": "x"}], tokenizer, max_length=9, progress=False)
