"""Checks that a model has an embedding for each token of a text.

A tokenizer may have more tokens than the embedding has rows: all sizes of Gemma 3 share a tokenizer with a token for
pictures, for which the smallest ones have no row.
"""

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NAME_EOS", "check_ids"]

NAME_EOS = 'Name the token that ends a text of this model in its tokenizer_config.json, as in {"eos_token": "</s>"}.'


def check_ids(
    ids: ArrayLike, tokenizer: "PreTrainedTokenizerBase", vocabulary: int | None, place: str = ""
) -> Literal[True]:
    """Return True, or raise DataError where a text has a token for which the model has no embedding.

    Args:
        ids: the tokens of the text, integers.
        tokenizer: gives the text of the token.
        vocabulary: the number of rows of the embedding; None: not known, and nothing is checked.
        place: what comes before the message, such as "prompt: ".
    """
    highest = int(np.max(np.asarray(ids, np.int64), initial=-1))
    if vocabulary is not None and highest >= vocabulary:
        raise DataError(
            f"{place}expected tokens for which the model has an embedding (ids below {vocabulary}), found "
            f"{tokenizer.convert_ids_to_tokens(highest)!r} ({highest}); take it out of the text"
        )
    return True
