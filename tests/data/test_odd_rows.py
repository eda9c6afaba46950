"""Rows that cannot be used: left out and counted by reason, or one error; what is not used is named."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode_all, encode_all_seq2seq, encode_preferences
from qlora_jax.data.odd_rows import RowAccount, RowTally

GOOD = {"question": "Q?", "answer": "Yes."}
USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "Yes."}
BAD: dict[str, Any] = {
    "null content": {"messages": [USER, {"role": "assistant", "content": None}]},
    "null row": None,
    "all null": {"question": None, "answer": None},
    "no row": ["Q?"],
    "missing column": {"question": "Q?"},
    "odd role": {"messages": [USER, {"role": "narrator", "content": "A"}]},
    "a picture": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, ANSWER]},
    "broken tools": {"messages": [USER, ANSWER], "tools": "{"},
    "half a character": {"question": "Q?", "answer": "A\ud83d"},
    "answer only": {"messages": [ANSWER]},
    "two system messages": {"messages": [{"role": "system", "content": "S"}, USER, ANSWER], "system": "T"},
    "weight": {"messages": [USER, ANSWER | {"weight": 0.5}]},
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_is_left_out_or_named(chatml: PreTrainedTokenizerFast, name: str) -> None:
    rows = [GOOD, BAD[name], GOOD]
    examples, report = encode_all(rows, chatml, max_length=200, on_bad_row="skip", progress=False)
    assert (len(examples), report.kept, report.odd.left_out) == (2, 2, 1)
    report.check_bad_rows()
    assert "; 1 left out: cannot be used (row 1: " in str(report)
    with pytest.raises(DataError, match=r"^row 1 \(counted from 0\): "):
        encode_all(rows, chatml, max_length=200, progress=False)


def test_rows_that_some_templates_refuse(chatml: PreTrainedTokenizerFast, inst: PreTrainedTokenizerFast) -> None:
    rows = [{"messages": [USER, USER, ANSWER]}, {"messages": [USER, {"role": "tool", "content": "3"}, ANSWER]}, GOOD]
    _, report = encode_all(rows, chatml, max_length=200, on_bad_row="skip", progress=False)
    assert report.kept == 3
    _, report = encode_all(rows, inst, max_length=200, on_bad_row="skip", progress=False)
    assert report.kept == 3 - report.odd.left_out
    assert "row 1: the chat template refuses this conversation" in str(report)


def test_reasons_are_counted_with_their_first_row(chatml: PreTrainedTokenizerFast) -> None:
    rows = [GOOD] * 40 + [BAD["odd role"], BAD["missing column"], {"messages": [USER, USER, BAD["odd role"]["messages"][1]]}]
    _, report = encode_all(rows, chatml, max_length=200, on_bad_row="skip", progress=False)
    assert report.odd.reasons().startswith(
        "row 40: column 'messages', message 1, role: expected user, assistant, system, tool or another name of these, found "
        "'narrator' (and 1 more like it); row 41: unknown schema: found the columns ['question']; --columns "
    )
    report.check_bad_rows()
    assert report.odd.bad.keys() == (report.odd + report.odd).bad.keys()
    assert (report.odd + report.odd).left_out == 6
    assert [odd.first for odd in (report.odd + report.odd).bad.values()] == [40, 41]


@pytest.mark.parametrize(
    ("bad", "good", "fails"), [(1, 1, False), (2, 18, False), (2, 17, True), (3, 30, False), (1, 0, False)]
)
def test_more_than_one_in_ten_is_an_error(bad: int, good: int, fails: bool) -> None:
    tally = RowTally("skip")
    for row in range(bad):
        tally.leave_out(row, DataError(f"message {row}: expected text, found {row}"))
    account = tally.account()
    assert [odd.count for odd in account.bad.values()] == [bad]
    if fails:
        with pytest.raises(DataError, match=r"2 of 19 rows cannot be used, more than one in ten, .*: row 0: message 0"):
            account.check(bad + good)
    else:
        account.check(bad + good)


def test_columns_and_keys_that_nothing_reads_are_named(chatml: PreTrainedTokenizerFast) -> None:
    named = [USER | {"name": "Ada", "train": True}, ANSWER | {"logprobs": [1], "weight": 1}]
    rows: list[dict[str, Any]] = [
        {"messages": named, "id": 3, "source": ""},
        GOOD | {"context": "C.", "category": "qa", "empty": None},
        {"prompt": "P", "completion": "C", "context": "C.", "id": 0},
        {"text": "T", "title": "T"},
    ]
    _, report = encode_all(rows, chatml, max_length=200, progress=False)
    assert report.odd.unused == {"id": 2, "name": 1, "train": 1, "logprobs": 1, "category": 1, "context": 1, "title": 1}
    assert str(report).endswith("; not used: category, context, id, logprobs, name, title, train")
    assert RowAccount().sentences() == []


def test_a_key_that_the_template_reads_is_used(make_chatml: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.name }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
    )
    rows = [{"messages": [USER | {"name": "Ada", "mood": "x"}, ANSWER | {"name": "bot"}]}]
    _, report = encode_all(rows, make_chatml(template), max_length=200, progress=False)
    assert report.odd.unused == {"mood": 1}


def test_pairs(chatml: PreTrainedTokenizerFast) -> None:
    good = {"prompt": "Q", "chosen": "A", "rejected": "B", "score": 3}
    bad = [
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"chosen": [USER, ANSWER], "rejected": [USER | {"content": "R"}, ANSWER]},
        {"prompt": "Q", "chosen": "A"},
        None,
    ]
    pairs, report = encode_preferences(
        [good] * 40 + bad + [good | {"rejected": " "}], chatml, max_length=100, on_bad_row="skip"
    )
    assert (len(pairs), report.rows, report.odd.left_out, report.empty) == (40, 45, 4, 1)
    assert "1 left out: an answer is empty; 4 left out: cannot be used (row 40: expected two different answers" in str(
        report
    )
    assert str(report).endswith("not used: score")
    report.check_bad_rows()
    _, report = encode_preferences([good, *bad[:2]], chatml, max_length=100, on_bad_row="skip")
    with pytest.raises(DataError, match="2 of 3 rows cannot be used, more than one in ten"):
        report.check_bad_rows()


def test_pairs_of_an_encoder_decoder(bare: PreTrainedTokenizerFast) -> None:
    rows = [GOOD, {"messages": [USER]}, {"completion": "No source."}, GOOD | {"answer": ""}]
    options: dict[str, Any] = {"max_source_length": 50, "max_target_length": 50}
    pairs, report = encode_all_seq2seq(rows, bare, on_bad_row="skip", **options)
    assert (len(pairs), report.without_target, report.odd.left_out) == (1, 2, 1)
    report.check_bad_rows()
    with pytest.raises(DataError, match=r"^row 2 \(counted from 0\): expected a text before the answer"):
        encode_all_seq2seq(rows, bare, **options)


def test_reasoning_is_used_under_each_of_its_names(make_chatml: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    for name in ("reasoning_content", "thinking", "reasoning"):
        rows = [{"messages": [USER, ANSWER | {name: "Because."}]}]
        _, report = encode_all(rows, make_chatml(template), max_length=200, progress=False)
        assert (report.kept, report.odd.unused) == (1, {})


def test_reasoning_that_continues_the_prompt_is_used(make_chatml: Any) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    )
    rows = [{"messages": [USER, ANSWER | {"reasoning_content": "Because."}]}]
    _, report = encode_all(rows, make_chatml(template), max_length=200, progress=False)
    assert (report.kept, report.odd.unused) == (1, {})
