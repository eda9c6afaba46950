"""Show the answers of a model before and after training to the same questions, side by side."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.questions import questions_of
from qlora_jax.models import Model
from qlora_jax.serve import generate

LONGEST_ANSWER = 96  # maximum number of tokens


def greedy(
    model: Model, prompts: Sequence[np.ndarray], *, eos_ids: frozenset[int], max_new_tokens: int = LONGEST_ANSWER
) -> list[list[int]]:
    """Return the greedy answers of a decoder, as token ids."""
    graphdef, state = nnx.split(model)
    return generate(graphdef, state, [prompt.tolist() for prompt in prompts], max_new_tokens=max_new_tokens, eos_ids=eos_ids)


def show_answers(
    before: Model,
    after: Model,
    prompts: Sequence[np.ndarray],
    answer: Callable[[Model, Sequence[np.ndarray]], list[list[int]]],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Print each question as a person asked it, and the answers of the model before and after training, side by side."""
    lefts, rights = ([_text(tokenizer, ids) for ids in answer(model, prompts)] for model in (before, after))
    width = max(30, min((shutil.get_terminal_size((120, 24)).columns - 3) // 2, 70))
    for question, left, right in zip(questions_of(prompts, tokenizer), lefts, rights, strict=True):
        print("\n" + "\n".join(textwrap.wrap(f"Prompt: {' '.join(question.split())}", 2 * width + 3)))
        print(f"{'before':<{width}} | after")
        columns = [_wrap(left, width), _wrap(right, width)]
        for row in range(max(map(len, columns))):
            cells = [column[row] if row < len(column) else "" for column in columns]
            print(f"{cells[0]:<{width}} | {cells[1]}")


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _wrap(text: str, width: int) -> list[str]:
    return [piece for line in text.splitlines() for piece in (textwrap.wrap(line, width) or [""])]
