"""The table of all tenants, which is drawn anew in place in a terminal, and now and then written to the log elsewhere."""

import logging
import math
import sys
import time
from collections.abc import Iterable

from qlora_jax.finetune.tenants.tenant import Tenant

__all__ = ["Table", "rows_of_table"]

_logger = logging.getLogger(__name__)
_REDRAW_SECONDS, _LOG_SECONDS = 0.5, 30.0


def rows_of_table(tenants: Iterable[Tenant]) -> list[str]:
    """Return the lines of the table: a head, and one line for each tenant."""
    tenants = list(tenants)
    width = max(len("tenant"), *(len(tenant.name) for tenant in tenants))
    lines = [f"{'tenant':{width}}  status     step          loss   held-out"]
    for tenant in tenants:
        done = f"{tenant.step}/{tenant.run.steps}"
        losses = "".join(f"{_number(loss):>10}" for loss in (tenant.last_loss, tenant.last_held_out))
        lines.append(f"{tenant.name:{width}}  {tenant.status:9}  {done:9}{losses}{_short(tenant.reason)}")
    return lines


class Table:
    """The table on stderr."""

    def __init__(self, *, progress: bool) -> None:
        """Make a table; without `progress` nothing is ever shown."""
        self._progress, self._terminal = progress, sys.stderr.isatty()
        self._drawn, self._last = 0, -math.inf

    def show(self, tenants: Iterable[Tenant], *, now: bool = False) -> None:
        """Show the tenants if that is due; with `now` in any case."""
        pause = _REDRAW_SECONDS if self._terminal else _LOG_SECONDS
        if not self._progress or (not now and time.monotonic() - self._last < pause):
            return
        self._last, lines = time.monotonic(), rows_of_table(tenants)
        if not self._terminal:
            _logger.info("%s", "\n".join(lines))
            return
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        sys.stderr.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stderr.flush()
        self._drawn = len(lines)

    def interrupt(self) -> None:
        """Leave the drawn table where it is: what is written next comes below it."""
        self._drawn = 0


def _number(loss: float) -> str:
    return "" if math.isnan(loss) else f"{loss:.3f}"


def _short(reason: str) -> str:
    line = " ".join(reason.split())
    return f"  {line[:77] + '…' if len(line) > 78 else line}" if line else ""
