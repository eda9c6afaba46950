"""A server in the process of a test, on a free port of this machine."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from qlora_jax.serve.http import Service, make_app
from qlora_jax.serve.http_connections import Connection


class Client:
    """What a client sees of a server, without a library."""

    def __init__(self, port: int, connections: "set[Any]") -> None:
        self.port, self.connections = port, connections  # those that the server has

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Return (status, headers, body); a body of bytes is sent as it is, and JSON is read where it is the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            read = response.read()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, response.headers, json.loads(read) if is_json else read.decode()

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the events of a stream; the last must be the end."""
        status, _, text = self.call("POST", path, body)
        assert status == 200, text
        *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
        assert last == "[DONE]"
        return [json.loads(event) for event in events]

    def raw(self, data: bytes, most: int = 65536) -> bytes:
        """Send bytes and return the first bytes of the answer; the connection is then closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(data)
            return connection.recv(most)


@contextlib.contextmanager
def running(service: Service, most: int = 100) -> Iterator[Client]:
    """Serve until the block ends."""
    service.worker.start()
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        make_app(service),
        http=Connection,
        limit_concurrency=most,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield Client(listening.getsockname()[1], server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join(20)
        service.worker.stop(1)
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
