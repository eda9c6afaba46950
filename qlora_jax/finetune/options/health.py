"""The options that keep a long run healthy: what happens at bad and at stalled steps, and what is said about the run."""

import dataclasses
import re
from pathlib import Path

import jax

from qlora_jax.errors import OptionError
from qlora_jax.train import BAD_STEP_ACTIONS, BadStepAction, BadStepPolicy, Goodput, Monitor, ProfiledSteps, StallWatch

__all__ = ["PROFILE", "STALLED", "HealthOptions"]

STALLED, PROFILE = "stalled.txt", "profile"  # in the folder of the run


@dataclasses.dataclass(frozen=True)
class HealthOptions:
    """What happens at bad and at stalled steps, and what is said about the health of the run."""

    on_bad_step: BadStepAction = "stop"
    """What to do where the loss or the gradient is not finite or the loss is a spike: stop; skip the update; or roll back to
    the newest checkpoint and go on with the data after the bad batch."""
    bad_steps_in_a_row: int = 3
    """Number of bad steps in a row that are skipped, or of rollbacks to one checkpoint; one more stops the run."""
    loss_spike: float = 0.0
    """A loss is a spike if it is above the median of the last 64 by so many times their median deviation; 0: never."""
    stall_timeout: float = 1800.0
    """Seconds that a step may take before the stacks of all threads are written to stderr and stalled.txt; 0: any time."""
    stall_exit: bool = False
    """End the process with exit code 75 then, so that what started it can start it again."""
    health_every: float = 3600.0
    """Seconds between two lines about the health of the run in the log; 0: none."""
    profile_steps: str | None = None
    """Steps of which JAX's profiler writes a trace to the folder profile, such as 10-12; none if left out."""

    def __post_init__(self) -> None:
        problems = []
        if self.on_bad_step not in BAD_STEP_ACTIONS:
            problems.append(f"on_bad_step: expected one of {', '.join(BAD_STEP_ACTIONS)}, found {self.on_bad_step!r}")
        least = {"bad_steps_in_a_row": 1, "loss_spike": 0, "stall_timeout": 0, "health_every": 0}
        problems += [
            f"{name}: expected a number of at least {bound}, found {getattr(self, name)}"
            for name, bound in least.items()
            if not bound <= getattr(self, name) < float("inf")
        ]
        if self.stall_exit and self.stall_timeout == 0:
            problems.append("stall_exit: expected stall_timeout beside it, found 0")
        if self.profile_steps is not None and self._profiled() is None:
            problems.append(f"profile_steps: expected steps from 1 on such as 10-12, found {self.profile_steps!r}")
        if problems:
            raise OptionError("; ".join(problems))

    def _profiled(self) -> tuple[int, int] | None:
        """Return the first and the last step to profile; None if there are none."""
        found = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", self.profile_steps or "")
        if found is None:
            return None
        first, last = int(found[1]), int(found[2] or found[1])
        return (first, last) if 1 <= first <= last else None

    def policy(self) -> BadStepPolicy:
        """Return what is done at a bad step."""
        return BadStepPolicy(self.on_bad_step, self.bad_steps_in_a_row, self.loss_spike)

    def monitor(self, folder: Path, goodput: Goodput) -> Monitor:
        """Return what watches over a run; its files are in the run's folder. Each of several processes has its own trace."""
        steps = self._profiled()
        profile = folder / PROFILE / (str(jax.process_index()) if jax.process_count() > 1 else "")
        return Monitor(
            goodput,
            StallWatch(self.stall_timeout, folder / STALLED, exits=self.stall_exit),
            None if steps is None else ProfiledSteps(*steps, profile),
            self.health_every,
        )
