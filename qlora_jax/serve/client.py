"""A client of a server with OpenAI's API, by Python's own library: its models, and streams of answers.

A stream can be closed from another thread while it waits for a piece; the server then ends the answer.
"""

import http.client
import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from qlora_jax.errors import OptionError, QLoRAError, shortened

__all__ = ["AnswerStream", "Client", "ServerError"]

_SECONDS = 120.0  # of silence; a server that works sends a comment every few seconds


class ServerError(QLoRAError):
    """The server refused a request, could not be reached, or its answer broke off."""


class Client:
    """A server."""

    def __init__(self, url: str, key: str = "") -> None:
        """Create the client; nothing is connected yet.

        Args:
            url: of the API or of the server, such as http://127.0.0.1:8000/v1 or http://127.0.0.1:8000.
            key: the API key; "": none.

        Raises:
            OptionError: the address is none of a web server.
        """
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - it is read when it is asked for
        except ValueError as error:
            raise OptionError(f"url: expected an address of a server, found {url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise OptionError(f"url: expected an address such as http://127.0.0.1:8000/v1, found {url!r}")
        self._parts, self._path = parts, parts.path.rstrip("/") or "/v1"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def models(self) -> list[str]:
        """Return the names of the models.

        Raises:
            ServerError: the server refuses, or cannot be reached.
        """
        connection, response = self._request("GET", "/models")
        with connection:
            try:
                return [str(model["id"]) for model in json.loads(response.read())["data"]]
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
                raise ServerError(f"expected a list of models, found something else: {error}") from error

    def ask(self, model: str, messages: Sequence[dict[str, Any]], **fields: Any) -> "AnswerStream":
        """Return the answer to a conversation, as it is made.

        Raises:
            ServerError: the server refuses, or cannot be reached.
        """
        body = {"model": model, "messages": list(messages), "stream": True} | fields
        return AnswerStream(*self._request("POST", "/chat/completions", json.dumps(body).encode()))

    def _request(self, method: str, path: str, body: bytes | None = None) -> "tuple[_Connection, http.client.HTTPResponse]":
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = _Connection(kind(self._parts.hostname or "", self._parts.port, timeout=_SECONDS))
        try:
            connection.made.request(method, self._path + path, body, self._headers)
            response = connection.made.getresponse()
            if response.status == 200:
                return connection, response
            raise ServerError(_reason(response))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise ServerError(f"the server cannot be reached: {error}") from error
        except BaseException:
            connection.close()
            raise


class AnswerStream:
    """The answer of a server, piece by piece.

    Attributes:
        finish: why the answer has ended; None: it goes on.
    """

    def __init__(self, connection: "_Connection", response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.finish: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the pieces of the text.

        Raises:
            ServerError: the answer broke off.
        """
        with self._connection:
            try:
                for line in self._response:
                    data = line.strip().removeprefix(b"data: ")
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data: "):
                        event = json.loads(data)
                        if "error" in event:
                            raise ServerError(str(event["error"].get("message")))
                        for choice in event["choices"]:
                            self.finish = choice["finish_reason"] or self.finish
                            if piece := choice["delta"].get("content"):
                                yield piece
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ServerError(f"the answer broke off: {error}") from error
        raise ServerError("the answer broke off")

    def close(self) -> None:
        """End the answer, from any thread."""
        self._connection.close()


class _Connection:
    def __init__(self, made: http.client.HTTPConnection) -> None:
        self.made = made

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a thread that waits for it goes on."""
        try:
            if self.made.sock is not None:
                self.made.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already
        self.made.close()


def _reason(response: http.client.HTTPResponse) -> str:
    text = response.read(65536)
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status} {response.reason}: {shortened(text.decode(errors='replace'), 200)}"
