"""Parts of a content that are no text: the same rows as the same conversation in OpenAI's keys."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode, encode_all, read_chat_template
from qlora_jax.data.schemas import parse

USER, ANSWER = {"role": "user", "content": "Lima?"}, {"role": "assistant", "content": "Dry."}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
USED = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Lima"}}
CALLED = {"id": "t1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
RESULT = {"role": "tool", "tool_call_id": "t1", "content": "sun"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def said(*parts: Any, role: str = "assistant") -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (
            [USER, said({"type": "thinking", "thinking": "A desert.", "signature": "x"}, text("Dry."))],
            [USER, ANSWER | {"reasoning_content": "A desert."}],
        ),
        (
            [USER, said({"type": "thinking", "thinking": [text("A "), text("desert.")], "closed": True}, text("Dry."))],
            [USER, ANSWER | {"reasoning_content": "A desert."}],
        ),
        (
            [USER, said({"type": "reasoning", "text": "One."}, {"type": "reasoning", "reasoning": "Two."}, "Dry.")],
            [USER, ANSWER | {"reasoning_content": "One.\n\nTwo."}],
        ),
        (
            [USER, said({"type": "thinking", "thinking": "Two."}, text("Dry.")) | {"reasoning_content": "One."}],
            [USER, ANSWER | {"reasoning_content": "One.\n\nTwo."}],
        ),
        (
            [
                USER,
                said(USED),
                said({"type": "tool_result", "content": "sun"}, role="tool") | {"tool_call_id": "t1", "name": "f"},
                ANSWER,
            ],
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT | {"name": "f"}, ANSWER],
        ),
        (
            [
                USER,
                said(text("I look."), USED),
                said({"type": "tool_result", "tool_use_id": "t1", "content": [text("sun")]}, text("So?"), role="user"),
                ANSWER,
            ],
            [
                USER,
                {"role": "assistant", "content": "I look.", "tool_calls": [CALLED]},
                RESULT,
                USER | {"content": "So?"},
                ANSWER,
            ],
        ),
        (
            [USER, said(USED), said({"type": "tool_result", "tool_use_id": "t1", "content": "sun"}, role="user"), ANSWER],
            [USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, RESULT, ANSWER],
        ),
    ],
)
def test_parts_are_keys_and_messages(
    bare: PreTrainedTokenizerFast, messages: list[dict[str, Any]], expected: list[dict[str, Any]]
) -> None:
    tools = [{"name": "weather", "description": "Of a city.", "input_schema": PARAMETERS}]
    function = {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}
    record = parse({"messages": messages, "tools": tools})
    assert list(record.messages) == expected
    assert record.tools == ({"type": "function", "function": function},)
    bare.chat_template = read_chat_template("chatml", bare)
    try:
        found = encode({"messages": messages, "tools": tools}, bare)
        other = encode({"messages": expected, "tools": list(record.tools)}, bare)
    finally:
        bare.chat_template = None
    np.testing.assert_array_equal(found.tokens, other.tokens)
    np.testing.assert_array_equal(found.loss_mask, other.loss_mask)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "tool_use"}], "message 1, tool_calls: expected a function with a name"),
        ([{"type": "thinking"}], "message 1, content, part 0: expected a part of the type text, found 'thinking'"),
        (
            [{"type": "thinking", "thinking": [1]}, text("Dry.")],
            "part 0: expected a part of the type text, found 'thinking'",
        ),
        ([text("Dry."), {"type": "image_url"}], "part 1: expected a part of the type text, found 'image_url'"),
        ([{"type": ["thinking"]}], "message 1, content, part 0: expected a part of the type text"),
    ],
)
def test_parts_that_are_not_known(bare: PreTrainedTokenizerFast, content: list[Any], message: str) -> None:
    row = {"messages": [USER, said(*content)]}
    with pytest.raises(
        DataError, match=rf"row 0 \(counted from 0\): column 'messages', {message}" if message[0] == "m" else message
    ):
        encode_all([row], bare, max_length=99, progress=False)


def test_a_system_message_in_parts() -> None:
    row = {"system": [text("Be "), text("brief.")], "messages": [USER, ANSWER]}
    assert parse(row).messages == ({"role": "system", "content": "Be brief."}, USER, ANSWER)
