"""What the pictures have in common."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

__all__ = ["COLORS", "figure", "save"]

COLORS = ("#4063a0", "#d1495b", "#66a182", "#edae49", "#8d6b94", "#5c677d", "#00798c", "#b56b45")


def figure(rows: int, columns: int, *, height: float, **how: Any) -> tuple[Any, Any]:
    """Return a figure of the width of a page and its axes."""
    return plt.subplots(rows, columns, figsize=(7.2, height), layout="constrained", **how)


def save(fig: Any, path: Path) -> None:
    """Write a figure as SVG on white, with the same bytes each time."""
    fig.savefig(path, facecolor="white", dpi=150, metadata={"Date": None})
    plt.close(fig)
