"""MMLU during a run: before the first step, every so many steps, and of the adapter that is kept."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from transformers import PreTrainedTokenizerFast

from qlora_jax.evaluate import Prompts, encode_questions, evaluate_mmlu, read_questions
from qlora_jax.finetune.options.options import Options
from qlora_jax.models import DecoderConfig, ModelConfig

ACCURACY = "mmlu_accuracy"


def read_prompts(
    options: Options, tokenizer: PreTrainedTokenizerFast, config: ModelConfig, say: Callable[[str], None]
) -> Prompts | None:
    """What `options.watch` asks for, as tokens; None for no questions.

    Raises:
        ValueError, OSError: questions that cannot be used, or not with this model.
    """
    watch = options.watch
    if watch.mmlu is None:
        return None
    if not isinstance(config, DecoderConfig):
        raise ValueError("mmlu: expected a decoder, which goes on a text, found an encoder-decoder")
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
    say(f"MMLU: {questions}; {prompts}")
    return prompts


def figures(model: Any, prompts: Prompts, options: Options, *, progress: bool) -> dict[str, float]:
    """Asks the model: `mmlu_accuracy`, and that of each subject."""
    graphdef, state = nnx.split(model)
    scores = evaluate_mmlu(graphdef, state, prompts, batch_size=options.watch.mmlu_batch_size, progress=progress)
    return scores.metrics()


def conclude(rows: list[dict[str, Any]], kept: int, ask: Callable[[], dict[str, float]]) -> str:
    """The accuracy before and after in words.

    Args:
        kept: the step whose adapter is kept. Where no record has its accuracy (early stopping went back to an earlier
            step), `ask` measures it.
    """
    accuracies = {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}
    after = accuracies[kept] if kept in accuracies else ask()[ACCURACY]
    before = f"{accuracies[0]:.3f} before, " if 0 in accuracies else ""
    return f"MMLU accuracy {before}{after:.3f} after (mean over subjects)."
