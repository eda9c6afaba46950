"""An endpoint like OpenAI's for tests of `judge`, which fails in all the ways that endpoints fail."""

import contextlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What may go wrong, and how often of a hundred requests.
CHAOS = {
    "status 500": 6,
    "status 429": 8,
    "status 429, Retry-After": 6,
    "status 503, a date": 3,
    "stall": 3,
    "drip": 3,
    "close": 4,
    "half a body": 4,
    "huge": 3,
    "no JSON": 4,
    "no choices": 3,
    "no verdict": 8,
    "redirect": 2,
    "the key": 3,
}


class JudgeServer(ThreadingHTTPServer):
    """A server that prefers the longer answer.

    Attributes:
        replies: how many requests ended in which way; "judged" is a proper reply.
        asked: the requests with a proper reply, by the text of the question and the answers.
        pause: the seconds that each request takes.
        keys: the headers of authorization that arrived.
        starts: the times at which requests arrived.
    """

    daemon_threads = True

    def __init__(self, chaos: Mapping[str, float], seed: int, pause: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pause = pause
        self.chaos, self.draws, self.lock = dict(chaos), random.Random(seed), threading.Lock()
        self.replies: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.keys: set[str | None] = set()
        self.starts: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def draw(self) -> str:
        with self.lock:
            place = self.draws.uniform(0, 100)
            for name, share in self.chaos.items():
                place -= share
                if place < 0:
                    self.replies[name] += 1
                    return name
            self.replies["judged"] += 1
            return "judged"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log."""

    def do_POST(self) -> None:
        self.server.starts.append(time.monotonic())
        key = self.headers.get("Authorization")
        self.server.keys.add(key)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        time.sleep(self.server.pause)
        match self.server.draw():
            case "status 500":
                self.send(500, {"error": {"message": "an internal error"}})
            case "status 429":
                self.send(429, {"error": {"message": "too many requests"}})
            case "status 429, Retry-After":
                self.send(429, {"error": "slow down"}, {"Retry-After": "0.05"})
            case "status 503, a date":
                self.send(503, {}, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})
            case "stall":
                time.sleep(1.5)
            case "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(100):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.02)
            case "close":
                self.connection.close()
            case "half a body":
                self.send(200, reply("Verdict: 1"), {"Content-Length": "100000"})
            case "huge":
                self.send_response(200)
                self.end_headers()
                for _ in range(64):
                    self.wfile.write(b"[" * 2**16)
            case "no JSON":
                self.send_bytes(200, b"<html>busy</html>")
            case "no choices":
                self.send(200, {"choices": [{"delta": {}}]})
            case "no verdict":
                self.send(200, reply("Both answers have merits. Verdict: 1 or 2"))
            case "redirect":
                self.send(302, {}, {"Location": "http://127.0.0.1:1/"})
            case "the key":
                self.send(500, {"error": {"message": f"do not send {key} here"}})
            case "judged":
                with self.server.lock:
                    self.server.asked[prompt] += 1
                self.send(200, reply(f"The reasons, and {key}.\n{judgement(prompt)}"))

    def send(self, status: int, values: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(status, json.dumps(values).encode(), headers)

    def send_bytes(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def judgement(prompt: str) -> str:
    """Return the last line of the reply to a prompt: the longer answer is the better one."""
    first, second = (
        len(re.search(rf"\[start of answer {place}, .*?\]\n(.*?)\n\[end of answer {place}", prompt, re.DOTALL)[1])  # type: ignore[index]
        for place in (1, 2)
    )
    if "Scores:" in prompt:
        return f"Scores: {min(first, 10)} {min(second, 10)}"
    return f"**Verdict: {3 if first == second else 1 if first > second else 2}**"


def reply(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}


@contextmanager
def judge_server(chaos: Mapping[str, float] | None = None, seed: int = 0, pause: float = 0.0) -> Iterator[JudgeServer]:
    """Yield a running server; without `chaos`, every request has a proper reply. It takes `pause` seconds for each."""
    with JudgeServer(chaos or {}, seed, pause) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            with contextlib.suppress(OSError):
                server.shutdown()
            thread.join()
