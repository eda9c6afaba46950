"""What a run does at a bad step: one whose loss or gradient is not finite, or whose loss is a spike.

    stop       raise DivergedError; the last checkpoint is from before
    skip       the adapter and the optimizer state stay as they were before the step, bit for bit (`train.step`)
    rollback   the newest checkpoint is restored, and training goes on with the data after the bad batch: none of the batches
               since that checkpoint is used again (PaLM, section 5.1, left out batches in the same way)

A loss is a spike if it is above

    m + k * max(d, m / 100)    m: the median of the last 64 good losses, d: their median distance from m

and at least 16 losses came before. The losses are those of the records, so that a resumed run decides alike.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from qlora_jax.errors import DivergedError, OptionError

__all__ = ["BAD_STEP_ACTIONS", "SKIPPED", "BadStepAction", "BadStepPolicy"]

BadStepAction = Literal["stop", "skip", "rollback"]
BAD_STEP_ACTIONS: tuple[BadStepAction, ...] = get_args(BadStepAction)
SKIPPED = "skipped"  # in the record of a step whose update was left out: what was wrong with it
WINDOW, LEAST = 64, 16


@dataclass(frozen=True)
class BadStepPolicy:
    """What is a bad step, and what is done about it.

    Attributes:
        action: what is done.
        most: so many bad steps in a row are skipped, and so many times in a row a run goes back to the same checkpoint; one
            more stops it.
        spike: the factor k of a spike; 0: no loss is one.

    Raises:
        OptionError: an unknown action, or a number out of range.
    """

    action: BadStepAction = "stop"
    most: int = 3
    spike: float = 0.0

    def __post_init__(self) -> None:
        if self.action not in BAD_STEP_ACTIONS:
            raise OptionError(f"action: expected one of {', '.join(BAD_STEP_ACTIONS)}, found {self.action!r}")
        if self.most < 1 or not 0 <= self.spike < math.inf:
            raise OptionError(
                f"most, spike: expected at least 1 and a number of at least 0, found {self.most}, {self.spike}"
            )

    def loss_limit(self, rows: Sequence[dict[str, Any]]) -> float:
        """Return the highest loss of the next step that is no spike, a float32 value; infinity where every loss may be.

        Args:
            rows: the records of the steps so far.
        """
        if self.spike == 0:
            return math.inf
        last = list(itertools.islice((row["loss"] for row in reversed(rows) if "loss" in row), WINDOW))
        if len(last) < LEAST:
            return math.inf
        median = float(np.median(last))
        deviation = float(np.median(np.abs(np.asarray(last) - median)))
        return float(np.float32(median + self.spike * max(deviation, abs(median) / 100)))

    def step_arguments(self, limit: float) -> tuple[np.float32, ...]:
        """Return the arguments of the step after the batch: the limit if the step itself leaves out a bad update."""
        return (np.float32(limit),) if self.action == "skip" else ()

    def problem(self, values: dict[str, float], limit: float) -> str | None:
        """Return what is bad about a step with these metrics, in words; None: nothing."""
        bad = [f"{name} {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            return f"found {' and '.join(bad)}, expected finite numbers"
        if values["loss"] > limit:
            return f"found loss {values['loss']:.4g}, expected at most {limit:.4g} after the losses before"
        return None

    def check(self, step: int, problem: str, *, before: int, saved: int | None) -> None:
        """Raise DivergedError where the run has to stop at a bad step.

        Args:
            step: the bad step.
            problem: what is bad about it.
            before: how many bad steps the run has gone over in a row, or how many times it has gone back to `saved`.
            saved: the step of the newest checkpoint; None if there is none.
        """
        last = "no checkpoint was saved before" if saved is None else f"the last good checkpoint is that of step {saved}"
        advice = "Try a lower learning rate or a longer warm-up."
        if self.action == "stop":
            advice += " With --on-bad-step skip or rollback, a run goes on without the bad batch."
        elif before >= self.most:
            problem += f", after {before} bad steps in a row" if self.action == "skip" else f", after {before} rollbacks"
        elif self.action == "skip" or saved is not None:
            return
        raise DivergedError(f"step {step}: {problem}; {last}. {advice}")


def skipped_in_a_row(rows: Sequence[dict[str, Any]]) -> int:
    """Return how many of the last steps were skipped."""
    return sum(1 for _ in itertools.takewhile(lambda row: SKIPPED in row, reversed(rows)))
