"""The plots of a study, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from qlora_jax.evaluate import Interval
from scripts.studies.datatype_study.normality import SIGNIFICANCE
from scripts.studies.datatype_study.summary import Storage, by_kind

_LOWEST = 1e-3  # lower end of the logarithmic axis of differences


def draw_perplexities(storages: Sequence[Storage], path: Path) -> None:
    """Plot what each storage adds to the log-perplexity and to the accuracy of dense weights."""
    asked = [storage for storage in storages if storage.added_letters is not None]
    figure = Figure(figsize=(6 + 5 * bool(asked), 1.2 + 0.26 * len(storages)), layout="constrained")
    axes = figure.subplots(1, 1 + bool(asked), squeeze=False)[0]
    _forest(axes[0], storages, [storage.added for storage in storages], "log-perplexity added to dense weights")
    above = all(storage.added is None or storage.added.low > 0 for storage in storages)
    axes[0].set_xscale("log") if above else axes[0].set_xscale("symlog", linthresh=0.02)
    if asked:
        _forest(axes[1], asked, [storage.added_accuracy for storage in asked], "right answers added to dense weights")
    figure.savefig(path, dpi=110)


def draw_block_sizes(storages: Sequence[Storage], path: Path) -> None:
    """Plot the added log-perplexity against the bits per parameter, with a line for each data type."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, bool], list[tuple[float, Interval]]] = {}
    for storage in storages:
        if storage.how is not None and storage.added is not None:
            line = lines.setdefault((storage.how.data_type, storage.how.double_quantization), [])
            line.append((storage.bits, storage.added))
    names = list(dict.fromkeys(name for name, _ in lines))
    for (name, double), points in lines.items():
        points.sort(key=lambda point: point[0])
        values = np.asarray([max(added.value, _LOWEST) for _, added in points])
        ends = np.asarray([(max(added.low, _LOWEST), max(added.high, _LOWEST)) for _, added in points]).T
        errors = np.abs(ends - values)
        label = f"{name}{', double' if double else ''}"
        line, color, bits = "-" if double else "--", f"C{names.index(name)}", [bits for bits, _ in points]
        axes.errorbar(bits, values, errors, marker="o", ms=3, capsize=2, label=label, linestyle=line, color=color)
    axes.set(yscale="log", xlabel="bits needed a parameter", ylabel="log-perplexity added to dense weights")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def draw_layers(errors: dict[str, dict[str, Any]], normality: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot metrics by layer: the mean relative error of each data type; W and rejected units of each kind of matrix."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, of_matrices in errors.items():
        kinds = [[matrix["rms"] for matrix in values] for values in by_kind(of_matrices).values()]
        axes[0].plot(np.mean(kinds, axis=0), marker=".", label=name)
    axes[0].set(xlabel="layer", ylabel="relative rms error, mean over matrices", yscale="log")
    for kind, values in by_kind(normality).items():
        axes[1].plot([matrix["w"] for matrix in values], marker=".", label=kind)
        axes[2].plot([matrix["rejected_units"] / matrix["units"] for matrix in values], marker=".", label=kind)
    axes[1].set(xlabel="layer", ylabel="Shapiro-Wilk W of a sample of the matrix")
    axes[2].set(xlabel="layer", ylabel="share of units that are not normal")
    axes[2].axhline(SIGNIFICANCE, color="black", linestyle=":", label="if all were normal")
    for one in axes:
        one.grid(alpha=0.3)
        one.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def _forest(axes: Any, storages: Sequence[Storage], intervals: Sequence[Interval | None], title: str) -> None:
    for place, (storage, found) in enumerate(zip(storages, intervals, strict=True)):
        if found is None or storage.how is None:
            continue
        color = "tab:blue" if storage.how.double_quantization else "tab:orange"
        axes.plot([found.low, found.high], [place, place], color=color)
        axes.plot(found.value, place, "o", ms=4, color=color)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(storages)), [storage.key for storage in storages], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.set_xlabel(title)
