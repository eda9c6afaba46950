"""The server over real connections, with a model that counts: answers, errors, keys, limits. About 8 CPU-seconds.

The model's likeliest token is the last one plus 1, and a token of the tokenizer is a byte, so an answer to "a" is "bcd…".
"""
# ruff: noqa: E402 - the server's own dependencies may be missing

import asyncio
import dataclasses
import hashlib
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from http_server import Client, running, until
from test_engine import Successors, make

from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import encode_prompt
from qlora_jax.errors import OptionError
from qlora_jax.serve import http
from qlora_jax.serve.api_keys import ApiKey, find_key, new_key, read_api_keys
from qlora_jax.serve.grammars import constrain_by
from qlora_jax.serve.http import Manage, Service
from qlora_jax.serve.http_calls import Prepared
from qlora_jax.serve.scheduler import Limits
from qlora_jax.serve.token_text import token_text
from qlora_jax.serve.worker import Worker

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
LIMITS = Limits(rows=2, capacity=128, chunk=32, waiting=6, waiting_per_tenant=6)
KEYS = tuple(
    ApiKey(name, hashlib.sha256(f"sk-{name}".encode()).hexdigest(), frozenset(models))
    for name, models in (("all", ["*"]), ("base", ["counter"]), ("nothing", ["other"]))
)


def service(folder: Path, keys: tuple[ApiKey, ...] | None = None, adapters: tuple[str, ...] = ()) -> Service:
    tokenizer: Any = load_tokenizer(folder)
    size = len(tokenizer)
    constrain = constrain_by(tokenizer, size, [1])
    engine = make(Successors(size), LIMITS, size, tokenizer=tokenizer, constrain=constrain)
    engine.warm_up()
    prepared = Prepared(
        chat=lambda messages, tools: encode_prompt(list(messages), tokenizer, template="chat", tools=tools).tolist(),
        text=lambda text: encode_prompt(text, tokenizer, template="plain").tolist(),
        eos_ids=frozenset([1]),
        capacity=LIMITS.capacity,
    )
    return Service(Worker(engine), "counter", lambda: adapters, prepared, token_text(tokenizer), keys, 4096)


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[tuple[Client, Service]]:
    made = service(tiny_llama)
    with running(made) as client:
        yield client, made


@pytest.fixture
def client(served: tuple[Client, Service]) -> Client:
    return served[0]


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "counter", "prompt": "a", "max_tokens": 4, "temperature": 0} | fields


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"model": "counter", "messages": messages, "max_tokens": 3, "temperature": 0} | fields


def check_error(body: Any) -> None:
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert "Traceback" not in json.dumps(body)


def test_a_completion_and_its_stream_are_the_same(client: Client) -> None:
    status, _, body = client.call("POST", COMPLETION, completion(prompt=["a", "k"], n=2, logprobs=1))
    assert status == 200
    assert [choice["text"] for choice in body["choices"]] == ["bcde", "bcde", "lmno", "lmno"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["logprobs"]["tokens"] == list("bcde")
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18}
    streamed = client.events(
        COMPLETION, completion(prompt=["a", "k"], n=2, stream=True, stream_options={"include_usage": True})
    )
    texts = ["", "", "", ""]
    for event in streamed[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == ["bcde", "bcde", "lmno", "lmno"]
    assert streamed[-1]["usage"] == body["usage"]
    assert streamed[-1]["choices"] == []


def test_a_chat_and_its_stream_are_the_same(client: Client) -> None:
    """The prompt ends with a line break, byte 10, whose successor is byte 11."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    status, _, body = client.call("POST", CHAT, chat(messages=[{"role": "user", "content": parts}], logprobs=True))
    (choice,) = body["choices"]
    assert status == 200
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    assert [token["bytes"] for token in choice["logprobs"]["content"]] == [
        list(text.encode()) for text in choice["message"]["content"]
    ]
    first, *rest = client.events(CHAT, chat(stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in rest) == choice["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in rest][-1] == "length"
    assert all(event["id"] == first["id"] for event in rest)


def test_answers_that_end_in_the_same_step_all_arrive(
    served: tuple[Client, Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The events of all steps come at once, after the last one."""
    client, made = served
    engine = made.worker.engine
    step, held = engine.step, []

    def at_once() -> list[Any]:
        held.extend(step())
        if engine.busy:
            return []
        events, held[:] = list(held), []
        return events

    monkeypatch.setattr(engine, "step", at_once)
    _, _, body = client.call("POST", COMPLETION, completion(n=4))
    assert [choice["text"] for choice in body["choices"]] == ["bcde"] * 4


def test_stop_texts_and_a_bias(client: Client) -> None:
    _, _, body = client.call("POST", COMPLETION, completion(max_tokens=20, stop=["gh", "xyz"]))
    assert [(choice["text"], choice["finish_reason"]) for choice in body["choices"]] == [("bcdef", "stop")]
    token = load_id(client, "z")
    _, _, body = client.call("POST", COMPLETION, completion(logit_bias={str(token): 100}))
    assert body["choices"][0]["text"] == "zzzz"


def load_id(client: Client, text: str) -> int:
    """The token of a character: the prompt of one token is the character before it."""
    _, _, body = client.call("POST", COMPLETION, completion(prompt=chr(ord(text) - 1), max_tokens=1, logprobs=0))
    assert body["choices"][0]["text"] == text
    from tokenizers import pre_tokenizers

    return 3 + sorted(pre_tokenizers.ByteLevel.alphabet()).index(text)


WRONG = [
    (COMPLETION, completion(model="other"), 404, "model", "model_not_found"),
    (COMPLETION, completion(model=3), 400, "model", "invalid_value"),
    (COMPLETION, completion(prompt=None), 400, "prompt", None),
    (COMPLETION, completion(prompt=[1, "a"]), 400, "prompt", "invalid_value"),
    (COMPLETION, completion(prompt=[]), 400, "prompt", "invalid_value"),
    (COMPLETION, completion(prompt=""), 400, "prompt", "invalid_value"),
    (COMPLETION, completion(prompt=[10**6]), 400, None, None),
    (COMPLETION, completion(prompt="a" * 200), 400, None, "context_length_exceeded"),
    (COMPLETION, completion(max_tokens=0), 400, "max_tokens", "invalid_value"),
    (COMPLETION, completion(max_tokens=10**4), 400, None, "context_length_exceeded"),
    (COMPLETION, completion(temperature="hot"), 400, "temperature", "invalid_value"),
    (COMPLETION, completion(temperature=3), 400, "temperature", "invalid_value"),
    (COMPLETION, completion(top_p=0), 400, "top_p", "invalid_value"),
    (COMPLETION, completion(n=0), 400, "n", "invalid_value"),
    (COMPLETION, completion(n=7), 400, None, None),
    (COMPLETION, completion(seed=2**70), 400, "seed", "invalid_value"),
    (COMPLETION, completion(stop=[""]), 400, "stop", "invalid_value"),
    (COMPLETION, completion(logit_bias={"x": 1}), 400, "logit_bias", "invalid_value"),
    (COMPLETION, completion(echo=True), 400, "echo", "unsupported_parameter"),
    (COMPLETION, completion(best_of=4), 400, "best_of", "unsupported_parameter"),
    (COMPLETION, completion(temprature=1), 400, "'temprature'", "unknown_parameter"),
    (COMPLETION, completion(stream_options={}), 400, "stream_options", "invalid_value"),
    (COMPLETION, completion(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
    (CHAT, chat(messages=[]), 400, "messages", "invalid_value"),
    (CHAT, chat(messages=["hi"]), 400, "messages[0]", "invalid_value"),
    (CHAT, chat(messages=[{"role": "king", "content": "a"}]), 400, "messages[0].role", "invalid_value"),
    (CHAT, chat(messages=[{"role": "user", "content": "\ud800"}]), 400, None, None),
    (CHAT, chat(messages=[{"role": "user", "content": [{}]}]), 400, "messages[0].content[0].type", None),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "invalid_value"),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", None),
    (CHAT, b"", 400, None, None),
    (CHAT, b"[1]", 400, None, None),
    (CHAT, b'{"model": NaN}', 400, None, None),
    (CHAT, b'{"model": 1e999}', 400, None, None),
    (CHAT, b'{"model": ' + b"9" * 4090 + b"}", 413, None, "request_too_large"),
    (CHAT, b"\xff\xfe{", 400, None, None),
    (CHAT, b"[" * 4000, 400, None, None),
    (CHAT, b'{"a":' * 500 + b"1" + b"}" * 500, 400, None, None),
    (CHAT, b'{"a": "' + b"x" * 5000 + b'"}', 413, None, "request_too_large"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_request_gets_an_error_of_openai_s_shape(
    client: Client, path: str, body: Any, status: int, param: Any, code: Any
) -> None:
    found, _, answer = client.call("POST", path, body)
    assert found == status, answer
    check_error(answer)
    assert (answer["error"]["param"], answer["error"]["code"]) == (param, code)


def test_paths_and_methods_that_are_not_there(client: Client) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("GET", "/v1/models/other", 404)):
        found, _, body = client.call(method, path)
        assert found == status
        check_error(body)


def test_a_body_without_its_length_is_limited_too(client: Client) -> None:
    part = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    assert b" 413 " in client.raw(head + part + part)


def test_what_two_servers_could_understand_in_two_ways_is_refused(client: Client) -> None:
    for lines in (b"Content-Length: 3\r\nContent-Length: 4", b"Content-Length: -1", b"Transfer-Encoding: chunked, identity"):
        answer = client.raw(b"POST /v1/completions HTTP/1.1\r\nHost: here\r\n" + lines + b"\r\n\r\n{}  ")
        assert answer.split(b"\r\n")[0].split(b" ")[1] in (b"400", b"501")


def test_bodies_of_any_kind_crash_nothing(served: tuple[Client, Service]) -> None:
    client, made = served
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    known = {
        *completion(),
        *chat(),
        "top_p",
        "n",
        "stop",
        "seed",
        "stream",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "tools",
    }
    names = st.sampled_from(
        sorted({*known, "response_format", "stream_options", "min_p", "top_k", "user", "presence_penalty"})
    )

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from([CHAT, COMPLETION]), st.dictionaries(names, values, max_size=3))
    def check(path: str, fields: dict[str, Any]) -> None:
        status, _, body = client.call("POST", path, (chat if path == CHAT else completion)(**fields))
        assert status in (200, 400, 429)
        if status != 200:
            check_error(body)

    check()
    until(lambda: not made.worker.engine.busy)
    assert client.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(
    served: tuple[Client, Service], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """In the middle of a stream, and while it waits for the whole. The engine stands still then: the answer cannot end."""
    client, made = served
    engine, step, allowed = made.worker.engine, made.worker.engine.step, 0

    def limited() -> list[Any]:
        if engine.counts.answer_tokens < allowed:
            return step()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(engine, "step", limited)
    body = json.dumps(completion(max_tokens=120, stream=stream)).encode()
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        allowed = engine.counts.answer_tokens + 3
        with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
            connection.sendall(head + body)
            until(lambda least=allowed: engine.counts.answer_tokens >= least and engine.scheduler.running())
            assert not stream or connection.recv(10) == b"HTTP/1.1 2"
        until(lambda: not engine.scheduler.running())
    monkeypatch.undo()
    until(lambda: not engine.busy and not made.worker._listeners)


def test_a_full_queue_answers_later(served: tuple[Client, Service]) -> None:
    client, made = served
    # Each prompt fills the queue for hundreds of steps, so that one of the next finds it full, however slow the server is.
    status, headers, body = client.call("POST", COMPLETION, completion(prompt=["a"] * 8, n=6, max_tokens=100))
    assert status == 429
    assert headers["Retry-After"] == "1"
    check_error(body)
    until(lambda: not made.worker.engine.busy)


def test_health_metrics_and_models(client: Client) -> None:
    assert client.call("GET", "/ready")[2] == {"status": "ready"}
    assert "qlora_rows 2.0" in client.call("GET", "/metrics")[2]
    _, _, models = client.call("GET", "/v1/models")
    assert [model["id"] for model in models["data"]] == ["counter"]
    assert client.call("GET", "/v1/models/counter")[2]["object"] == "model"


def test_a_key_opens_its_models_and_no_others(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG"), running(service(tiny_llama, KEYS, ("other",))) as client:

        def models(name: str) -> list[str]:
            _, _, body = client.call("GET", "/v1/models", Authorization=f"Bearer sk-{name}")
            return [model["id"] for model in body["data"]]

        assert [models(key.name) for key in KEYS] == [["counter", "other"], ["counter"], ["other"]]
        for headers in (
            {},
            {"Authorization": "Bearer sk-wrong"},
            {"Authorization": "Basic sk-all"},
            {"Authorization": "Bearer"},
        ):
            status, found, body = client.call("POST", COMPLETION, completion(), **headers)
            assert status == 401
            assert found["WWW-Authenticate"] == "Bearer"
            check_error(body)
        assert client.call("POST", COMPLETION, completion(prompt="secret"), Authorization="Bearer sk-base")[0] == 200
        status, _, missing = client.call("POST", COMPLETION, completion(), Authorization="Bearer sk-nothing")
        assert status == 404
        _, _, unknown = client.call("POST", COMPLETION, completion(model="x"), Authorization="Bearer sk-nothing")
        assert missing == unknown  # a client does not learn what others have
    assert "tenant='base'" in caplog.text
    assert "sk-" not in caplog.text
    assert "secret" not in caplog.text


def test_a_failure_of_the_engine_ends_what_runs_and_refuses_the_rest(tiny_llama: Path) -> None:
    made = service(tiny_llama)

    def fail() -> Any:
        raise RuntimeError("the device is gone, and this text is for the log alone")

    with running(made) as client:
        made.worker.engine.step = fail  # pyright: ignore[reportAttributeAccessIssue]
        status, _, body = client.call("POST", COMPLETION, completion())
        assert status == 500
        check_error(body)
        assert "log alone" not in json.dumps(body)
        assert client.call("POST", COMPLETION, completion())[0] == 503
        assert client.call("GET", "/health")[0] == 503
        assert client.call("GET", "/ready")[0] == 503


def test_the_file_of_keys(tmp_path: Path) -> None:
    key, lines = new_key("alice", ("a", "b"))
    path = tmp_path / "keys.toml"
    odd = 'bob "\\" é'
    path.write_text(lines + new_key(odd)[1], encoding="utf-8")
    keys = read_api_keys(path)
    assert [(one.name, sorted(one.models)) for one in keys] == [("alice", ["a", "b"]), (odd, ["*"])]
    with pytest.raises(ValueError, match="expected a text that can be printed"):
        new_key("a\nb")
    found = find_key(keys, key)
    assert found is not None
    assert found.name == "alice"
    assert find_key(keys, key + "x") is None
    assert key not in path.read_text()
    for text, message in (
        ("", r"expected tables \[\[key\]\]"),
        ("[[key]]\nname = 'a'", "key 1: expected models, name, sha256, found"),
        (
            f"[[key]]\nname = 'a'\nsha256 = '{key}'\nmodels = []",
            "sha256: expected 64 hexadecimal digits, found another text",
        ),
        (lines + lines, "twice"),
        ("[[key", "expected TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as raised:
            read_api_keys(path)
        assert key not in str(raised.value)


def test_adapters_come_and_go_for_keys_of_all_models_only(tiny_llama: Path) -> None:
    names: dict[str, str] = {}

    def load(name: str, path: str) -> None:
        if path == "outside":
            raise OptionError("lora_path: expected a folder within the folder of adapters")
        names[name] = path

    made = dataclasses.replace(
        service(tiny_llama, KEYS), manage=Manage(load, lambda name: names.pop(name) and None), adapters=lambda: list(names)
    )
    with running(made) as client:

        def call(path: str, key: str, **body: Any) -> tuple[int, Any]:
            status, _, answer = client.call("POST", f"/v1/{path}_lora_adapter", body, Authorization=f"Bearer sk-{key}")
            return status, answer

        assert call("load", "base", lora_name="x", lora_path="here")[0] == 403
        assert call("load", "all", lora_name="x", lora_path="outside")[0] == 400
        assert call("load", "all", lora_name="x")[0] == 400
        assert call("load", "all", lora_name="x", lora_path="here") == (200, "Success: LoRA adapter 'x' added successfully.")
        status, _, answer = client.call("GET", "/v1/models", Authorization="Bearer sk-all")
        assert (status, [model["id"] for model in answer["data"]]) == (200, ["counter", "x"])
        assert call("unload", "all", lora_name="x")[0] == 200
        assert names == {}


def test_adapters_do_not_come_and_go_unless_enabled(client: Client) -> None:
    assert client.call("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"})[0] == 404


def test_a_client_that_does_not_read_its_stream_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def parts() -> AsyncIterator[str]:
        while True:
            yield "data: 1\n\n"

    async def never(*_: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(http, "_SEND_SECONDS", 0.05)
    ended: list[bool] = []
    stream = http._Stream(parts(), lambda: ended.append(True), {})
    for version in ("2.3", "2.4"):
        asyncio.run(stream({"type": "http", "asgi": {"spec_version": version}}, never, never))
    assert ended == [True, True]
