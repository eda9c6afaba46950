"""The drawing `loss.png` of a run. It is for people to look at: a run does not stop because it cannot be drawn."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from qlora_jax.train import Unit, plot_losses

__all__ = ["LossPicture"]

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

    def draw(self, rows: list[dict[str, Any]]) -> None:
        """Draw the rows of the run so far; warn where that is not possible."""
        if self.failed:
            return
        try:
            plot_losses(rows, self.path, self.unit)
        except Exception as error:  # of many kinds: fonts, backends, folders of settings, disks
            self.failed = True
            reason = " ".join(str(error).split()) or type(error).__name__
            _logger.warning("%s: cannot be drawn (%s); the run goes on without it.", self.path, reason)
