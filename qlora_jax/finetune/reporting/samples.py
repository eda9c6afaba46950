"""Greedy answers to the same held-out prompts during a run, written to `samples.jsonl` and printed.

{"step": 20, "prompt": "…", "answer": "…"}       one line per prompt; a resumed run removes the lines of later steps

The file has the whole prompt with its template. The printed message has only the question.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.questions import questions_of
from qlora_jax.train import MetricsLog

Answer = Callable[[Any, Sequence[np.ndarray]], list[list[int]]]


def record_samples(
    step: int, model: Any, prompts: Sequence[np.ndarray], answer: Answer, tokenizer: PreTrainedTokenizerFast, log: MetricsLog
) -> None:
    """Answer all prompts; print and record each with its answer.

    Args:
        prompts: token ids.
        answer: takes the model and the prompts, returns the token ids of the answers.
    """
    questions = questions_of(prompts, tokenizer)
    for prompt, question, tokens in zip(prompts, questions, answer(model, prompts), strict=True):
        text = _text(tokenizer, tokens)
        log.add({"step": step, "prompt": _text(tokenizer, prompt.tolist()), "answer": text})
        tqdm.write(f"[step {step}] {' '.join(question.split())}\n  → {text}", file=sys.stderr)  # above a progress bar


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
