"""MMLU during a run: before the first step, every so many steps, and of the adapter that is saved."""

import logging
from collections.abc import Callable
from typing import Any

from flax import nnx
from transformers import PreTrainedTokenizerFast

from qlora_jax.errors import UnsupportedError
from qlora_jax.evaluate import Prompts, encode_questions, evaluate_mmlu, read_questions
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig

__all__ = ["ACCURACY", "describe", "measure", "read_prompts"]

ACCURACY = "mmlu_accuracy"
_logger = logging.getLogger(__name__)


def read_prompts(options: Options, tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> Prompts | None:
    """Return the questions that `options.watch` names, as tokens; None for no questions.

    Raises:
        QLoRAError: questions that cannot be used, or not with this model.
        OSError: questions that cannot be read.
    """
    watch = options.watch
    if watch.mmlu is None:
        return None
    if not isinstance(config, DecoderConfig):
        raise UnsupportedError("mmlu: expected a decoder, which continues a text, found an encoder-decoder")
    questions = read_questions(
        watch.mmlu,
        split=watch.mmlu_split,
        shots=watch.mmlu_shots,
        examples=watch.mmlu_examples,
        limit=watch.mmlu_limit,
        seed=options.run.seed,
    )
    longest = watch.mmlu_max_length if config.endless else min(watch.mmlu_max_length, config.max_position_embeddings)
    prompts = encode_questions(questions.questions, tokenizer, longest)
    _logger.info("MMLU: %s; %s", questions, prompts)
    return prompts


def measure(model: Any, prompts: Prompts, options: Options, *, progress: bool) -> dict[str, float]:
    """Ask the model the questions; return `mmlu_accuracy` and the accuracy of each subject."""
    graphdef, state = nnx.split(model)
    scores = evaluate_mmlu(graphdef, state, prompts, batch_size=options.watch.mmlu_batch_size, progress=progress)
    return scores.metrics()


def describe(rows: list[dict[str, Any]], chosen_step: int, ask: Callable[[], dict[str, float]]) -> str:
    """Return the accuracy before and after in words.

    Args:
        rows: the rows of the run.
        chosen_step: the step whose adapter is saved.
        ask: measures the accuracy of that adapter; called where no row has it, which can be with early stopping.
    """
    accuracies = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
    after = accuracies[chosen_step] if chosen_step in accuracies else ask()[ACCURACY]
    before = f"{accuracies[0]:.3f} before, " if 0 in accuracies else ""
    return f"MMLU accuracy {before}{after:.3f} after (mean over subjects)."
