"""Texts whose tokens are scored, from files and data sets.

a .txt file        one text, tokenized as it is
other rows         each row is a text, made as train.py makes it: a conversation by its template, of which the answers are
                   scored (or everything), a plain text with its end of sequence
joined rows        the plain texts of all rows as one text, with an empty line between two of them, tokenized as it is
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.data import Example, Template, encode_all, open_source
from qlora_jax.data.token_ids import check_ids
from qlora_jax.errors import DataError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Document", "documents_of", "read_documents"]

_LONGEST = 2**30  # tokens of a row: windows, and not the reader, make parts of long texts


@dataclass(frozen=True, eq=False)
class Document:
    """A text.

    Attributes:
        tokens: int32 `[t]`.
        scored: bool `[t]`, the tokens that are scored; never the first one.
    """

    tokens: np.ndarray
    scored: np.ndarray


def documents_of(examples: Sequence[Example]) -> list[Document]:
    """Return examples of the training job as texts, whose learned tokens are scored."""
    return [Document(example.tokens, np.asarray(example.loss_mask, bool)) for example in examples]


def read_documents(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str | None = None,
    template: Template = "auto",
    whole: bool = False,
    join: bool = False,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> tuple[list[Document], str]:
    """Return (the texts of a source, a description of them).

    Args:
        source: a .txt file, another file or folder of rows, or the id of a data set on the hub.
        tokenizer: a fast tokenizer.
        split: split of a hub data set or a folder.
        template: how conversations are written as text.
        whole: whether everything is scored, and not only the answers of conversations.
        join: whether the plain texts of all rows are one text.
        limit: the first so many rows; None: all.
        vocabulary: the number of tokens for which the model has an embedding.

    Raises:
        DataError: a row that cannot be used, no row with anything to score, or with `join` a row without a text.
        OptionError: an option that means nothing for this source.
        OSError: the source cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt" and path.is_file():
        if meaningless := [name for name, given in (("join", join), ("split", split), ("limit", limit)) if given]:
            raise OptionError(f"{meaningless[0]}: expected none for {source}, which is one text, found one")
        return [_of_text(_read_text(path), tokenizer, source, vocabulary)], f"{source}: one text"
    records = open_source(source, split).records
    chosen: list[Any] = list(records)[:limit] if limit is not None else list(records)
    if join:
        texts = [row.get("text") if isinstance(row, dict) else None for row in chosen]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"{source}, row {number} (counted from 0): expected a text to join, found {text!r:.80}")
        joined = "\n\n".join(text for text in texts if text is not None)
        return [_of_text(joined, tokenizer, source, vocabulary)], f"{source}: {len(texts):,} rows as one text"
    try:
        examples, report = encode_all(
            chosen,
            tokenizer,
            max_length=_LONGEST,
            template=template,
            train_on_source=whole,
            vocabulary=vocabulary,
            progress=False,
        )
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return documents_of(examples), f"{source}: {report}"


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, found byte {error.object[error.start]:#04x} at {error.start}") from error


def _of_text(text: str, tokenizer: Any, source: str, vocabulary: int | None) -> Document:
    tokens = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    if len(tokens) < 2:
        raise DataError(f"{source}: expected a text of at least two tokens, found {len(tokens)}")
    check_ids(tokens, tokenizer, vocabulary, f"{source}: ")
    return Document(tokens, np.arange(len(tokens)) > 0)
