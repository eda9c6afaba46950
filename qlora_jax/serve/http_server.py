"""The application in a thread of its own, on a socket that listens already."""

import socket
import threading

import uvicorn

from qlora_jax.serve.http import Service, make_app
from qlora_jax.serve.http_connections import Connection

__all__ = ["HttpServer"]


class HttpServer:
    """A server that runs in a thread.

    Attributes:
        address: where it listens, as the beginning of a URL.
    """

    def __init__(self, service: Service, listening: socket.socket, *, connections: int, drain_seconds: float = 0.0) -> None:
        """Start the engine and the server.

        Args:
            service: what is served.
            listening: the socket.
            connections: the most connections at a time.
            drain_seconds: how long answers may take after the server is to stop.
        """
        service.worker.start()
        config = uvicorn.Config(
            make_app(service),
            http=Connection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(drain_seconds) + 1,
            limit_concurrency=connections,
        )
        host, port = listening.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._service, self._server = service, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, name="http", daemon=True)
        self._thread.start()

    @property
    def works(self) -> bool:
        """Whether neither the server nor the engine has failed."""
        return self._thread.is_alive() and self._service.worker.failure is None

    def stop(self, seconds: float) -> bool:
        """Take no more requests; return whether all answers came to their end within so many seconds."""
        self._server.should_exit = True
        complete = self._service.worker.stop(seconds)
        self._thread.join(5.0)
        return complete
