"""OpenAI's own client against the server: chat, streams, log probabilities, JSON schemas, tools, models and errors.

About 7 CPU-seconds.
"""
# ruff: noqa: E402 - the server's own dependencies may be missing

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")
openai = pytest.importorskip("openai", reason="openai, a client of the server, is not installed")

from http_server import running
from scripted import scripted
from test_http import KEYS, service
from test_http_tools import ANSWERED, TOOLS, TWO, joined

pytestmark = pytest.mark.integration
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def port(tiny_llama: Path) -> Iterator[int]:
    with running(service(tiny_llama, KEYS)) as client:
        yield client.port


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-all", max_retries=0) as made:
        yield made


def test_chat_and_its_stream(client: Any) -> None:
    asked: dict[str, Any] = {"model": "counter", "messages": HI, "max_completion_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, seed=3, user="me")
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == whole.usage.completion_tokens == 5
    assert choice.logprobs.content[0].top_logprobs[0].token == choice.logprobs.content[0].token
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == choice.message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    text = choice.message.content
    with client.chat.completions.stream(**asked, stop=text[3]) as helper:  # which takes no answer that was cut off
        assert helper.get_final_completion().choices[0].message.content == text[:3]


def test_completions(client: Any) -> None:
    asked: dict[str, Any] = {"model": "counter", "prompt": "a", "max_tokens": 4, "temperature": 0, "stop": "e"}
    whole = client.completions.create(**asked, logprobs=2, n=2)
    assert [choice.text for choice in whole.choices] == ["bcd", "bcd"]
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == "bcd"


def test_a_json_schema(client: Any) -> None:
    pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    answer = client.chat.completions.create(
        model="counter",
        messages=HI,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"ok"}


def test_a_json_schema_and_log_probabilities_in_a_stream(client: Any) -> None:
    """The helper reads the JSON that it has asked for, and keeps the log probability of every token."""
    pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")
    pydantic = pytest.importorskip("pydantic", reason="pydantic, which comes with openai, is not installed")
    reply = pydantic.create_model("Reply", ok=(bool, ...), size=(Literal["small", "large"], ...))
    asked: dict[str, Any] = {"model": "counter", "messages": HI, "max_tokens": 80, "temperature": 0}
    with client.chat.completions.stream(**asked, response_format=reply, logprobs=True, top_logprobs=1) as stream:
        (choice,) = stream.get_final_completion().choices
    assert isinstance(choice.message.parsed, reply)
    assert choice.finish_reason == "stop"
    written = b"".join(bytes(token.bytes) for token in choice.logprobs.content if not token.token.startswith("<|"))
    assert written.decode() == choice.message.content
    whole = client.chat.completions.parse(**asked, response_format=reply, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == choice.message.content
    assert [token.logprob for token in whole.choices[0].logprobs.content] == [one.logprob for one in choice.logprobs.content]


def test_tools(tiny_llama: Path) -> None:
    """A conversation as programs have it: a question, calls, their results, an answer."""
    made = scripted(tiny_llama, TWO, "It is 7 degrees.")
    with (
        running(made.service) as server,
        openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none") as client,
    ):
        asked: dict[str, Any] = {"model": "scripted", "tools": TOOLS, "temperature": 0, "max_tokens": 200}
        (choice,) = client.chat.completions.create(messages=made.messages(0, TOOLS), **asked).choices
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
        assert (choice.finish_reason, calls) == ("tool_calls", [("weather", {"city": "Rome"}), ("now", {})])
        with client.chat.completions.stream(messages=made.messages(0, TOOLS), **asked) as stream:
            (streamed,) = stream.get_final_completion().choices
        found = [(call.function.name, json.loads(call.function.arguments)) for call in streamed.message.tool_calls]
        assert (streamed.finish_reason, streamed.message.content, found) == ("tool_calls", "I look.", calls)
        chunks = list(client.chat.completions.create(messages=made.messages(0, TOOLS), stream=True, **asked))
        assert joined([chunk.model_dump(exclude_none=True) for chunk in chunks])["content"] == "I look."
        results = [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in choice.message.tool_calls]
        before = [ANSWERED[0], choice.message.model_dump(exclude_none=True), *results]
        (last,) = client.chat.completions.create(messages=made.messages(1, TOOLS, before), **asked).choices
        assert (last.finish_reason, last.message.content) == ("stop", "It is 7 degrees.")
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            client.chat.completions.create(messages=HI, **asked | {"tools": openai.omit}, tool_choice="required")


def test_models_and_errors(client: Any, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["counter"]
    assert client.models.retrieve("counter").object == "model"
    for error, fields in (
        (openai.NotFoundError, {"model": "other", "messages": HI}),
        (openai.BadRequestError, {"model": "counter", "messages": []}),
        (openai.BadRequestError, {"model": "counter", "messages": HI, "max_tokens": 10**6}),
        (openai.BadRequestError, {"model": "counter", "messages": HI, "extra_body": {"nobody": 1}}),
    ):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**fields)
        assert raised.value.type == "invalid_request_error"
    assert raised.value.code == "unknown_parameter"
    stranger = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-wrong")
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
