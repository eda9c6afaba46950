"""Tools over real connections: calls in answers, whole and streamed, calls that are forced, and what is refused.

About 4 CPU-seconds.
"""
# ruff: noqa: E402 - the server's own dependencies may be missing

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from http_server import Client, running
from scripted import Scripts, scripted
from test_http import CHAT, chat, check_error, service

CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": CITY}}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ANSWERED: list[Any] = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "7 degrees"},
]
TWO = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[tuple[Client, Scripts]]:
    made = scripted(tiny_llama, TWO, "7 <tool_call degrees.")
    with running(made.service) as client:
        yield client, made


def body(messages: list[Any], **fields: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": messages, "temperature": 0, "max_tokens": 200} | fields


def joined(events: list[Any]) -> dict[str, Any]:
    """Return the message of a stream."""
    content, calls = "", []
    for event in events:
        delta = event["choices"][0]["delta"]
        content += delta.get("content") or ""
        for part in delta.get("tool_calls", ()):
            if part["index"] == len(calls):
                calls.append({"name": part["function"]["name"], "arguments": "", "id": part["id"]})
            calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return {"content": content, "calls": [(call["name"], call["arguments"]) for call in calls]}


def test_calls_whole_and_streamed(served: tuple[Client, Scripts]) -> None:
    client, made = served
    asked = body(made.messages(0, TOOLS), tools=TOOLS, logprobs=True)
    status, _, answer = client.call("POST", CHAT, asked)
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    calls = choice["message"]["tool_calls"]
    expected = [("weather", '{"city": "Rome"}'), ("now", "{}")]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == expected
    assert all(call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == 2
    events = client.events(CHAT, asked | {"stream": True})
    assert joined(events) == {"content": "I look.", "calls": expected}
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "tool_calls"
    tokens = [one for event in events for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert tokens == choice["logprobs"]["content"]
    arguments = [event for event in events if "arguments" in json.dumps(event)]
    assert len(arguments) > 10  # they come as they are written
    _, _, one = client.call("POST", CHAT, asked | {"parallel_tool_calls": False})
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1


def test_a_tool_s_result_is_answered_by_text(served: tuple[Client, Scripts]) -> None:
    client, made = served
    asked = body(made.messages(1, TOOLS, ANSWERED), tools=TOOLS)
    _, _, answer = client.call("POST", CHAT, asked)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"] == {"role": "assistant", "content": "7 <tool_call degrees.", "refusal": None}
    assert joined(client.events(CHAT, asked | {"stream": True})) == {"content": "7 <tool_call degrees.", "calls": []}


def test_without_a_choice_to_call_the_text_stays_as_it_is(served: tuple[Client, Scripts]) -> None:
    client, made = served
    _, _, answer = client.call("POST", CHAT, body(made.messages(0), tools=TOOLS, tool_choice="none"))
    assert answer["choices"][0]["message"]["content"] == TWO


def test_calls_that_are_forced_obey_the_schema(served: tuple[Client, Scripts]) -> None:
    """The model would write something else: it draws each token at a high temperature."""
    pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")
    client, made = served
    messages = made.messages(1, TOOLS)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, fields in ((named, {}), ("required", {"parallel_tool_calls": False}), ("required", {"stream": True})):
        asked = body(messages, tools=TOOLS, tool_choice=choice, temperature=2, seed=5, max_tokens=900, **fields)
        if "stream" in fields:
            events = client.events(CHAT, asked)
            calls, finish = joined(events)["calls"], events[-1]["choices"][0]["finish_reason"]
        else:
            _, _, answer = client.call("POST", CHAT, asked)
            (one,) = answer["choices"]
            found = [call["function"] for call in one["message"]["tool_calls"]]
            calls, finish = [(call["name"], call["arguments"]) for call in found], one["finish_reason"]
            assert len(calls) == 1
        assert finish == "tool_calls"
        for name, arguments in calls:
            assert name == "weather" or choice == "required"
            assert json.loads(arguments) in ([{"city": "Rome"}, {"city": "Oslo"}] if name == "weather" else [{}])


def test_markers_that_are_special_tokens(tiny_llama: Path) -> None:
    made = scripted(tiny_llama, TWO, special=("<tool_call>", "</tool_call>"))
    with running(made.service) as client:
        asked = body(made.messages(0, TOOLS), tools=TOOLS)
        _, _, answer = client.call("POST", CHAT, asked)
        assert answer["choices"][0]["message"]["content"] == "I look."
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 2


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": {}}, "tools"),
    ({"tools": [3]}, "tools[0]"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "tools[0].function.parameters"),
    ({"tools": [NOW, NOW]}, "tools"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": []}, "functions"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    *(
        (
            {"messages": [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": written}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        )
        for written in ("[1]", '{"a": "\\ud800"}', '{"a": NaN}', '{"a": 1e999}', '{"a": ' * 80 + "1" + "}" * 80)
    ),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=range(len(WRONG)))
def test_wrong_tools_are_refused(served: tuple[Client, Scripts], fields: dict[str, Any], param: str) -> None:
    status, _, answer = served[0].call("POST", CHAT, body([{"role": "user", "content": "a"}]) | fields)
    assert status == 400, answer
    check_error(answer)
    assert answer["error"]["param"] == param


def test_a_schema_that_cannot_be_obeyed_is_refused(served: tuple[Client, Scripts]) -> None:
    pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": 3}}}},
    }
    asked = body([{"role": "user", "content": "a"}], tools=[tool], tool_choice="required")
    status, _, answer = served[0].call("POST", CHAT, asked)
    assert status == 400
    check_error(answer)


def test_a_template_without_tools_is_refused(tiny_llama: Path) -> None:
    with running(service(tiny_llama)) as client:
        for fields in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "required"}, {"messages": ANSWERED}):
            status, _, answer = client.call("POST", CHAT, chat(**fields))
            assert status == 400
            check_error(answer)
            assert "the chat template of this model has no tools" in answer["error"]["message"]
        assert client.call("POST", CHAT, chat(tools=TOOLS, tool_choice="none"))[0] == 200
