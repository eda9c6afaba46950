"""The drawing `loss.png` of a run. It is for people to look at: a run does not stop because it cannot be drawn."""

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any

from qlora_jax.train import Unit, plot_losses

__all__ = ["LossPicture"]

_PAUSE_SECONDS = 60.0  # a drawing takes some tenths of a second, in which no step is made
_logger = logging.getLogger(__name__)


@dataclasses.dataclass
class LossPicture:
    """The picture of a run's losses.

    Attributes:
        path: its file.
        unit: the unit over which the losses are means.
        failed: whether it could not be drawn; it is then not drawn again.
    """

    path: Path
    unit: Unit
    failed: bool = False
    _drawn: float = -math.inf

    def draw_now_and_then(self, rows: list[dict[str, Any]]) -> None:
        """Draw the rows of the run so far, if the last drawing is a minute old."""
        if time.monotonic() - self._drawn >= _PAUSE_SECONDS:
            self.draw(rows)

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Draw the rows of the run so far; warn where that is not possible."""
        if self.failed:
            return
        self._drawn = time.monotonic()
        try:
            plot_losses(rows, self.path, self.unit)
        except Exception as error:  # of many kinds: fonts, backends, folders of settings, disks
            self.failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            _logger.warning("%s: cannot be drawn (%s); the run goes on without it.", self.path, reason)
