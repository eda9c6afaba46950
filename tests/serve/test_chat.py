"""The chat in a terminal, and its client, against a server whose model counts. About 3 CPU-seconds."""
# ruff: noqa: E402 - the server's own dependencies may be missing

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for name in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(name, reason=f"{name}, for the server, is not installed")

from http_server import Client as Server
from http_server import running, until
from rich.console import Console
from test_http import KEYS, service

from qlora_jax.commands import chat
from qlora_jax.serve.client import Client, ServerError
from qlora_jax.serve.http import Service

FIELDS: dict[str, Any] = {"temperature": 0, "max_tokens": 33}


@pytest.fixture(scope="module")
def served(tiny_llama: Path) -> Iterator[tuple[Server, Service]]:
    made = service(tiny_llama, KEYS)
    with running(made) as server:
        yield server, made


@pytest.fixture
def client(served: tuple[Server, Service]) -> Client:
    return Client(f"http://127.0.0.1:{served[0].port}", "sk-base")


@pytest.fixture
def answer(client: Client) -> str:
    """What the model says to everything, because every prompt ends alike."""
    text = "".join(client.ask("counter", [{"role": "user", "content": "a"}], **FIELDS))
    assert "\x0b" in text
    return chat._printable(text)


def talk(client: Client, monkeypatch: pytest.MonkeyPatch, *lines: str, terminal: bool = False, **options: Any) -> str:
    """Return what is shown of a chat with these lines."""
    left = list(lines)

    def read(_: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", read)
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=100, highlight=False)
    chat.Chat(client, chat.Options(**FIELDS, **options), console).run()
    return shown.getvalue()


def test_a_conversation_its_commands_and_its_file(
    client: Client, answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ["hi", "/system Be brief.", f"/save {file}", "/clear", "ho", f"/save {file}", "/tenant", "/tenant x", "/nothing"]
    shown = talk(client, monkeypatch, *lines, "/help")
    assert shown.count(answer) == 2
    assert "\x0b" not in shown  # what could give orders to the terminal
    first, second = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    assert chat._printable(first[2]["content"]) == answer
    assert [message["content"] for message in second[:2]] == ["Be brief.", "ho"]
    assert "* counter" in shown
    assert "error: tenant: expected one of counter, found x" in shown
    assert "error: /nothing: expected a command as /help shows them" in shown
    assert "/tenant NAME" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_two_answers_side_by_side(client: Client, answer: str, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    shown = talk(client, monkeypatch, "hi", "/clear", "/compare", "hi", terminal=terminal, compare=True)
    assert shown.count(answer) >= 3
    assert terminal or shown.count("[counter]") == 2


def test_a_signal_stops_the_answer_and_not_the_chat(
    served: tuple[Server, Service], client: Client, answer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The engine stands still after some tokens, so that the answer cannot end before the signal comes."""
    engine = served[1].worker.engine
    step, most = engine.step, engine.counts.answer_tokens + 25
    stalled = threading.Event()

    def limited() -> list[Any]:
        if engine.counts.answer_tokens < most or stalled.is_set():
            return step()
        time.sleep(0.001)
        return []

    monkeypatch.setattr(engine, "step", limited)

    def interrupt() -> None:
        until(lambda: engine.counts.answer_tokens >= most)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        stalled.set()

    thread = threading.Thread(target=interrupt)
    thread.start()
    file = tmp_path / "rows.jsonl"
    shown = talk(client, monkeypatch, "hi", f"/save {file}", "again")
    thread.join()
    assert "stopped" in shown
    assert answer in shown  # the next one is answered
    (_, stopped) = json.loads(file.read_text())["messages"]
    assert answer.startswith(chat._printable(stopped["content"]))
    assert len(chat._printable(stopped["content"])) < len(answer)
    until(lambda: not engine.busy)


def test_errors_of_the_server_have_their_words(served: tuple[Server, Service]) -> None:
    url = f"http://127.0.0.1:{served[0].port}/v1/"
    with pytest.raises(ServerError, match="Incorrect API key provided"):
        Client(url, "sk-wrong").models()
    with pytest.raises(ServerError, match="does not exist, or you do not have access to it"):
        Client(url, "sk-base").ask("x", [{"role": "user", "content": "a"}])
    with pytest.raises(ServerError, match="the server cannot be reached"):
        Client("http://127.0.0.1:1").models()
    for wrong in ("127.0.0.1:8000", "ftp://a", "http://a:x", "http://"):
        with pytest.raises(ValueError, match="url: expected an address"):
            Client(wrong)
