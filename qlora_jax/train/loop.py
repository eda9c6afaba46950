"""The training loop: steps, evaluations, checkpoints and records around the pure step.

    while step < steps:
        batch = make_batch(state, next batch)
        state, metrics = step(state, frozen, batch)
        stop if the loss or the gradient is not finite                       the last checkpoint is from before
        run the callbacks that are due, evaluation first, and add the record of the step
        save the state together with the position in the data, if that is due
        stop if the held-out loss has not fallen for some evaluations        counted in the records

A checkpoint is saved between steps. Its position in the data is after the batches used so far and before those to come, so
that a run that is killed at any moment can resume as if it had not been.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from qlora_jax.errors import DivergedError
from qlora_jax.interrupts import Interrupted, deferred
from qlora_jax.nn.hosts import any_process
from qlora_jax.train.log import MetricsLog, best_evaluation, peak_memory_bytes
from qlora_jax.train.step import TOKENS, TrainState, Unit

Batch = dict[str, np.ndarray]


class BatchSource(Protocol):
    """Batches of arrays `[rows, t]` with a position that can be saved."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...


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
    """

    steps: int
    save_every: int
    patience: int = 0

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
    """

    log: MetricsLog
    learning_rate: Callable[[int], Any]
    unit: Unit = TOKENS
    progress: bool = True

    def row(self, step: int, values: dict[str, float], *, tokens_per_second: float) -> dict[str, Any]:
        """Return the record of a step with these metrics."""
        means = {name: value for name, value in values.items() if name not in (self.unit.name, "grad_norm")}
        return {
            "step": step,
            **means,
            "grad_norm": values["grad_norm"],
            "learning_rate": float(self.learning_rate(step - 1)),
            f"learned_{self.unit.name}": int(values[self.unit.name]),
            "tokens_per_second": tokens_per_second,
            "peak_memory_bytes": peak_memory_bytes(),
        }


def train(
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    data: TrainingData,
    *,
    cadence: Cadence,
    records: Records,
    save: Callable[[int, TrainState, dict[str, Any]], None],
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
        save: writes a checkpoint of (step, state, position in the data).
        callbacks: run in this order. `evaluation`, whose held-out loss may stop the run, comes first; where it does, the
            others run once more.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
        Interrupted: after Ctrl-C or SIGTERM, once the step is done and saved; at once after a second signal.
    """
    log, first = records.log, int(state.step)
    saved = first if first else None
    if first == 0:
        before: dict[str, float] = {}
        for callback in callbacks:
            before |= callback.on_step(0, state)
        if before:
            log.add({"step": 0, **before})
    if cadence.exhausted(log.rows):  # the run had stopped, and was killed before it ended
        return state
    bar, step = tqdm(total=cadence.steps, initial=first, desc="training", unit="step", disable=not records.progress), first
    with bar, deferred("this step is finished and saved first; once more stops at once") as signals:
        for step in range(first + 1, cadence.steps + 1):
            state, values, speed = _run_step(step_fn, state, frozen, data)
            _check_finite(step, values, saved)
            row = records.row(step, values, tokens_per_second=speed)
            last, interrupt = step == cadence.steps, any_process(signals.number) is not None
            for callback in callbacks:
                stopping = cadence.patience > 0 and cadence.exhausted([*log.rows, row])
                if last or stopping or _due(step, callback.every):
                    row |= callback.on_step(step, state)
            log.add(row)
            exhausted = cadence.exhausted(log.rows)
            improved = cadence.patience > 0 and best_evaluation(log.rows)[0] == step
            if last or interrupt or exhausted or improved or _due(step, cadence.save_every):
                save(step, state, data.batches.get_state())
                saved = step
            bar.set_postfix_str(_describe(row, values, records.unit, callbacks))
            bar.update()
            if exhausted or interrupt:
                break
    number = any_process(signals.number)  # also one that arrived while the last step was saved
    if number is not None:
        raise Interrupted(f"stopped after step {step}, which is saved", number)
    return state


def mean_metrics(
    eval_step: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]],
    state: TrainState,
    frozen: Any,
    batches: Iterable[Batch],
    *,
    put: Callable[[Batch], dict[str, jax.Array]],
    progress: bool = True,
) -> dict[str, float]:
    """Return the means of what `eval_step` sums, `loss` among it, over the units (such as learned tokens) of all batches."""
    total: dict[str, float] = {"loss": 0.0}
    units = 0.0
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not progress):
        sums, count = eval_step(state.adapter, frozen, put(batch))
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
        units += float(count)
    return {name: value / max(units, 1.0) for name, value in total.items()}


def _run_step(
    step_fn: Callable[..., tuple[TrainState, dict[str, jax.Array]]], state: TrainState, frozen: Any, data: TrainingData
) -> tuple[TrainState, dict[str, float], float]:
    """Return (the next state, the metrics of the step, real tokens a second)."""
    start = time.perf_counter()
    batch = data.make_batch(state, next(data.batches))
    tokens = data.count_tokens(batch)
    state, metrics = step_fn(state, frozen, data.put(batch))
    values = {name: float(value) for name, value in metrics.items()}  # waits for the step
    return state, values, tokens / (time.perf_counter() - start)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(step: int, values: dict[str, float], saved: int | None) -> None:
    bad = [f"{name} {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        last = "no checkpoint was saved before" if saved is None else f"the last good checkpoint is that of step {saved}"
        raise DivergedError(
            f"step {step}: found {' and '.join(bad)}, expected finite numbers; {last}. "
            "Try a lower learning rate or a longer warm-up."
        )


def _describe(row: dict[str, Any], values: dict[str, float], unit: Unit, callbacks: Sequence[Callback]) -> str:
    """Return the progress line of a step."""
    means = {name: value for name, value in values.items() if name not in (unit.name, "grad_norm")}
    parts = [f"{name} {value:.3f}" for name, value in means.items()]
    if "eval_loss" in row:
        parts.append(f"held-out {row['eval_loss']:.3f}")
    headlines = (callback.headline for callback in callbacks)
    parts += [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in headlines if name in row]
    parts += [f"{row['tokens_per_second']:.0f} tokens/s", f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB"]
    return ", ".join(parts)
