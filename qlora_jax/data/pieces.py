"""The result of rendering: pieces of text that are tokenized separately, with the character ranges that are learned."""

from dataclasses import dataclass

from qlora_jax.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A text that is tokenized separately, and its half-open character ranges that are learned."""

    text: str
    answers: tuple[Span, ...] = ()


class CannotRender(DataError):
    """The template does not support a record. `index` counts from the first record given to `render`."""

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index
