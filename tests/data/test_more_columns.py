"""Columns beside those of a schema: the same conversation, and no column that is dropped."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode, encode_all
from qlora_jax.data.schemas import parse

PAIRS: dict[str, dict[str, str]] = {
    "alpaca": {"instruction": "Q", "output": "A"},
    "question/answer": {"question": "Q", "answer": "A"},
    "input/output": {"input": "Q", "output": "A"},
    "instruction/response": {"instruction": "Q", "response": "A"},
    "prompt/completion": {"prompt": "Q", "completion": "A"},
}
SYSTEM, USER, ANSWER = (
    {"role": role, "content": text} for role, text in (("system", "S"), ("user", "Q"), ("assistant", "A"))
)
EARLIER = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


@pytest.mark.parametrize("schema", PAIRS)
@pytest.mark.parametrize(
    ("more", "before"),
    [
        ({"system": "S"}, (SYSTEM,)),
        ({"system_prompt": "S"}, (SYSTEM,)),
        ({"system_message": "S", "system": None}, (SYSTEM,)),
        ({"system": "S", "system_prompt": "S"}, (SYSTEM,)),
        ({"history": [["Hi", "Hello"]]}, EARLIER),
        ({"history": json.dumps([["Hi", "Hello"]])}, EARLIER),
        ({"history": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, EARLIER),
        ({"system": "S", "history": [["Hi", "Hello"]]}, (SYSTEM, *EARLIER)),
        ({"system": "", "history": []}, ()),
    ],
)
def test_what_comes_before_a_question(
    chatml: PreTrainedTokenizerFast,
    bare: PreTrainedTokenizerFast,
    schema: str,
    more: dict[str, Any],
    before: tuple[Any, ...],
) -> None:
    row = PAIRS[schema] | more
    record = parse(row)
    assert record.messages == (*before, USER, ANSWER)
    assert (record.schema, record.unused) == (schema, ())
    if before:
        # As the same conversation of messages.
        for tokenizer, template in ((chatml, "auto"), (bare, "guanaco")):
            expected = encode({"messages": list(record.messages)}, tokenizer, template=template)  # type: ignore[arg-type]
            assert encode(row, tokenizer).tokens.tolist() == expected.tokens.tolist()
        with pytest.raises(DataError, match="template 'alpaca': expected one user message and one answer, found"):
            encode(row, chatml, template="alpaca")


def test_contexts() -> None:
    for row, question in (
        ({"context": "C", "question": "Q", "answer": "A"}, "C\n\nQ"),
        ({"context": "C", "input": "Q", "output": "A"}, "C\n\nQ"),
        ({"context": "C", "instruction": "Q", "output": "A"}, "Q\n\nC"),
        ({"input": "I", "context": "C", "instruction": "Q", "response": "A"}, "Q\n\nI\n\nC"),
        ({"context": "", "question": "Q", "answer": "A"}, "Q"),
    ):
        record = parse(row)
        assert (record.messages[0]["content"], record.unused) == (question, ())


def test_system_messages_of_conversations() -> None:
    for column in ("messages", "conversations"):
        assert parse({"system": "S", column: [USER, ANSWER]}).messages == (SYSTEM, USER, ANSWER)
        assert parse({"system_prompt": "S ", column: [SYSTEM, USER, ANSWER]}).messages == (SYSTEM, USER, ANSWER)
        with pytest.raises(DataError, match="column 'system': expected no system message in the conversation beside it"):
            parse({"system": "T", column: [SYSTEM, USER, ANSWER]})


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"history": [["Hi"]]}, "column 'history', turn 0: expected a question and its answer, found 1 values"),
        ({"history": [["Hi", None]]}, "column 'history', turn 0: expected text, found null"),
        ({"history": ["Hi"]}, "column 'history', message 0: expected an object"),
        ({"history": "["}, "column 'history': expected JSON"),
        ({"system": [["S"]]}, "column 'system', part 0: expected text, found list"),
        ({"system": "S", "system_prompt": "T"}, "columns system, system_prompt: expected one system message"),
        ({"context": {}}, "column 'context': expected text, found dict"),
    ],
)
def test_wrong_values(more: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse(PAIRS["question/answer"] | more)


@pytest.mark.parametrize(
    ("prompt", "completion", "messages", "learned"),
    [
        ([USER], [ANSWER], [USER, ANSWER], "A<|im_end|>"),
        ([USER], ANSWER, [USER, ANSWER], "A<|im_end|>"),
        ("Q", [ANSWER], [USER, ANSWER], "A<|im_end|>"),
        ([USER], "A", [USER, ANSWER], "A<|im_end|>"),
        (json.dumps([USER]), json.dumps([ANSWER]), [USER, ANSWER], "A<|im_end|>"),
        ([SYSTEM, *EARLIER, USER], [ANSWER], [SYSTEM, *EARLIER, USER, ANSWER], "A<|im_end|>"),
        ([USER], [ANSWER, USER, ANSWER], [USER, ANSWER, USER, ANSWER], "A<|im_end|>A<|im_end|>"),
    ],
)
def test_prompts_and_completions_of_messages(
    chatml: PreTrainedTokenizerFast, prompt: Any, completion: Any, messages: list[Any], learned: str
) -> None:
    example = encode({"prompt": prompt, "completion": completion}, chatml)
    assert example.tokens.tolist() == encode({"messages": messages}, chatml).tokens.tolist()
    assert chatml.decode(example.tokens[example.loss_mask]) == learned
    _, report = encode_all([{"prompt": prompt, "completion": completion}], chatml, max_length=100, progress=False)
    assert report.forms == {"prompt/completion as chat": 1}


def test_texts_that_only_look_like_messages_are_texts(chatml: PreTrainedTokenizerFast) -> None:
    row = {"prompt": 'JSON: [{"a": 1}] ->', "completion": '[{"b": 2}]'}
    assert chatml.decode(encode(row, chatml).tokens) == row["prompt"] + row["completion"] + "<|im_end|>"
