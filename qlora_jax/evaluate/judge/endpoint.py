"""One request to an endpoint of OpenAI's chat API, with a limit of time and of size for the whole of it.

    POST {endpoint}/chat/completions    {"model": …, "messages": […], "max_tokens": …, "temperature": …}

The client is that of Python's library, with three differences. The limit of time is for the request as a whole, whereas a
socket's own timeout starts again with every byte that arrives. A reply is read up to a limit of bytes. A redirect is an
error, because the key would be sent on to another host. The variables HTTPS_PROXY, HTTP_PROXY and NO_PROXY are obeyed.

The key is sent in one header and is part of no message: wherever an endpoint repeats it, it is replaced.
"""

import email.utils
import http.client
import io
import json
import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from qlora_jax.data.messages import Message
from qlora_jax.errors import OptionError, shortened

__all__ = ["Endpoint", "EndpointFailure", "Reply", "endpoint_url"]

_MOST_BYTES = 2**21
_LONGEST_MESSAGE = 300
_HIDDEN = "[the key]"


@dataclass(frozen=True)
class Reply:
    """What the endpoint answered: the text, and the tokens that it says it has read and written (None if it "
    "does not say)."""

    text: str
    tokens: tuple[int, int] | None


class EndpointFailure(Exception):
    """A request without a reply.

    Attributes:
        again: whether the same request may succeed later.
        wait: the seconds that the endpoint asks to wait; None if it does not say.
        status: the HTTP status; None if there is none.
        perhaps_charged: whether the endpoint may have worked on the request.
    """

    def __init__(
        self,
        message: str,
        *,
        again: bool = True,
        wait: float | None = None,
        status: int | None = None,
        perhaps_charged: bool = False,
    ) -> None:
        super().__init__(message)
        self.again, self.wait, self.status, self.perhaps_charged = again, wait, status, perhaps_charged


@dataclass(frozen=True)
class Endpoint:
    """Where and how a judge is asked.

    Attributes:
        url: the address of the API, as `endpoint_url` returns it.
        model: the name of the judge there.
        key: the key; None: none is sent.
        timeout: the seconds that a request may take, from connecting to the last byte.
        max_tokens: the most tokens of a reply.
        length_field: the name of that limit in a request; newer models of OpenAI know the second name only.
        temperature: of the sampling; None: the endpoint's own.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    max_tokens: int = 512
    length_field: str = "max_tokens"
    temperature: float | None = 0.0

    def body(self, messages: Sequence[Message]) -> bytes:
        """Return the body of a request."""
        values: dict[str, Any] = {"model": self.model, "messages": list(messages), self.length_field: self.max_tokens}
        if self.temperature is not None:
            values["temperature"] = self.temperature
        return json.dumps(values).encode()

    def ask(self, messages: Sequence[Message]) -> Reply:
        """Return the reply to a conversation.

        Raises:
            EndpointFailure: there is none. No text of it contains the key.
        """
        try:
            return self._reply(self._post(self.body(messages)))
        except EndpointFailure as failure:
            failure.args = (self.hidden(str(failure)),)
            raise

    def hidden(self, text: str) -> str:
        """Return a text of the endpoint without the key."""
        return text.replace(self.key, _HIDDEN) if self.key else text

    def _shown(self, value: object) -> str:
        """Return a value of the endpoint as a message shows it; the key is replaced before it could be divided by a cut."""
        return _short(self.hidden(shortened(value, _MOST_BYTES)), 80)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "qlora_jax"}
        request = urllib.request.Request(f"{self.url}/chat/completions", data=body, headers=headers, method="POST")
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        deadline = time.monotonic() + self.timeout
        opener = urllib.request.build_opener(_NoRedirect, _Plain(deadline), _Secure(deadline))
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return _read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._failure_of_status(error) from None
        except TimeoutError:
            raise EndpointFailure(f"no reply within {self.timeout:g} s", perhaps_charged=True) from None
        except urllib.error.URLError as error:
            slow = isinstance(error.reason, TimeoutError)
            raise EndpointFailure(
                f"no reply within {self.timeout:g} s" if slow else f"no connection: {_short(error.reason)}",
                perhaps_charged=slow,
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise EndpointFailure(f"a broken reply: {_short(error) or type(error).__name__}", perhaps_charged=True) from None

    def _failure_of_status(self, error: urllib.error.HTTPError) -> EndpointFailure:
        status = error.code
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, ValueError):
            text = ""
        again = status in (408, 409, 425, 429) or status >= 500
        if 300 <= status < 400:
            text = "a redirect, which is not followed, because the key would go with it"
        wait = _wait(error.headers.get("Retry-After")) if again else None
        return EndpointFailure(
            f"HTTP {status}: {_short(self.hidden(_message(text)))}", again=again, wait=wait, status=status
        )

    def _reply(self, data: bytes) -> Reply:
        lost = partial(EndpointFailure, perhaps_charged=True)
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            raise lost(f"expected a reply in JSON, found {self._shown(data)}") from None
        choices = values.get("choices") if isinstance(values, dict) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        message = first.get("message") if isinstance(first, dict) else None
        if not isinstance(message, dict):
            raise lost(f"expected a reply with choices and a message, found {self._shown(values)}")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise lost(f"expected a text as content of the message, found {self._shown(content)}")
        # A model that refuses, or that only thought, has replied, though not with a judgement.
        return Reply(self.hidden(content or ""), _tokens(values.get("usage")))


def endpoint_url(url: str, key: str | None) -> str:
    """Return the address of an API without the slash at its end.

    Raises:
        OptionError: it is no address of a server, or has a part that may be secret. The message does not repeat the address.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid, parts = False, None
    if not valid or parts is None:
        raise OptionError("endpoint: expected an address like https://api.openai.com/v1 or http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise OptionError(
            "endpoint: expected an address without user name, password, query and fragment; a key is read from "
            "the environment "
            "(--key-variable)"
        )
    if key and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise OptionError("key: expected printable ASCII characters without a space around them, found others")
    return url.rstrip("/").removesuffix("/chat/completions")


def _tokens(usage: object) -> tuple[int, int] | None:
    match usage:
        case {"prompt_tokens": int(read), "completion_tokens": int(written)} if min(read, written) >= 0:
            return read, written
    return None


def _read(response: http.client.HTTPResponse) -> bytes:
    data = response.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise EndpointFailure(f"a reply of more than {_MOST_BYTES // 2**20} MiB", perhaps_charged=True)
    if response.length:  # bytes that were announced and did not arrive
        raise EndpointFailure(f"a reply that ends {response.length:,} bytes too early", perhaps_charged=True)
    return data


def _message(text: str) -> str:
    """Return the message of an error in OpenAI's form, or the text as it is."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return text
    error = values.get("error") if isinstance(values, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else text


def _short(value: object, most: int = _LONGEST_MESSAGE) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[:most] + "…"


def _wait(value: str | None) -> float | None:
    """Return the seconds that a header Retry-After names, by a number or a date; None if there are none."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class _UntilDeadline(io.RawIOBase):
    """The bytes that arrive at a socket before a deadline; after it, reading raises TimeoutError.

    The socket stays open as long as `file`, a file of the same socket, which is closed with this one.
    """

    def __init__(self, connection: socket.socket, deadline: float, file: io.IOBase) -> None:
        self._socket, self._deadline, self._file = connection, deadline, file

    def close(self) -> None:
        self._file.close()
        super().close()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket.recv_into(buffer)


class _Response(http.client.HTTPResponse):
    """A response that is read before a deadline."""

    def __init__(self, connection: socket.socket, *arguments: Any, deadline: float, **options: Any) -> None:
        super().__init__(connection, *arguments, **options)
        self.fp = io.BufferedReader(_UntilDeadline(connection, deadline, self.fp))


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, http.client.HTTPConnection, self._deadline), request)  # type: ignore[arg-type]


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(partial(_connection, http.client.HTTPSConnection, self._deadline), request)  # type: ignore[arg-type]


def _connection(kind: type[Any], deadline: float, host: str, **options: Any) -> Any:
    """Return a connection whose responses are read before a deadline."""
    connection = kind(host, **options)
    connection.response_class = partial(_Response, deadline=deadline)
    return connection
