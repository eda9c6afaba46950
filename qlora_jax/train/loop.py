"""The training loop: steps, evaluations, checkpoints and records around the pure step.

    while step < steps:
        state, metrics = step(state, frozen, next batch)
        stop if the loss or the gradient is not finite                       the last checkpoint is from before
        record; every so many steps evaluate, watch, and save state and data position together
        stop if the held-out loss has not fallen for so many evaluations     counted in the records

A checkpoint is taken between steps, with the position of the data iterator after the batches used so far and before those to
come, so that a run killed at any moment goes on as if it had not been.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from qlora_jax.errors import DivergedError
from qlora_jax.train.log import MetricsLog, best_evaluation, peak_memory_bytes
from qlora_jax.train.step import TOKENS, TrainState, Unit


class BatchSource(Protocol):
    """Batches with a position that can be saved."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps; 0 is never but at the end.

    Attributes:
        patience: evaluations without a lower held-out loss after which training stops; 0: never. A step with the lowest
            loss so far is saved in any case, so that a run never resumes from before its best.
    """

    steps: int
    evaluate_every: int
    save_every: int
    patience: int = 0

    def exhausted(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the records say that training has to stop."""
        return 0 < self.patience <= best_evaluation(rows)[1]


@dataclass(frozen=True)
class Watch:
    """Something looked at before the first step, every so many steps and after the last.

    Attributes:
        every: steps in between; 0: only before and after.
        look: (step, state) to figures for the record of that step.
        headline: the one of them that the progress line shows.
    """

    every: int
    look: Callable[[int, TrainState], dict[str, float]]
    headline: str | None = None


def train(
    step_fn: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    frozen: Any,
    batches: BatchSource,
    *,
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    cadence: Cadence,
    learning_rate: Callable[[int], Any],
    evaluate: Callable[[TrainState], dict[str, float]] | None,
    save: Callable[[int, TrainState, dict[str, Any]], None],
    log: MetricsLog,
    count_tokens: Callable[[dict[str, np.ndarray]], int],
    unit: Unit = TOKENS,
    watches: Sequence[Watch] = (),
    progress: bool = True,
) -> TrainState:
    """Runs from the step of `state` to the last one, or until patience is exhausted.

    Args:
        step_fn: the compiled step; it takes batches `[micro-batches, b, t]`.
        batches: yields arrays `[rows, t]`.
        put: brings a batch to the devices as `[micro-batches, b, t]`.
        evaluate: the `loss` and other figures of a state on held-out data, which go into the records as `eval_loss` and so
            on; None where nothing is held out.
        save: writes a checkpoint of (step, state, data position).
        count_tokens: how many real tokens a batch holds, for the speed.
        unit: what the loss of `step_fn` is a mean over.
        watches: what else is looked at, in this order.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the step is done and saved.
    """
    first = int(state.step)
    saved = first if first else None
    if first == 0:
        before = {} if evaluate is None else _held_out(evaluate(state))
        for watch in watches:
            before |= watch.look(0, state)
        if before:
            log.add({"step": 0, **before})
    if cadence.exhausted(log.rows):  # the run had stopped, and was killed before it was done
        return state
    bar = tqdm(total=cadence.steps, initial=first, desc="training", unit="step", disable=not progress)
    with bar, _deferred_interrupt() as interrupted:
        for step in range(first + 1, cadence.steps + 1):
            start = time.perf_counter()
            batch = next(batches)
            used = count_tokens(batch)
            state, metrics = step_fn(state, frozen, put(batch))
            values = {name: float(value) for name, value in metrics.items()}  # waits for the step
            seconds = time.perf_counter() - start
            _check_finite(step, values, saved)
            units, grad_norm = int(values.pop(unit.name)), values.pop("grad_norm")
            row = {
                "step": step,
                **values,
                "grad_norm": grad_norm,
                "learning_rate": float(learning_rate(step - 1)),
                f"learned_{unit.name}": units,
                "tokens_per_second": used / seconds,
                "peak_memory_bytes": peak_memory_bytes(),
            }
            last, interrupt = step == cadence.steps, interrupted.is_set()
            if evaluate is not None and (last or _due(step, cadence.evaluate_every)):
                row |= _held_out(evaluate(state))
            exhausted = cadence.exhausted([*log.rows, row])
            for watch in watches:
                if last or exhausted or _due(step, watch.every):
                    row |= watch.look(step, state)
            log.add(row)
            improved = cadence.patience > 0 and best_evaluation(log.rows)[0] == step
            if last or interrupt or exhausted or improved or _due(step, cadence.save_every):
                save(step, state, batches.get_state())
                saved = step
            bar.set_postfix_str(_describe(row, values, watches))
            bar.update()
            if exhausted:
                break
            if interrupt and not last:
                raise KeyboardInterrupt(f"stopped after step {step}, which is saved")
    return state


def mean_metrics(
    eval_step: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]],
    state: TrainState,
    frozen: Any,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    put: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    progress: bool = True,
) -> dict[str, float]:
    """The means of what `eval_step` sums, `loss` among them, over the units (such as learned tokens) of all batches."""
    total: dict[str, float] = {"loss": 0.0}
    units = 0.0
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not progress):
        sums, count = eval_step(state.adapter, frozen, put(batch))
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
        units += float(count)
    return {name: value / max(units, 1.0) for name, value in total.items()}


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that a step is not torn apart; a second signal acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # elsewhere no handler may be set
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, _: Any) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, remember)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_finite(step: int, values: dict[str, float], saved: int | None) -> None:
    bad = [f"{name} {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        kept = "no checkpoint was saved before" if saved is None else f"the last good checkpoint is that of step {saved}"
        raise DivergedError(
            f"step {step}: found {' and '.join(bad)}, expected finite numbers; {kept}. "
            "Try a lower learning rate or a longer warm-up."
        )


def _held_out(values: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in values.items()}


def _describe(row: dict[str, Any], means: dict[str, float], watches: Sequence[Watch]) -> str:
    parts = [f"{name} {value:.3f}" for name, value in means.items()]
    if "eval_loss" in row:
        parts.append(f"held-out {row['eval_loss']:.3f}")
    parts += [f"{name.replace('_', ' ')} {row[name]:.3f}" for name in (watch.headline for watch in watches) if name in row]
    parts += [f"{row['tokens_per_second']:.0f} tokens/s", f"peak {row['peak_memory_bytes'] / 2**30:.2f} GiB"]
    return ", ".join(parts)
