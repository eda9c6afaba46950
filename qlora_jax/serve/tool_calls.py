"""The calls of tools in the text of an answer, found while the text arrives.

A reader takes pieces of the text and returns what they are certain to be: text of the answer, the start of a call, or a part
of a call's arguments. Text that may be the start of a call is held back until it is decided. What looks like a call and is
none (JSON that is wrong, a function that was not offered) is text of the answer, letter by letter. The whole of an answer is
read by the same reader, so that it equals the stream.
"""

import dataclasses
import json
import re
from collections.abc import Collection
from typing import Any, Literal

from qlora_jax.serve.answer import overlap
from qlora_jax.serve.tool_format import ToolFormat

__all__ = ["CallReader", "Part"]

_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_FIRST_KEY = re.compile(r'\{\s*"(?!(?:name|type|id|function|arguments|parameters)")[^"]*"')
# Nothing that is tried in vain is tried again in another way: a model may write any number of spaces.
_NAMED = re.compile(r"([\w.-]++)\s*+(?:\[CALL_ID\]\s*+\w*+\s*+)?+\[ARGS\]\s*+(?=\{)")
_NAMED_START = re.compile(r"[\w.-]*+\s*+(?:\[[A-Z_]*+\]?+\s*+\w*+\s*+){0,2}+")
_LONGEST_HEAD = 1024  # characters before the arguments of a call, which are read again with each piece


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an answer.

    Attributes:
        text: text of the answer, or of the arguments of a call.
        call: the number of the call; None: the part is text of the answer.
        name: the function; given with the first part of a call only.
    """

    text: str
    call: int | None = None
    name: str | None = None


class CallReader:
    """The calls and the text of one answer."""

    def __init__(self, form: ToolFormat, names: Collection[str], *, many: bool = True) -> None:
        """Create the reader of an answer without text.

        Args:
            form: how the model writes calls.
            names: the functions that may be called.
            many: whether there may be several calls; otherwise those after the first are left out.
        """
        self._form, self._names, self._many = form, frozenset(names), many
        self._state: Literal["start", "text", "head", "call", "after", "listed"] = "text" if form.start else "start"
        self._held, self._space = "", ""  # text that is not decided; white space that is dropped before a call
        self._opening = ""  # what came before a head, which is text if the head is none
        self._nesting, self._scanned = _Nesting(), 0  # of the held text, and how much of it was read for that
        self._inside = False  # of the arguments
        self.calls = 0

    def push(self, text: str) -> list[Part]:
        """Add a piece of the text; return what is now certain."""
        self._held += text
        return self._read(last=False)

    def finish(self) -> list[Part]:
        """Return the rest, after the last piece."""
        parts = self._read(last=True)
        if self._space and not self.calls:
            parts.append(Part(self._space))
        return parts

    def _read(self, *, last: bool) -> list[Part]:
        parts: list[Part] = []
        while True:
            before = self._state, len(self._held)
            step = {
                "start": self._at_start,
                "text": self._in_text,
                "head": self._in_head,
                "call": self._in_call,
                "after": self._after_call,
                "listed": self._at_start_of_list,
            }[self._state]
            parts += step(last)
            if (self._state, len(self._held)) == before:
                break
        return _joined(parts)

    def _text(self, text: str) -> list[Part]:
        """Return text of the answer; white space at its end waits until it is known that no call follows."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        return [Part(kept)] if kept else []

    def _at_start(self, last: bool) -> list[Part]:
        """Decide whether an answer that begins with its calls has any."""
        text, marker = self._held.lstrip(), self._form.optional_start
        if marker and text.startswith(marker):
            text = text.removeprefix(marker).lstrip()
        elif marker and not last and text and marker.startswith(text):
            return []
        if text.startswith("{"):
            self._open(self._held[: len(self._held) - len(text)], text)
        elif text or last:
            self._state = "text"
        return []

    def _in_text(self, last: bool) -> list[Part]:
        start, text = self._form.start, self._held
        at = text.find(start) if start else -1
        if at >= 0:
            rest = text[at + len(start) :]
            parts = self._text(text[:at])
            self._open(start, rest)
            self._state = "listed" if self._form.listed else "head"
            return parts
        held = overlap(text, start) if start and not last else 0
        self._held = text[len(text) - held :]
        return self._text(text[: len(text) - held])

    def _open(self, opening: str, rest: str) -> None:
        self._state, self._opening, self._held = "head", opening, rest
        self._nesting, self._scanned = _Nesting(), 0

    def _at_start_of_list(self, last: bool) -> list[Part]:
        text = self._held.lstrip()
        if text.startswith("["):
            self._open(self._opening + self._held[: len(self._held) - len(text) + 1], text[1:])
        elif text or last:
            return self._no_call(self._held)
        return []

    def _in_head(self, last: bool) -> list[Part]:
        text = self._held.lstrip()
        self._opening += self._held[: len(self._held) - len(text)]
        self._held = text
        start = text[:_LONGEST_HEAD]
        found = (_HEAD if self._form.arguments else _NAMED).match(start)
        if found is not None and found[1] in self._names:
            self._state, self._held = "call", text[found.end() :]
            self._nesting, self._inside = _Nesting(1 if self._form.arguments else 0), True
            return self._begin(found[1])
        if not self._form.arguments:
            undecided = found is None and start == text and _NAMED_START.fullmatch(text) is not None
            return [] if undecided and not last else self._no_call(text)
        if found is not None or (text and not text.startswith("{")) or _FIRST_KEY.match(start):
            return self._no_call(text)
        end = self._nesting.end(text[self._scanned :], 0)
        if end is None:
            self._scanned = len(text)
            return self._no_call(text) if last else []
        return self._whole_call(text[: self._scanned + end], text[self._scanned + end :])

    def _whole_call(self, text: str, rest: str) -> list[Part]:
        """Read a complete object whose keys have another order than usual."""
        name, arguments = _call_of(text)
        if name not in self._names:
            return self._no_call(text + rest)
        self._state, self._held = "after", rest
        return [*self._begin(name), *self._arguments(arguments)]

    def _no_call(self, text: str) -> list[Part]:
        """Return as text what looked like a call; calls may come after it only if they have a marker."""
        given, self._opening, self._state, self._held = self._opening, "", "text", text
        return self._text(given)

    def _begin(self, name: str) -> list[Part]:
        self.calls += 1
        self._space = ""
        return [Part("", self.calls - 1, name)] if self._many or self.calls == 1 else []

    def _arguments(self, text: str) -> list[Part]:
        return [Part(text, self.calls - 1)] if text and (self._many or self.calls == 1) else []

    def _in_call(self, last: bool) -> list[Part]:
        parts: list[Part] = []
        if self._inside:
            end = self._nesting.end(self._held, 1 if self._form.arguments else 0)
            text = self._held if end is None else self._held[:end]
            parts, self._held = self._arguments(text), self._held[len(text) :]
            self._inside = end is None
        if not self._inside:  # what follows the arguments in the object of the call
            end = self._nesting.end(self._held, 0) if self._form.arguments else 0
            self._held = "" if end is None else self._held[end:]
            self._state = "call" if end is None else "after"
        return parts

    def _after_call(self, last: bool) -> list[Part]:
        form, text = self._form, self._held.lstrip()
        marks: tuple[tuple[str, Literal["head", "text"]], ...] = ((form.between, "head"), (form.close, "text"))
        for mark, state in marks:
            if mark and text.startswith(mark):
                rest = text.removeprefix(mark)
                if state == "text" or rest.strip() or last:
                    self._open(mark, rest)
                    self._state = state
                    return []
        if last and (not text or form.close.startswith(text) or form.between == text):
            self._held = ""
        elif text and not any(mark.startswith(text.rstrip()) for mark in (form.close, form.between)):
            self._state = "text"
        return []


class _Nesting:
    """How deep a place in JSON is nested."""

    def __init__(self, depth: int = 0) -> None:
        self._depth, self._quoted, self._escaped = depth, False, False

    def end(self, text: str, depth: int) -> int | None:
        """Return the index after the bracket that closes to a depth, which is part of the text; else read all of it."""
        for index, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= depth:
                    return index + 1
        return None


def _call_of(text: str) -> tuple[str, str]:
    """Return (the name, the JSON of the arguments) of a call; empty texts if the text is none."""
    try:
        value: Any = json.loads(text)
        value = value["function"] if isinstance(value.get("function"), dict) else value
        name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not (isinstance(name, str) and isinstance(arguments, dict)):
            return "", ""
        written = json.dumps(arguments, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "", ""
    # Half of a surrogate pair, which a model may have written as an escape, cannot be sent as a character.
    return name, written if _is_unicode(written) else json.dumps(arguments)


def _is_unicode(text: str) -> bool:
    """Return whether a text is without halves of surrogate pairs, so that it has an encoding in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _joined(parts: list[Part]) -> list[Part]:
    """Return the parts with neighbours of the same kind in one."""
    found: list[Part] = []
    for part in parts:
        if found and part.name is None and part.call == found[-1].call:
            found[-1] = dataclasses.replace(found[-1], text=found[-1].text + part.text)
        else:
            found.append(part)
    return found
