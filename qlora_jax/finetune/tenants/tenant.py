"""One tenant while many train: its position in its own run, its files, and what became of it."""

import dataclasses
import logging
import math
from contextlib import ExitStack, closing
from typing import Any, Literal

import numpy as np

from qlora_jax.errors import DivergedError
from qlora_jax.finetune.folder import CHECKPOINTS, claim, start
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.prepare import PreparedRun
from qlora_jax.finetune.reporting.picture import LossPicture
from qlora_jax.train import MetricsLog, Records
from qlora_jax.train.state_store import StateStore

__all__ = ["Status", "Tenant", "open_tenant"]

Status = Literal["waiting", "training", "finished", "set aside"]
_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Tenant:
    """A tenant's run.

    Attributes:
        name: its name.
        run: its prepared run.
        log, store, picture: its files.
        records: makes the rows of `log`.
        status: what it does now.
        slot: its slot in the bank while it trains, else 0.
        step: the updates done.
        saved: the step of the newest checkpoint; None: there is none.
        reason: why it was set aside.
    """

    name: str
    run: PreparedRun
    log: MetricsLog
    store: StateStore
    picture: LossPicture
    records: Records
    status: Status = "waiting"
    slot: int = 0
    step: int = 0
    saved: int | None = None
    reason: str = ""

    def set_aside(self, error: Exception) -> None:
        """Let the tenant no longer train; the others go on."""
        saved = "nothing is saved" if self.saved is None else f"step {self.saved} is saved"
        self.status, self.reason = "set aside", str(error)
        _logger.warning("%s is set aside at step %d (%s): %s", self.name, self.step, saved, error)

    def check_finite(self, loss: float, norm: float) -> None:
        """Raise DivergedError if the loss or the gradient norm of the step is not finite; see `train.loop`."""
        bad = [f"{name} {value}" for name, value in (("loss", loss), ("grad_norm", norm)) if not math.isfinite(value)]
        if bad:
            raise DivergedError(
                f"step {self.step + 1}: found {' and '.join(bad)}, expected finite numbers. Try a lower learning rate or a "
                "longer warm-up."
            )

    def due(self, every: int) -> bool:
        """Return whether something is due at this step that happens every so many steps, and at the last one."""
        return self.step == self.run.steps or (every > 0 and self.step % every == 0)

    def save(self, values: Any) -> None:
        """Write a checkpoint with the values of the tenant's slot."""
        self.store.save(self.step, values, self.run.batches.get_state())
        self.saved = self.step
        self.picture.draw(self.log.rows)

    @property
    def last_loss(self) -> float:
        """The loss of the last step; NaN before the first."""
        return next((row["loss"] for row in reversed(self.log.rows) if "loss" in row), float(np.nan))

    @property
    def last_held_out(self) -> float:
        """The last held-out loss; NaN if there is none."""
        return next((row["eval_loss"] for row in reversed(self.log.rows) if "eval_loss" in row), float(np.nan))


def open_tenant(name: str, run: PreparedRun, files: ExitStack) -> Tenant:
    """Lock the folder of a tenant, and open its files; they are closed with `files`.

    Raises:
        QLoRAError: another run works in the folder, or its checkpoint is damaged.
        OSError: the folder cannot be written.
    """
    options, output = run.options, run.options.run.output
    files.enter_context(locked(output))
    claim(options)  # another run may have ended here in the meantime
    start(options, run.objective.held_out_checksum)
    store = files.enter_context(closing(StateStore(output / CHECKPOINTS, keep=options.run.keep)))
    saved = store.latest_step()
    log = files.enter_context(closing(MetricsLog(output / "metrics.jsonl", resume_at=saved or 0)))
    unit = run.spec.objective.unit
    records = Records(log, run.learning_rate, unit, progress=False)
    return Tenant(name, run, log, store, LossPicture(output / "loss.png", unit), records, step=saved or 0, saved=saved)
