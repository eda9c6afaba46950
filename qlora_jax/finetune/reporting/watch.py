"""What is watched during a run, put together: MMLU (mmlu.py), answers (samples.py), trackers (trackers.py).

prepare      everything that can be wrong is found, before the weights are read
opened       the callbacks of the loop, with their files open
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora_jax.cli import to_dict
from qlora_jax.evaluate import Prompts
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.reporting import mmlu, samples
from qlora_jax.finetune.reporting.hub import check_repository
from qlora_jax.finetune.reporting.trackers import check_trackers, open_trackers
from qlora_jax.models import ModelConfig
from qlora_jax.train import Callback, MetricsLog, TrainState


@dataclass(frozen=True)
class Watched:
    """What a run watches.

    Attributes:
        questions: of MMLU; None for none.
    """

    options: Options
    tokenizer: PreTrainedTokenizerFast
    questions: Prompts | None
    progress: bool


def prepare(
    options: Options,
    tokenizer: PreTrainedTokenizerFast,
    config: ModelConfig,
    say: Callable[[str], None],
    *,
    progress: bool,
) -> Watched:
    """Raises ValueError or OSError where something that is asked for cannot be watched."""
    check_trackers(options.watch.report_to)
    if options.watch.push_to_hub:
        check_repository(options.watch.push_to_hub, private=options.watch.hub_private)
    return Watched(options, tokenizer, mmlu.read_prompts(options, tokenizer, config, say), progress)


def check_prompts(options: Options, prompts: Sequence[np.ndarray]) -> None:
    """Raises ValueError where prompts are to be answered during the run, and there are none."""
    if options.watch.sample_every and not prompts:
        raise ValueError("sample_every: expected held-out examples with something before what is learned, found none")


def opened(
    watched: Watched,
    prompts: Sequence[np.ndarray],
    answer: samples.Answer,
    model_of: Callable[[TrainState], Any],
    log: MetricsLog,
    *,
    resume_at: int,
    stack: ExitStack,
) -> list[Callback]:
    """Return the callbacks of the loop; the trackers listen to `log`, and `stack` closes what is open.

    Args:
        prompts: held-out prompts, as token ids, to answer now and then.
        answer: (model, prompts) to the token ids of the answers.
        model_of: the model with the adapter of a state.
        resume_at: step from which the run goes on.
    """
    options = watched.options
    callbacks: list[Callback] = []
    if (questions := watched.questions) is not None:

        def ask(step: int, state: TrainState) -> dict[str, float]:
            return mmlu.figures(model_of(state), questions, options, progress=watched.progress)

        callbacks.append(Callback(options.watch.mmlu_every, ask, mmlu.ACCURACY))
    if options.watch.sample_every:
        record = stack.enter_context(closing(MetricsLog(options.run.output / "samples.jsonl", resume_at=resume_at)))

        def answer_prompts(step: int, state: TrainState) -> dict[str, float]:
            samples.record_samples(step, model_of(state), prompts, answer, watched.tokenizer, record)
            return {}

        callbacks.append(Callback(options.watch.sample_every, answer_prompts))
    log.listeners += open_trackers(
        options.watch.report_to,
        options.run.output,
        to_dict(options),
        resume_at=resume_at,
        reached=log.reached,
        stack=stack,
    )
    return callbacks
