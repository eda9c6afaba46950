"""An answer that the engine is working on, and its text.

Stop texts. The pieces of text of `TextStream` are searched for the stop texts. A piece that ends with the beginning of a
stop text is held back from there on, until the following tokens decide. So no part of a stop text is ever written.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qlora_jax.serve.request import Request
from qlora_jax.serve.text_stream import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerText", "Event", "Finish", "TokenLogprobs", "overlap"]

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """A token of an answer with its log probability, and the most likely tokens, likeliest first; for `top_logprobs`."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened to an answer.

    Attributes:
        ticket: the number of the request.
        number: the number of the answer within the request.
        tokens: the new tokens of the answer.
        text: the text that they complete.
        logprobs: of the new tokens, if the request asks for them.
        finish: why the answer has ended; None: it goes on.
    """

    ticket: int
    number: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None


class AnswerText:
    """The text of an answer, up to the first stop text."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", stop: Sequence[str], context: Sequence[int]) -> None:
        """Create the text of an answer without tokens.

        Args:
            tokenizer: decodes the tokens; None: the answer has no text.
            stop: the texts that end the answer.
            context: tokens before the answer that it continues, if its first space counts.
        """
        self._stream = None if tokenizer is None else TextStream(tokenizer, context)
        self._stop, self._held = tuple(stop), ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain to be part of the answer."""
        return "" if self._stream is None else self._take(self._stream.push(token), last=False)

    def finish(self) -> str:
        """Return the rest of the text, after the last token."""
        return "" if self._stream is None or self.stopped else self._take(self._stream.finish(), last=True)

    def _take(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that is a beginning of the stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)


@dataclasses.dataclass(eq=False)
class Answer:
    """One answer to a request, from its arrival to its end.

    Attributes:
        ticket: the number of the request.
        number: the number of the answer within the request.
        request: the request.
        tokens: the prompt and the tokens of the answer that the host knows.
        text: the text of the answer.
        row: the row in which the answer runs; None: it waits.
        slot, version: those of its adapter, as `Adapters.acquire` returned them.
        key: what texts must share, besides tokens, to share keys and values in the cache.
        lasts: the length up to which its part of the cache is right; None: always.
        target: the number of tokens that a prefill processes before the next token can be drawn.
        written: the number of its tokens whose keys and values are in the cache, or will be after the programs that were
            started.
        drawn: the number of tokens that were drawn, or will be after the programs that were started.
        finished: whether the answer has ended.
    """

    ticket: int
    number: int
    request: Request
    tokens: list[int]
    text: AnswerText
    row: int | None = None
    slot: int = 0
    version: object = None
    key: tuple[object, ...] = ()
    lasts: int | None = None
    target: int = 0
    written: int = 0
    drawn: int = 0
    finished: bool = False

    @property
    def known(self) -> int:
        """The number of tokens of the answer that the host knows."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def prefills(self) -> bool:
        """Whether tokens must be processed before the next one can be drawn."""
        return self.written < self.target
