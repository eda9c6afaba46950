"""One tenant while many train: its position in its own run, its files, and what became of it.

A tenant's files are open while it trains only, so that thousands of tenants that wait need none. A file named `pause` in its
folder lets it rest: it is saved and gives its slot away at the next round, and goes on once the file is gone.
"""

import dataclasses
import logging
import math
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any, Literal

from qlora_jax.errors import DivergedError
from qlora_jax.finetune.folder import CHECKPOINTS, claim, start
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.prepare import PreparedRun
from qlora_jax.finetune.reporting.picture import LossPicture
from qlora_jax.train import MetricsLog, Records
from qlora_jax.train.state_store import StateStore, latest_step

__all__ = ["Files", "Status", "Tenant", "pause", "unpause"]

Status = Literal["waiting", "training", "paused", "finished", "set aside"]
PAUSE = "pause"
_logger = logging.getLogger(__name__)


def pause(folder: Path) -> None:
    """Let the tenant of a folder rest from its next round on, until `unpause`; also from another process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PAUSE).touch()


def unpause(folder: Path) -> None:
    """Let a tenant go on that `pause` let rest: in the process that trains, or the next time the command runs."""
    (folder / PAUSE).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Files:
    """The open files of a tenant; `records` makes the rows of `log`."""

    log: MetricsLog
    store: StateStore
    picture: LossPicture
    records: Records


@dataclasses.dataclass
class Tenant:
    """A tenant's run.

    Attributes:
        name: its name.
        run: its prepared run.
        status: what it does now.
        slot: its slot in the bank, else 0.
        step: the updates done.
        saved: the step of the newest checkpoint; None: there is none.
        reason: why it was set aside.
        last_loss, last_held_out: the last losses; NaN before the first.
    """

    name: str
    run: PreparedRun
    status: Status = "waiting"
    slot: int = 0
    step: int = 0
    saved: int | None = None
    reason: str = ""
    last_loss: float = math.nan
    last_held_out: float = math.nan
    _began: bool = False
    _files: Files | None = None
    _open: ExitStack = dataclasses.field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        if not self.run.options.run.overwrite:
            self.saved = latest_step(self.run.options.run.output / CHECKPOINTS)
            self.step = self.saved or 0

    @property
    def files(self) -> Files:
        """Its open files."""
        assert self._files is not None, f"{self.name} has no open files"
        return self._files

    def open(self) -> None:
        """Lock the folder of the tenant, and open its files.

        Raises:
            QLoRAError: another run works in the folder, or its checkpoint is damaged.
            OSError: the folder cannot be written.
        """
        options, output = self.run.options, self.run.options.run.output
        if self._began:  # its own run is not to be overwritten after a pause
            options = dataclasses.replace(options, run=dataclasses.replace(options.run, overwrite=False))
        with ExitStack() as files:
            files.enter_context(locked(output))
            claim(options)  # another run may have ended here in the meantime
            start(options, self.run.objective.held_out_checksum)
            self._began = True
            store = files.enter_context(closing(StateStore(output / CHECKPOINTS, keep=options.run.keep, reuse=False)))
            self.saved = store.latest_step()
            self.step = self.saved or 0
            log = files.enter_context(closing(MetricsLog(output / "metrics.jsonl", resume_at=self.step)))
            unit = self.run.spec.objective.unit
            records = Records(log, self.run.learning_rate, unit, progress=False)
            self._files = Files(log, store, LossPicture(output / "loss.png", unit), records)
            for row in log.rows:
                self.note(row)
            self._open = files.pop_all()

    def close(self) -> None:
        """Close its files and unlock its folder."""
        self._files = None
        self._open.close()

    def add(self, row: dict[str, Any]) -> None:
        """Add a row to its records."""
        self.files.log.add(row)
        self.note(row)

    def note(self, row: dict[str, Any]) -> None:
        """Remember the losses of a row of its records."""
        self.last_loss = row.get("loss", self.last_loss)
        self.last_held_out = row.get("eval_loss", self.last_held_out)

    def wants_pause(self) -> bool:
        """Return whether its folder holds a file named `pause`; a folder that cannot be read holds none."""
        with suppress(OSError):
            return (self.run.options.run.output / PAUSE).exists()
        return False

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
        self.files.store.save(self.step, values, self.run.batches.get_state())
        self.files.store.wait()
        self.saved = self.step
        self.files.picture.draw(self.files.log.rows)
