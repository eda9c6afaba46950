"""Connections that are slow, too many, half-open or no HTTP; the clocks are set to tenths of a second. 2 CPU-seconds."""
# ruff: noqa: E402 - the server's own dependencies may be missing

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from http_server import Client, running, until
from test_http import COMPLETION, check_error, completion, service

from qlora_jax.serve import http_connections

MOST = 8


@pytest.fixture(scope="module")
def client(tiny_llama: Path) -> Iterator[Client]:
    with running(service(tiny_llama), most=MOST) as made:
        yield made


def connect(client: Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.port), timeout=60)


def read(connection: socket.socket) -> tuple[int, Any]:
    """Return (status, body) of an answer after which the server closes the connection; (0, "") for none."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    return (int(head.split(b" ")[1]), json.loads(body)) if data else (0, "")


@pytest.mark.parametrize(
    ("phase", "sent", "status"),
    [
        ("head", b"", 0),
        ("head", b"GET /health HTTP/1.1\r\nHost:", 408),
        ("body", b"POST /health HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", 405),
        ("body", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{", 0),
    ],
)
def test_a_request_has_only_so_much_time(
    client: Client, monkeypatch: pytest.MonkeyPatch, phase: str, sent: bytes, status: int
) -> None:
    """One letter now and then does not prolong it."""
    monkeypatch.setitem(http_connections._SECONDS, phase, 0.3)
    with connect(client) as connection:
        connection.sendall(sent)
        time.sleep(0.15)
        with contextlib.suppress(OSError):
            connection.sendall(sent and b"a")
        found, body = read(connection)
        assert found == status
        if status:
            check_error(body)


def test_the_time_is_that_of_one_request(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(http_connections._SECONDS, "head", 0.3)
    with connect(client) as connection:
        for _ in range(3):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            time.sleep(0.2)


def test_a_client_that_reads_nothing_is_cut_off(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of 12 kB is asked for again and again and never read."""
    monkeypatch.setitem(http_connections._SECONDS, "answer", 0.3)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", client.port))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2000)
        until(lambda: client.connections)
        until(lambda: not client.connections)


def test_connections_beyond_the_limit_are_told_so(client: Client) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(client)) for _ in range(MOST + 1)]
        status, body = read(connections[-1])
        assert status == 503
        check_error(body)
    until(lambda: client.call("GET", "/health")[0] == 200)


def test_a_length_and_chunks_at_once_are_refused(client: Client) -> None:
    """The second request, which the body would smuggle in, is not answered."""
    hidden = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(client) as connection:
        connection.sendall(head % (5 + len(hidden)) + b"0\r\n\r\n" + hidden)
        status, body = read(connection)
    assert status == 400
    assert body["error"]["message"] == "Content-Length and Transfer-Encoding: expected one of them, found both."


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n Folded: b\r\nContent-Length: 3, 4\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length : 3\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /" + b"a" * 80_000,
    ],
)
def test_what_is_no_request_gets_an_error_too(client: Client, sent: bytes) -> None:
    with connect(client) as connection:
        connection.sendall(sent)
        status, body = read(connection)
    assert status == 400
    check_error(body)


def test_counters_and_gauges(client: Client) -> None:
    assert client.call("POST", COMPLETION, completion())[0] == 200
    assert client.call("POST", COMPLETION, b"{")[0] == 400
    page = client.call("GET", "/metrics")[2]
    for kind, name in (("gauge", "qlora_rows"), ("gauge", "qlora_rows_running"), ("counter", "qlora_answer_tokens_total")):
        assert f"# TYPE {name} {kind}" in page
    assert 'qlora_first_token_seconds_count{kind="completion"}' in page
    assert 'qlora_errors_total{status="400"}' in page
