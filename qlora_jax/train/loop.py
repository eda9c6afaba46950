"""The training loop: steps, evaluations, checkpoints and records around the pure step.

    while step < steps:
        batch = make_batch(state, next batch)
        state, metrics = step(state, frozen, batch)
        stop, skip or roll back if the step is bad                           `train.bad_steps`
        run the callbacks that are due, evaluation first, and add the record of the step
        start to save the state together with the position in the data, if that is due
        stop if the held-out loss has not fallen for some evaluations        counted in the records

A checkpoint is of the state between two steps. Its position in the data is after the batches used so far and before those to
come, so that a run that is killed at any moment can resume as if it had not been. It may be written during the next steps.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from qlora_jax.interrupts import Interrupted, deferred
from qlora_jax.nn.hosts import any_process
from qlora_jax.train.bad_steps import SKIPPED, BadStepPolicy, skipped_in_a_row
from qlora_jax.train.log import MetricsLog, best_evaluation, peak_memory_bytes
from qlora_jax.train.monitor import Monitor
from qlora_jax.train.step import TOKENS, TrainState, Unit

Batch = dict[str, np.ndarray]
_logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """Batches of arrays `[rows, t]` with a position that can be saved."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...


class Checkpoints(Protocol):
    """Where the states of a run are saved."""

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Start to write a checkpoint of a state and the position in the data; the state may change afterwards."""

    def wait(self) -> None:
        """Wait until the last checkpoint is complete."""

    def restore(self) -> TrainState:
        """Return the state of the newest checkpoint."""
        ...


def unchanged_batch(state: TrainState, batch: Batch) -> Batch:
    """Return the batch as it was read."""
    return batch


@dataclass(frozen=True)
class TrainingData:
    """The batches of a run, and how each becomes the input of a step.

    Attributes:
        batches: the batches as they are read, arrays `[rows, t]`.
        put: moves a batch to the devices as `[micro-batches, b, t]`.
        count_tokens: returns how many real tokens a batch holds, for the speed.
        make_batch: returns the batch to train on, given the current state and the batch that was read. An objective that
            generates its own data, for example by sampling from the current model, does so here. For a resumed run to
            repeat the same steps, the result must depend on its two arguments alone.
    """

    batches: BatchSource
    put: Callable[[Batch], dict[str, jax.Array]]
    count_tokens: Callable[[Batch], int]
    make_batch: Callable[[TrainState, Batch], Batch] = unchanged_batch


@dataclass(frozen=True)
class Cadence:
    """The steps of a run, and when it saves and stops.

    Attributes:
        steps: the number of steps of the whole run.
        save_every: the steps between two checkpoints; 0: only after the last step.
        patience: the number of evaluations without a lower held-out loss after which training stops; 0: it never does. With
            patience, a step with the lowest loss so far is always saved, so that a run never resumes from before its best.
        bad_steps: what is done about a step whose loss or gradient is not finite, or whose loss is a spike.
    """

    steps: int
    save_every: int
    patience: int = 0
    bad_steps: BadStepPolicy = field(default_factory=BadStepPolicy)

    def exhausted(self, rows: Sequence[dict[str, Any]]) -> bool:
        """Return whether the records say that training has to stop."""
        return 0 < self.patience <= best_evaluation(rows)[1]


@dataclass(frozen=True)
class Callback:
    """A function that runs before the first step, every so many steps, and after the last step.

    Attributes:
        every: the steps between two calls; 0: only before the first step and after the last.
        on_step: takes (step, state) and returns metrics for the record of that step.
        headline: the metric that the progress line shows.
    """

    every: int
    on_step: Callable[[int, TrainState], dict[str, float]]
    headline: str | None = None


def evaluation(every: int, evaluate: Callable[[TrainState], dict[str, float]]) -> Callback:
    """Return the callback that records the metrics of `evaluate` as `eval_loss` and so on.

    Args:
        every: the steps between two evaluations.
        evaluate: returns the `loss` and other metrics of a state on held-out data.
    """

    def on_step(step: int, state: TrainState) -> dict[str, float]:
        return {f"eval_{name}": value for name, value in evaluate(state).items()}

    return Callback(every, on_step)


@dataclass(frozen=True)
class Records:
    """What the loop records of each step, and where.

    Attributes:
        log: the rows.
        learning_rate: the learning rate by step.
        unit: the unit over which the loss is a mean.
        progress: whether to show a progress bar.
        monitor: what watches over the run.
    """

    log: MetricsLog
    learning_rate: Callable[[int], Any]
    unit: Unit = TOKENS
    progress: bool = True
    monitor: Monitor = field(default_factory=Monitor)

    def row(self, step: int, values: dict[str, float], *, tokens_per_second: float, skipped: int = 0) -> dict[str, Any]:
        """Return the record of a step with these metrics, before which the updates of so many steps were skipped."""
        means = {name: value for name, value in values.items() if name not in (self.unit.name, "grad_norm")}
        return {
            "step": step,
            **means,
            "grad_norm": values["grad_norm"],
            "learning_rate": float(self.learning_rate(step - 1 - skipped)),
            f"learned_{self.unit.name}": int(values[self.unit.name]),
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def skipped_row(self, step: int, problem: str, *, tokens_per_second: float) -> dict[str, Any]:
        """Return the record of a step whose update was left out."""
        speed = {"tokens_per_second": tokens_per_second, "peak_memory_bytes": peak_memory_bytes()}
        return {"step": step, SKIPPED: problem, **speed}


def train(
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    data: TrainingData,
    *,
    cadence: Cadence,
    records: Records,
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Run from the step of `state` to the last one, or until patience is exhausted; return the last state.

    Args:
        step_fn: the compiled step, which takes batches `[micro-batches, b, t]`.
        state: the state to start from.
        frozen: the values of the model that do not train.
        data: the batches.
        cadence: how many steps there are, and when to save and to stop.
        records: where the metrics go.
        checkpoints: where the state is saved. The last one is complete when the loop ends.
        callbacks: run in this order. `evaluation`, whose held-out loss may stop the run, comes first; where it does, the
            others run once more.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
        Interrupted: after Ctrl-C or SIGTERM, once the step is done and saved; at once after a second signal.
    """
    log, monitor, first = records.log, records.monitor, int(state.step)
    if first == 0:
        before: dict[str, float] = {}
        for callback in callbacks:
            with monitor.goodput.phase("evaluating"):
                before |= callback.on_step(0, state)
        if before:
            log.add({"step": 0, **before})
    if cadence.exhausted(log.rows):  # the run had stopped, and was killed before it ended
        return state
    maker = _StepMaker(step_fn, frozen, data, cadence.bad_steps, records, checkpoints, saved=first or None)
    bar, step = tqdm(total=cadence.steps, initial=first, desc="training", unit="step", disable=not records.progress), first
    with bar, deferred("this step is finished and saved first; once more stops at once") as signals:
        while step < cadence.steps:
            state, row = maker.next_row(state, step + 1)
            step = int(row["step"])
            last = step == cadence.steps
            for callback in callbacks:
                stopping = cadence.patience > 0 and cadence.exhausted([*log.rows, row])
                if last or stopping or _due(step, callback.every):
                    with monitor.goodput.phase("evaluating"):
                        row |= callback.on_step(step, state)
            exhausted, interrupt = cadence.exhausted([*log.rows, row]), any_process(signals.number) is not None
            if last or exhausted:
                row["goodput"] = monitor.goodput.share
            log.add(row)
            improved = cadence.patience > 0 and best_evaluation(log.rows)[0] == step
            if last or interrupt or exhausted or improved or _due(step, cadence.save_every):
                with monitor.goodput.phase("saving"):
                    checkpoints.save(step, state, data.batches.get_state())
                maker.saved, maker.rollbacks = step, 0
            bar.set_postfix_str(_describe(row, callbacks))
            bar.update(step - bar.n)
            monitor.report_health(row, cadence.steps)
            if exhausted or interrupt:
                break
        with monitor.goodput.phase("saving"):
            checkpoints.wait()  # while a signal is still deferred
    number = any_process(signals.number)  # also one that arrived while the last step was saved
    if number is not None:
        raise Interrupted(f"stopped after step {step}, which is saved", number)
    return state


@dataclass
class _StepMaker:
    """Makes the steps of a run, and does what its policy says about bad ones.

    Attributes:
        step_fn, frozen, data, policy, records, checkpoints: those of `train`.
        saved: the step of the newest checkpoint; None if there is none.
        rollbacks: how many times the run has gone back to that checkpoint.
        skipped: the number of steps so far whose updates were left out.
    """

    step_fn: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    frozen: Any
    data: TrainingData
    policy: BadStepPolicy
    records: Records
    checkpoints: Checkpoints
    saved: int | None
    rollbacks: int = 0
    skipped: int = field(init=False)

    def __post_init__(self) -> None:
        self._count_skipped()

    def _count_skipped(self) -> None:
        self.skipped = sum(SKIPPED in row for row in self.records.log.rows)

    def next_row(self, state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Make a step, and others in its place if it is rolled back; return the new state, and the record of its step.

        Raises:
            DivergedError: the policy says to stop.
        """
        policy, log, monitor, undone = self.policy, self.records.log, self.records.monitor, []
        while True:
            limit = policy.loss_limit(log.rows)
            with monitor.step(step):
                state, values, speed = self._run(state, policy.step_arguments(limit))
            problem = policy.problem(values, limit)
            if problem is None:
                row = self.records.row(step, values, tokens_per_second=speed, skipped=self.skipped)
                return state, row | ({"rolled_back": undone} if undone else {})
            before = skipped_in_a_row(log.rows) if policy.action == "skip" else self.rollbacks
            self.checkpoints.wait()  # so that the one that the policy names, or goes back to, is complete
            policy.check(step, problem, before=before, saved=self.saved)
            if policy.action == "skip":
                monitor.goodput.discard_step()
                self.skipped += 1
                _logger.warning("Step %d: %s; its update is left out.", step, problem)
                return state, self.records.skipped_row(step, problem, tokens_per_second=speed)
            with monitor.goodput.phase("starting"):
                del state  # else it would be in memory twice
                state = self.checkpoints.restore()
            bad, self.saved, self.rollbacks = step, int(state.step), self.rollbacks + 1
            removed = log.truncate(self.saved)
            self._count_skipped()
            earlier = [note for row in removed for note in row.get("rolled_back", [])]
            undone = [*earlier, *undone, f"step {bad}: {problem}"]
            _logger.warning(
                "Step %d: %s; back to the checkpoint of step %d, without the data since.", bad, problem, self.saved
            )
            step = self.saved + 1

    def _run(self, state: TrainState, limit: tuple[Any, ...]) -> tuple[TrainState, dict[str, float], float]:
        """Return (the next state, the metrics of the step, real tokens a second)."""
        data, start = self.data, time.perf_counter()
        with self.records.monitor.goodput.phase("data"):
            batch = next(data.batches)
        batch = data.make_batch(state, batch)
        tokens = data.count_tokens(batch)
        state, metrics = self.step_fn(state, self.frozen, data.put(batch), *limit)
        values = {name: float(value) for name, value in metrics.items()}  # waits for the step
        return state, values, tokens / (time.perf_counter() - start)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _describe(row: dict[str, Any], callbacks: Sequence[Callback]) -> str:
    """Return the progress line of a step."""
    names = list(row)
    means = names[1 : names.index("grad_norm")] if "grad_norm" in row else []
    parts = [SKIPPED] if SKIPPED in row else [f"{name} {row[name]:.3f}" for name in means]
    if "eval_loss" in row:
        parts.append(f"held-out {row['eval_loss']:.3f}")
    headlines = (callback.headline for callback in callbacks)
    parts += [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in headlines if name in row]
    parts += [f"{row['tokens_per_second']:.0f} tokens/s", f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB"]
    return ", ".join(parts)
