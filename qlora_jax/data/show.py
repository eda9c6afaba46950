"""Printing examples with the learned text marked: learned text is green, other text grey; without colours, «…» encloses it.

The text of a range of tokens is computed from decoded prefixes of the sequence, because many tokenizers decode a token
differently without the tokens before it.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

from qlora_jax.data.format import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEARNED, _NOT_LEARNED, _END = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def show_examples(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", n: int, stream: TextIO = sys.stderr
) -> str:
    """Return the first `n` examples as text, with colours if `stream`, which the text is written to, is a terminal."""
    coloured = stream.isatty()
    shown = []
    for index, example in enumerate(examples[:n]):
        learned = int(example.loss_mask.sum())
        text = "".join(_marked(part, is_learned, coloured) for part, is_learned in _runs(example, tokenizer))
        shown.append(f"--- example {index}: {learned:,} of {len(example):,} tokens learned\n{text}")
    return "\n".join(shown)


def _runs(example: Example, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, bool]]:
    """Return (text, whether it is learned) of each maximal run of learned tokens or of other tokens."""
    ends = [*(np.flatnonzero(np.diff(example.loss_mask)) + 1).tolist(), len(example)]
    runs, before = [], ""
    for end in ends:
        text = str(tokenizer.decode(example.tokens[:end].tolist(), clean_up_tokenization_spaces=False))
        runs.append((text[len(before) :], bool(example.loss_mask[end - 1])))
        before = text
    return runs


def _marked(text: str, learned: bool, coloured: bool) -> str:
    if coloured:
        return f"{_LEARNED if learned else _NOT_LEARNED}{text}{_END}"
    return f"«{text}»" if learned else text
