"""A judge without a server: the probabilities of the three verdicts after the prompt of a comparison.

The model reads the same prompt as a judge at an endpoint, and "Verdict: " as the start of its reply. Its verdict is the most
probable one of 1, 2 and 3 (a tie). Nothing is generated: a comparison is one forward pass, and every reply is a verdict.

"Verdict: 1" to "Verdict: 3" must differ in their last token alone, as for the letters of MMLU. Answers that are too long are
shortened, the longer one first, and never the question or the instruction.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from flax import nnx
from scipy.special import log_softmax

from qlora_jax.data import encode_prompt
from qlora_jax.errors import DataError
from qlora_jax.evaluate.choices import choice_logits
from qlora_jax.evaluate.judge.answers import Comparison
from qlora_jax.evaluate.judge.prompts import LAST_LINE, judge_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VerdictPrompts", "encode_comparisons", "verdict_log_probabilities"]

_BATCHES_AT_A_TIME = 4
_LEAST_CHARACTERS = 40  # of an answer that is shortened


@dataclass(frozen=True)
class VerdictPrompts:
    """Tokenized comparisons.

    Attributes:
        tokens: int32 `[t_i]`, the tokens of each, up to where the verdict follows.
        choices: the ids of the tokens of the verdicts 1, 2 and 3.
        shortened: number of comparisons whose answers were shortened.
    """

    tokens: tuple[np.ndarray, ...]
    choices: tuple[int, ...]
    shortened: int


def encode_comparisons(
    comparisons: Sequence[Comparison], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> VerdictPrompts:
    """Tokenize comparisons to at most `max_length` tokens each.

    Raises:
        DataError: the tokenizer has no separate token for each verdict, or a question alone is too long.
    """
    texts = [f"{LAST_LINE['verdicts']} {verdict}" for verdict in (1, 2, 3)]
    rows = cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])
    choices = tuple(row[-1] for row in rows)
    if len({tuple(row[:-1]) for row in rows}) != 1 or len(set(choices)) != len(choices):
        raise DataError(
            f"tokenizer: expected {texts[0]!r} to {texts[-1]!r} to differ in their last tokens alone, found {rows}"
        )
    start = np.asarray(rows[0][:-1], np.int32)

    def encode(comparison: Comparison) -> np.ndarray:
        return np.concatenate([encode_prompt(judge_messages(comparison, "verdicts", reasons=False), tokenizer), start])

    found, shortened = [], 0
    for comparison in comparisons:
        tokens = encode(comparison)
        shortened += len(tokens) > max_length
        while len(tokens) > max_length:
            comparison = _shorter(comparison, len(tokens), max_length)
            tokens = encode(comparison)
        found.append(tokens)
    return VerdictPrompts(tuple(found), choices, shortened)


def verdict_log_probabilities(
    graphdef: nnx.GraphDef[Any], state: Any, prompts: VerdictPrompts, *, batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield (indices of some comparisons, the log-probabilities of their three verdicts float64 `[n, 3]`), short ones first.

    The probabilities are those among the three verdicts, whatever else the model might have said.

    Args:
        graphdef, state: `nnx.split` of a `LanguageModel`.
        prompts: the tokenized comparisons.
        batch_size: number of comparisons in a batch.
    """
    order = sorted(range(len(prompts.tokens)), key=lambda index: len(prompts.tokens[index]))
    size = batch_size * _BATCHES_AT_A_TIME
    for first in range(0, len(order), size):
        indices = order[first : first + size]
        rows = [prompts.tokens[index] for index in indices]
        logits = choice_logits(graphdef, state, rows, prompts.choices, batch_size=batch_size)
        yield indices, log_softmax(logits.astype(np.float64), axis=1)


def _shorter(comparison: Comparison, length: int, max_length: int) -> Comparison:
    """Return the comparison with less of its longer answer."""
    answers = list(comparison.answers)
    place = int(len(answers[1]) > len(answers[0]))
    if len(answers[place]) <= _LEAST_CHARACTERS:
        raise DataError(
            f"question {comparison.question_id}: expected at most {max_length} tokens without the answers, found {length}; "
            "raise --max-length"
        )
    # As much as the excess needs at two characters a token, but no more than half: most tokens are longer.
    cut = min(max(2 * (length - max_length), _LEAST_CHARACTERS), len(answers[place]) // 2)
    answers[place] = answers[place][: len(answers[place]) - cut].rstrip() + " …"
    return replace(comparison, answers=(answers[0], answers[1]))
