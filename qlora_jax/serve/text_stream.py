"""Streaming of text: tokens arrive one by one, and pieces of complete characters leave."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "stream_text"]

_UNFINISHED = "\ufffd"  # the character that a decoder writes for an incomplete sequence of bytes
_MOST_WAITING = 32  # tokens; a character has at most four bytes, so what waits longer are bytes that are no text
_MOST_CONTEXT = 256  # tokens before a stream that its text may depend on


class TextStream:
    """A converter of a stream of tokens to pieces of text, each of complete characters.

    A character may consist of several tokens, and the text of a token may depend on the token before it (some tokenizers
    remove a space at the beginning). So the tokens since the last piece are decoded together with those of the piece before,
    whose text is then removed. A text that ends within a character is held back until more tokens arrive. The concatenated
    pieces equal the text of all tokens decoded at once.

    Bytes that never become a character, and tokens without text, do not wait for ever: after some tokens, what comes before
    the last character is written. So each token is decoded a limited number of times.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", context: Sequence[int] = ()) -> None:
        """Create a stream without tokens.

        Args:
            tokenizer: decodes the tokens.
            context: tokens before the stream that are not written, such as a prompt that the answer continues.
        """
        self._tokenizer = tokenizer
        self._written = list(context[-_MOST_CONTEXT:])
        self._written_text = self._decode(self._written)
        self._waiting: list[int] = []
        self._held = ""  # the text of all of these, if it ended within a character

    def push(self, token: int) -> str:
        """Add a token; return the text that it completes, which is often empty."""
        self._waiting.append(token)
        text = self._decode(self._written + self._waiting)
        if not text.endswith(_UNFINISHED):
            return self._take(text)
        before, self._held = self._held, text
        if len(self._waiting) < _MOST_WAITING:
            return ""
        if text == before:  # a token without text, behind which the same character is still incomplete
            self._waiting.pop()
            return ""
        return self._take_beginning(text)

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        return self._take(self._decode(self._written + self._waiting))

    def _take(self, text: str) -> str:
        piece = text[len(self._written_text) :]
        if piece:  # tokens without text (special ones) must be decoded together with the tokens before them
            self._written, self._waiting = self._waiting, []
            self._written_text = self._decode(self._written)
        elif len(self._waiting) >= _MOST_WAITING:
            self._waiting = []
        return piece

    def _take_beginning(self, text: str) -> str:
        """Take what waits up to the token in which the last character of the text, an incomplete one, begins."""
        last = len(self._waiting) - 1
        for count in range(last, max(last - _MOST_WAITING, 0), -1):
            beginning = self._decode(self._written + self._waiting[:count])
            if text.startswith(beginning) and len(beginning) < len(text):
                break
        else:
            return ""
        written, written_text = self._waiting[:count], self._decode(self._waiting[:count])
        if self._decode(self._waiting)[len(written_text) :] != text[len(beginning) :]:
            return ""
        piece = beginning[len(self._written_text) :]
        self._written, self._written_text, self._waiting = written, written_text, self._waiting[count:]
        self._held = self._decode(self._written + self._waiting)
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaning up could change text that was already written: "is n't" becomes "isn't" when the t arrives.
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return cast(str, text)


@contextlib.contextmanager
def stream_text(
    tokenizer: "PreTrainedTokenizerBase",
    write: Callable[[str], Any],
    *,
    context: Sequence[int] = (),
    row: int = 0,
) -> Iterator[Callable[[int, int], None]]:
    """Write one answer as it is generated: `with stream_text(tokenizer, write) as on_token: generate(…, on_token=on_token)`.

    Args:
        tokenizer: decodes the tokens.
        write: called with each piece of text, which consists of complete characters. Text that was held back is written
            when the block is left, also by an exception.
        context: as in `TextStream`.
        row: the row of the batch whose answer is written.
    """
    stream = TextStream(tokenizer, context)

    def on_token(of_row: int, token: int) -> None:
        if of_row == row and (piece := stream.push(token)):
            write(piece)

    try:
        yield on_token
    finally:
        if rest := stream.finish():
            write(rest)
