"""The result of rendering: pieces of text that are tokenized separately, with the character ranges that are learned."""

from dataclasses import dataclass

from qlora_jax.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A text that is tokenized separately, with half-open ranges of its characters.

    Attributes:
        text: the text.
        answers: what is learned.
        excluded: what is not learned even if prompts are learned too, such as an answer that another row teaches.
    """

    text: str
    answers: tuple[Span, ...] = ()
    excluded: tuple[Span, ...] = ()


class CannotRender(DataError):
    """The template does not support a record. `index` counts from the first record given to `render`."""

    def __init__(self, index: int, reason: str):
        super().__init__(reason)
        self.index = index
