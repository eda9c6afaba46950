"""What a connection may do before it is a request, and while its answer is sent: limits that uvicorn leaves to a proxy.

    head       a request line with its headers must arrive within some seconds of the connection, or of their first byte
    body       so must a body, whoever still waits for it
    answer     a client that takes nothing of what is sent for a minute is cut off, so that its memory is free again
    number     connections beyond a limit are told so and closed

What is no HTTP gets an error of OpenAI's shape, too.
"""

import asyncio
import json
from http import HTTPStatus
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_jax.serve.http_errors import ApiError

__all__ = ["Connection"]

_SECONDS = {"head": 20.0, "body": 60.0, "answer": 60.0}
_Phase = Literal["head", "body"]


class Connection(H11Protocol):
    """A connection of uvicorn with these limits; `limit_concurrency` of its configuration is the number of connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn's own refusal is plain text, and keeps the connection.
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._phase: _Phase | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that `pause_writing` is called as soon as anything is not taken
        if self._most is not None and len(self.connections) > self._most:
            self._refuse(ApiError(503, "The server has too many connections."))
        else:
            self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        self._enter(None)
        if self._unsent is not None:
            self._unsent.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read what has arrived, for which there is only so much time."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        theirs = self.conn.their_state
        self._enter("head" if theirs is h11.IDLE else "body" if theirs is h11.SEND_BODY else None)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(ApiError(400, msg))
        else:  # in the middle of an answer
            self.transport.close()

    def pause_writing(self) -> None:
        """Wait until the client has taken what was sent, but not for ever."""
        super().pause_writing()
        if self._unsent is None:
            self._unsent = self.loop.call_later(_SECONDS["answer"], self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        super().resume_writing()
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def _enter(self, phase: _Phase | None) -> None:
        if self.transport.is_closing():
            phase = None
        if phase == self._phase:
            return
        self._phase = phase
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if phase is None else self.loop.call_later(_SECONDS[phase], self._late)

    def _late(self) -> None:
        begun = bool(self.conn.trailing_data[0])
        if self._phase == "head" and begun:
            self._refuse(ApiError(408, f"The headers did not arrive within {_SECONDS['head']:.0f} seconds."))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        lines = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        self.transport.close()
