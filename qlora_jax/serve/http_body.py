"""The body of a request: its size, its JSON and its fields, with an error for each thing that can be wrong.

Nothing is taken as it is: the size is limited before the body is read and while it is read, JSON may be nested to a limited
depth and has neither NaN nor infinite numbers, texts are valid Unicode, each field has a type and a range, and a field that
is not known is refused instead of ignored.
"""

import asyncio
import json
import math
from collections.abc import Collection
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from qlora_jax.errors import list_names, shortened
from qlora_jax.serve.http_errors import ApiError

__all__ = ["Fields", "read_json", "read_object"]

_DEEPEST = 64
_BODY_SECONDS = 30.0


async def read_object(request: Request, most_bytes: int) -> dict[str, Any]:
    """Return the JSON object that is the body of a request.

    Raises:
        ApiError: a body that is too large or too slow, or that is no such object.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > most_bytes:
        raise _too_large(most_bytes)
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > most_bytes:
                    raise _too_large(most_bytes)
    except TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {_BODY_SECONDS:.0f} seconds.") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The body is incomplete.") from error
    try:
        value = read_json(bytes(data))
    except ValueError as error:
        raise ApiError(400, f"The body: {error}.") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"The body: expected a JSON object, found {_kind(value)}.")
    return value


def read_json(written: str | bytes) -> Any:
    """Return the value of JSON.

    Raises:
        ValueError: it is no JSON, has NaN, an infinite number or half of a surrogate pair, or is nested too deep.
    """
    try:
        value = json.loads(written, parse_constant=_no_constant)
        deep = _deeper(value, _DEEPEST)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, as is a number of many digits
        raise ValueError(f"expected JSON, found an error: {shortened(str(error), 120)}") from error
    if deep:
        raise ValueError(f"expected JSON that is nested at most {_DEEPEST} levels deep, found more")
    if not _is_unicode(value):
        raise ValueError("expected texts of valid Unicode, found half of a surrogate pair")
    return value


class Fields:
    """The fields of a JSON object, each of which is taken out with its type; what is left over is refused."""

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        """Create the fields of an object; `place` is its own field with a dot, for messages."""
        # null is the same as a field that is not there.
        self._values = {name: value for name, value in values.items() if value is not None}
        self._place = place

    def any(self, name: str) -> Any:
        """Return the value of a field, or None."""
        return self._values.pop(name, None)

    def text(self, name: str, *, choices: Collection[str] = ()) -> str | None:
        """Return a text, one of the choices if there are any, or None."""
        value = self.any(name)
        if value is not None and (not isinstance(value, str) or (choices and value not in choices)):
            self.wrong(name, f"one of {list_names(list(choices))}" if choices else "a text", value)
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; a missing field is false."""
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false", value)
        return bool(value)

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number within bounds, or None."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.wrong(name, f"a number from {low:g} to {high:g}", value)
        return float(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number within bounds, or None."""
        value = self.any(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high):
            self.wrong(name, f"a whole number from {low} to {high}", value)
        return value

    def fields(self, name: str) -> "Fields | None":
        """Return the fields of an object, or None."""
        value = self.any(name)
        if value is not None and not isinstance(value, dict):
            self.wrong(name, "an object", value)
        return None if value is None else Fields(value, f"{self._place}{name}.")

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of at most so many items, or None."""
        value = self.any(name)
        if value is not None and (not isinstance(value, list) or len(value) > most):
            self.wrong(name, f"a list of at most {most}", value)
        return value

    def must(self, name: str, value: Any) -> Any:
        """Return a value that was taken out, or raise ApiError if it is None."""
        if value is None:
            raise ApiError(400, f"{self._place}{name} is missing.", param=f"{self._place}{name}")
        return value

    def ignore(self, *names: str) -> None:
        """Take out fields that change nothing about the answer."""
        for name in names:
            self._values.pop(name, None)

    def unsupported(self, *names: str, but: Collection[Any] = ()) -> None:
        """Raise ApiError for fields of the API that are not supported, unless they have one of the values `but`."""
        for name in names:
            value = self.any(name)
            if value is not None and not any(value is one or (value == one and type(value) is type(one)) for one in but):
                raise ApiError(
                    400,
                    f"{self._place}{name} is not supported.",
                    param=f"{self._place}{name}",
                    code="unsupported_parameter",
                )

    def none_left(self) -> None:
        """Raise ApiError if there are fields that were not taken out."""
        if self._values:
            name = f"{self._place}{shortened(next(iter(self._values)))}"
            raise ApiError(400, f"Unrecognized request argument supplied: {name}", param=name, code="unknown_parameter")

    def wrong(self, name: str, expected: str, found: object) -> NoReturn:
        """Raise ApiError for a field of a wrong value."""
        where = f"{self._place}{name}"
        raise ApiError(400, f"{where}: expected {expected}, found {_shown(found)}.", param=where, code="invalid_value")


def _shown(value: object) -> str:
    is_scalar = isinstance(value, bool | int | float | str)
    return shortened(value) if is_scalar else _kind(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"The body: expected at most {most} bytes.", code="request_too_large")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _deeper(value: Any, levels: int) -> bool:
    """Return whether a value is nested more than so many levels deep, or has a number that is infinite."""
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for one in layer
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if any(isinstance(one, float) and not math.isfinite(one) for one in layer):
            raise ValueError("a number is too large")
        if not layer:
            return False
    return True


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
