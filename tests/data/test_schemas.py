"""Columns decide the schema; every schema with turns becomes the same kind of conversation."""

import pytest

from qlora_jax.data import DataError, detect_schema
from qlora_jax.data.schemas import SCHEMAS, parse, split_turns

USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ({"messages": [USER, ASSISTANT], "id": 3}, "messages"),
        ({"instruction": "Q", "output": "A"}, "alpaca"),
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca"),
        ({"instruction": "Q", "input": None, "output": "A"}, "alpaca"),
        ({"question": "Q", "answer": "A"}, "question/answer"),
        ({"input": "Q", "output": "A", "subject": "S"}, "input/output"),
        ({"text": "### Human: Q ### Assistant: A"}, "text"),
        ({"instruction": "Q", "response": "A"}, "instruction/response"),
        ({"instruction": "Q", "context": "", "response": "A", "category": "qa"}, "instruction/response"),
        ({"prompt": "Q", "completion": "A"}, "prompt/completion"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "sharegpt"),
        ({"messages": "", "conversations": "", "question": "Q", "answer": "A"}, "question/answer"),
        # One file that mixes schemas: Arrow fills the columns that a row lacks with nulls.
        ({"messages": None, "text": None, "question": "Q", "answer": "A"}, "question/answer"),
    ],
)
def test_one_conversation_from_every_schema(row: dict[str, object], schema: str) -> None:
    record = parse(row)
    assert (record.schema, record.messages) == (schema, (USER, ASSISTANT))


def test_alpaca_input_joins_the_instruction() -> None:
    record = parse({"instruction": "Add.", "input": "2, 3", "output": "5"})
    assert record.messages[0]["content"] == "Add.\n\n2, 3"


def test_context_joins_the_instruction() -> None:
    record = parse({"instruction": "Add.", "context": "2, 3", "response": "5"})
    assert record.messages[0]["content"] == "Add.\n\n2, 3"
    assert record.fields == {"instruction": "Add.", "input": "2, 3", "output": "5"}


def test_preference_pairs_are_no_answers_to_learn() -> None:
    with pytest.raises(DataError, match=r"preference pairs .*: expected one answer to learn, found two; --objective dpo"):
        parse({"chosen": "a", "rejected": "b"})


def test_flat_text_is_split_at_its_markers() -> None:
    assert split_turns("Be kind.\n### Human: Hi ### Assistant: Hello\n### Human: Bye ### Assistant:") == (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": ""},
    )
    assert split_turns("A plain text with ### a heading") == ()


def test_unknown_columns_are_listed_with_the_known_ones() -> None:
    known = "; ".join(", ".join(schema.columns) for schema in SCHEMAS.values())
    assert "; instruction, output; " in known
    with pytest.raises(DataError) as caught:
        detect_schema(["title", "body"])
    assert str(caught.value) == (
        "unknown schema: found the columns ['body', 'title']; --columns OURS=THEIRS renames columns; expected all those of "
        f"one of: {known}"
    )
    with pytest.raises(DataError, match=r"null here: \['answer'\]"):
        parse({"question": "Q", "answer": None})


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [
        (["prompt", "reply"], "prompt/completion (--columns completion=reply)"),
        (
            ["prompt", "response"],
            "instruction/response (--columns instruction=prompt), prompt/completion (--columns completion=response)",
        ),
        (["dialogue", "id"], "messages (--columns messages=dialogue), sharegpt (--columns conversations=dialogue)"),
        (["Question", "answer"], "question/answer (--columns question=Question)"),
        (["query", "answer"], "question/answer (--columns question=query)"),
        (["Answers", "question"], "question/answer (--columns answer=Answers)"),
        (["answer", "my question"], "question/answer (--columns 'question=my question')"),
    ],
)
def test_the_nearest_schema_is_named(columns: list[str], nearest: str) -> None:
    with pytest.raises(DataError) as caught:
        detect_schema(columns)
    assert str(caught.value) == f"unknown schema: found the columns {sorted(columns)}; the nearest: {nearest}"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": [3]}, r"column 'text': expected text, found list \[3\]"),
        ({"question": "Q", "answer": {"a": 8.5}}, "column 'answer': expected text, found dict {'a': 8.5}"),
        ([1], r"expected an object with named columns, found list \[1\]"),
        (None, "expected an object with named columns, found null"),
        ({"question": None}, r"expected a row with a value, found nothing but nulls in \['question'\]"),
        ({"messages": "Hi"}, "column 'messages': expected a list of messages, found str"),
        ({"messages": ["Hi"]}, "message 0: expected an object with role and content, found str"),
        (
            {"messages": [{"who": "human", "value": "Hi"}]},
            r"message 0: expected the keys role and content, found \['value', 'who'\]",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            r"message 1: expected .* found \['role'\]",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": []}]},
            "message 1, content: expected text, found list",
        ),
    ],
)
def test_wrong_values(row: dict[str, object], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse(row)
