"""Answers during a run: greedy ones to the same held-out prompts, into `samples.jsonl` and onto the screen.

{"step": 20, "prompt": "…", "answer": "…"}       a line each; a run that resumes drops those of later steps
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.train import MetricsLog

Answer = Callable[[Any, Sequence[np.ndarray]], list[list[int]]]


def record_samples(
    step: int, model: Any, prompts: Sequence[np.ndarray], answer: Answer, tokenizer: PreTrainedTokenizerFast, log: MetricsLog
) -> None:
    """Answers all prompts; shows and records each with its answer.

    Args:
        prompts: token ids.
        answer: (model, prompts) to the token ids of the answers.
    """
    for prompt, tokens in zip(prompts, answer(model, prompts), strict=True):
        asked, said = (_text(tokenizer, ids) for ids in (prompt.tolist(), tokens))
        log.add({"step": step, "prompt": asked, "answer": said})
        tqdm.write(f"[step {step}] {' '.join(asked.split())}\n  → {said}", file=sys.stderr)  # above a progress bar


def _text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids), skip_special_tokens=True)).strip()
