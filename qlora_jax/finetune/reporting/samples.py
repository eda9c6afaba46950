"""Greedy answers to the same held-out prompts during a run, written to `samples.jsonl` and printed.

{"step": 20, "prompt": "…", "answer": "…"}       one line per prompt; a resumed run removes the lines of later steps

The file has the whole prompt with its template. The printed message has only the question.
"""

import sys
from collections.abc import Sequence
from typing import cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.data.questions import questions_of
from qlora_jax.train import MetricsLog

__all__ = ["record_samples"]


def record_samples(
    step: int,
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerFast,
    log: MetricsLog,
) -> None:
    """Print and record each prompt with its answer.

    Args:
        step: the step of the run.
        prompts: token ids.
        answers: token ids of the answer to each prompt.
        tokenizer: decodes both.
        log: samples.jsonl.
    """
    for prompt, question, tokens in zip(prompts, questions_of(prompts, tokenizer), answers, strict=True):
        text = _text(tokenizer, tokens)
        log.add({"step": step, "prompt": _text(tokenizer, prompt.tolist()), "answer": text})
        tqdm.write(f"[step {step}] {' '.join(question.split())}\n  → {text}", file=sys.stderr)  # above a progress bar


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
