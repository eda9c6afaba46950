"""The callbacks that the options ask for: MMLU (mmlu.py), answers to prompts (samples.py), trackers (trackers.py).

check_reporting        finds everything that can be wrong with trackers and the hub, before any weights are read
reporting_callbacks    returns the callbacks of the loop, with their files open
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.cli import to_dict
from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.reporting import mmlu, samples
from qlora_jax.finetune.reporting.hub import check_repository
from qlora_jax.finetune.reporting.trackers import check_trackers, open_trackers
from qlora_jax.nn import is_main
from qlora_jax.train import Callback, MetricsLog, TrainState

if TYPE_CHECKING:
    from qlora_jax.finetune.prepare import PreparedRun

__all__ = ["check_prompts", "check_reporting", "reporting_callbacks"]


def check_reporting(options: Options) -> None:
    """Check the trackers and the repository on the hub.

    Raises:
        OptionError: a tracker or a repository that cannot be used.
        ConnectionError: the hub cannot be reached.
    """
    check_trackers(options.watch.report_to)
    if is_main() and options.watch.push_to_hub:
        check_repository(options.watch.push_to_hub, private=options.watch.hub_private)


def check_prompts(options: Options, prompts: Sequence[np.ndarray]) -> None:
    """Raise OptionError where prompts are to be answered during the run, and there are none."""
    if options.watch.sample_every and not prompts:
        raise OptionError("sample_every: expected held-out examples with something before what is learned, found none")


def reporting_callbacks(
    run: "PreparedRun",
    model_of: Callable[[TrainState], Any],
    log: MetricsLog,
    *,
    resume_at: int,
    open_files: ExitStack,
) -> list[Callback]:
    """Return the callbacks of the loop; the trackers listen to `log`.

    Args:
        run: the run.
        model_of: returns the model with the adapter of a state.
        log: the rows of the run.
        resume_at: the step from which the run continues.
        open_files: closes the files that are opened here.
    """
    options, objective = run.options, run.objective
    callbacks: list[Callback] = []
    if (questions := run.questions) is not None:

        def ask(step: int, state: TrainState) -> dict[str, float]:
            return mmlu.measure(model_of(state), questions, options, progress=run.progress)

        callbacks.append(Callback(options.watch.mmlu_every, ask, mmlu.ACCURACY))
    if options.watch.sample_every:
        record = open_files.enter_context(closing(MetricsLog(options.run.output / "samples.jsonl", resume_at=resume_at)))

        def answer_prompts(step: int, state: TrainState) -> dict[str, float]:
            if record.rows and record.rows[-1]["step"] >= step:  # a rollback has undone these steps
                record.truncate(step - 1)
            answers = objective.answer(model_of(state), objective.prompts)
            samples.record_samples(step, objective.prompts, answers, run.pretrained.tokenizer, record)
            return {}

        callbacks.append(Callback(options.watch.sample_every, answer_prompts))
    if not is_main():
        return callbacks
    log.listeners += open_trackers(
        options.watch.report_to,
        options.run.output,
        to_dict(options),
        resume_at=resume_at,
        reached=log.reached,
        open_files=open_files,
    )
    return callbacks
