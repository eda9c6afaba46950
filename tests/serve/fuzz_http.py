"""Send malformed requests to a server: each gets a proper answer, nothing leaks, and nothing stays behind.

    python tests/serve/fuzz_http.py --requests 10000 --seed 1

Requests start as valid ones. Then parts of their JSON are replaced, dropped, doubled, renamed or nested, bytes of their text
or of the whole request are changed, and keys are right, wrong, missing or those of others. Each must get a status below 500
(or 503) and, if it is an error, OpenAI's shape; the log must contain neither keys nor texts; afterwards no answer may run.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import http.client
import json
import logging
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from http_server import Client, running, until
from scripted import scripted

from qlora_jax.serve.api_keys import ApiKey

SECRET = "the-secret-of-a-text"
KEYS = tuple(ApiKey.of(name, f"sk-{name}-3141592653", models) for name, models in (("all", ("*",)), ("other", ("other",))))
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
MESSAGES = [
    {"role": "system", "content": SECRET},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "7 degrees"},
]
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "null"}}}},
}
ASKED = {"model": "scripted", "messages": MESSAGES[:2], "max_tokens": 4}
PROMPT = {"model": "scripted", "prompt": [3, 4], "max_tokens": 3}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, ASKED | {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto"}),
    (CHAT, ASKED | {"response_format": SCHEMA}),
    (CHAT, ASKED | {"tools": [TOOL], "tool_choice": "required"}),
    (CHAT, ASKED | {"logprobs": True, "top_logprobs": 2}),
    (COMPLETION, PROMPT | {"prompt": [SECRET, "b"], "n": 2, "stop": ["x"], "logprobs": 1}),
    (COMPLETION, PROMPT | {"stream": True, "stream_options": {"include_usage": True}}),
    (COMPLETION, PROMPT | {"model": "other", "logit_bias": {"5": 1}, "seed": 3, "top_p": 0.5}),
]
ODD: list[Any] = [
    None, True, 0, -1, 3, 1.5, 1e308, -(10**30), 2**63, "", "a", "\ud800", "\0", "é" * 50, [], {}, [[]], [None], {"a": 1},
    "text", "user", "tool", "required", "none", "{", '{"type": "object"}',
    {"type": "regex", "pattern": "("}, {"$ref": "#"}, 0.0,
    {"type": "grammar", "grammar": "start: start"}, {"type": "json_object"}, [1, "a"], "<tool_call>", "<|im_end|>", "NaN",
    "x" * 3000,
]  # fmt: skip
EXTRA = [b"Origin: http://evil.example", b"Expect: 100-continue", b"Transfer-Encoding: chunked", b"A: " + b"a" * 9000]
STATUSES = {200, 400, 401, 403, 404, 405, 408, 413, 429, 503}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return (the object or list, the key) of every value inside."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def change(draw: random.Random, body: dict[str, Any]) -> None:
    """Change one place of a body."""
    parent, key = draw.choice(places(body) or [(body, "model")])
    kind = draw.randrange(6)
    if kind == 0 and isinstance(parent, dict):
        parent.pop(key, None)
    elif kind == 1 and isinstance(parent, dict):
        parent[draw.choice(["", "nobody", "messages", "n", "stream", "tools", "\ud800", "response_format"])] = draw.choice(
            ODD
        )
    elif kind == 2:
        for _ in range(draw.choice([1, 5, 70, 200])):
            parent[key] = [parent.get(key) if isinstance(parent, dict) else parent[key]]
    elif kind == 3 and isinstance(parent, list):
        parent.extend(copy.deepcopy(parent) * draw.choice([1, 20]))
    else:
        parent[key] = copy.deepcopy(draw.choice(ODD))


def damage(draw: random.Random, data: bytes) -> bytes:
    """Change some bytes."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) + 1)
        piece = draw.choice([b"", b"\0", b"\r\n", b"\xff", b"{", b'"', b"9" * 30, b": ", bytes([draw.randrange(256)])])
        found[at : at + draw.randrange(4)] = piece
    return bytes(found)


def make_request(draw: random.Random) -> tuple[bytes, bool]:
    """Return (the bytes of a request, whether they are HTTP, so that the server can tell where they end)."""
    path, valid = draw.choice(BODIES)
    body = copy.deepcopy(valid)
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        change(draw, body)
    data = json.dumps(body).encode()
    if draw.random() < 0.2:
        data = damage(draw, data)
    key = draw.choice([b"sk-all-3141592653"] * 20 + [b"sk-other-3141592653", b"sk-wrong-3141592653", b"", b"\xe9" * 8])
    lines = [b"Host: here", b"Content-Length: %d" % len(data)]
    if draw.random() < 0.98:
        lines.append(b"Authorization: " + draw.choice([b"Bearer "] * 30 + [b"Basic "]) + key)
    method = draw.choice([b"POST"] * 40 + [b"GET", b"PUT", b"OPTIONS"])
    path = draw.choice([path] * 40 + ["/v1/models", "/v1/models/%00", "/v1/load_lora_adapter", "/", "/v1/%ff", "/metrics"])
    if draw.random() < 0.1:
        lines.append(draw.choice(EXTRA))
    head = method + b" " + path.encode() + b" HTTP/1.1\r\n" + b"\r\n".join(lines) + b"\r\n\r\n"
    if draw.random() < 0.1:
        return damage(draw, head) + data, False
    return head + data, True


def send(port: int, data: bytes, *, whole: bool) -> tuple[int, bytes]:
    """Return (status, body); status 0: the server has closed the connection without a word.

    Args:
        port: of the server.
        data: what is sent.
        whole: whether the server can tell where the request ends; otherwise the connection is closed after it.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        if not whole:
            connection.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(connection)
        with contextlib.suppress(http.client.HTTPException):
            response.begin()
            return response.status, response.read()
    return 0, b""


def check_answer(status: int, body: bytes, *, whole: bool) -> str:
    """Return what is wrong with an answer; "": nothing."""
    if status == 0:
        return "no answer" if whole else ""
    if status not in STATUSES:
        return f"status {status}"
    if b"Traceback" in body or b"qlora_jax/" in body:
        return "the program shows"
    if status >= 400:
        try:
            error = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            return "no error of OpenAI's shape"
        if error.keys() != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
            return "no error of OpenAI's shape"
    return ""


class Records(logging.Handler):
    """What would be written to the log."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


def fuzz(folder: Path, requests: int, seed: int) -> collections.Counter[int]:
    """Send so many requests; return how often each status was answered.

    Raises:
        AssertionError: an answer was wrong, something leaked, or something stayed behind.
    """
    made = scripted(folder, "one")
    service = dataclasses.replace(made.service, keys=KEYS, adapters=lambda: ("other",))
    statuses: collections.Counter[int] = collections.Counter()
    records = Records()
    logging.getLogger("qlora_jax").addHandler(records)
    try:
        with running(service) as client:
            send_all(client, requests, seed, statuses)
            until(lambda: not service.worker.engine.busy and not service.worker._listeners)
            assert service.worker.failure is None
            until(lambda: not client.connections)
    finally:
        logging.getLogger("qlora_jax").removeHandler(records)
    log = "\n".join(records.texts)
    assert "sk-" not in log
    assert SECRET not in log
    assert "3141592653" not in log
    return statuses


def send_all(client: Client, requests: int, seed: int, statuses: collections.Counter[int]) -> None:
    """Send the requests and check their answers."""
    for number in range(requests):
        data, whole = make_request(random.Random(f"{seed}.{number}"))
        status, body = send(client.port, data, whole=whole)
        statuses[status] += 1
        problem = check_answer(status, body, whole=whole)
        assert not problem, f"request {number} of seed {seed}: {problem}: {data!r}: {body!r}"
        if number % 500 == 0:
            assert client.call("GET", "/health")[0] == 200
            print(f"{number} requests", file=sys.stderr)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    from tiny_models import write_tiny_llama

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        statuses = fuzz(write_tiny_llama(Path(folder) / "tiny"), options.requests, options.seed)
    print(json.dumps({"requests": options.requests, "seed": options.seed, "statuses": dict(sorted(statuses.items()))}))
    print(f"{time.perf_counter() - start:.0f} seconds", file=sys.stderr)


if __name__ == "__main__":
    main()
