"""Summarise measurements as metrics with intervals.

The metrics of a storage over texts are the mean log-perplexity with its interval, and the mean difference from dense weights
on the same texts. Types are ordered by their means. Each type is compared with the one before it by the interval of their
differences on the same texts: "worse" if the interval is above 0, "better" if it is below, else "no clear difference". Each
interval is a separate 95 % interval.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.evaluate import Interval, mean_interval, paired_difference, share_interval
from qlora_jax.quant import Quantization

DENSE = "dense"
# Table 2 of the paper, the best first; E2M1 is bitsandbytes' there, and only NormalFloat had double quantisation.
PAPER = (("nf4", True), ("fp4-e3m0", False), ("fp4", False), ("int4", False))


@dataclasses.dataclass(frozen=True)
class Storage:
    """The metrics of one storage.

    Attributes:
        how: the quantisation; None for dense weights.
        bits: bits per parameter that it needs.
        stored: bits per parameter that it takes here.
        error: root of the mean over matrices of the squared relative rms error.
        log_perplexity: mean over texts.
        loss: mean over all tokens.
        added: paired difference of the log-perplexity from dense weights; None for dense weights.
        accuracy: share of right answers; None without questions.
        letters: log loss of the right letter among the four; None without questions.
        added_accuracy: paired difference of the accuracy from dense weights.
        added_letters: paired difference of the log loss from dense weights.
    """

    key: str
    how: Quantization | None
    bits: float
    stored: float
    error: float
    log_perplexity: Interval
    loss: float
    added: Interval | None
    accuracy: Interval | None
    letters: Interval | None
    added_accuracy: Interval | None
    added_letters: Interval | None


def key_of(how: Quantization | None) -> str:
    """Return the name of a storage in files, such as `nf4-64-double`."""
    if how is None:
        return DENSE
    return f"{how.data_type}-{how.block_size}{'-double' if how.double_quantization else ''}"


def storage_of(how: Quantization | None, rows: dict[str, Any], predicted: np.ndarray, bits: tuple[float, float]) -> Storage:
    """Return the metrics of a storage; dense weights must be measured too."""
    row, dense = rows[key_of(how)], rows[DENSE]
    log_perplexity = np.asarray(row["losses"]) / predicted
    asked = row.get("right") is not None
    paired = asked and how is not None
    errors = [error["rms"] for error in row.get("errors", {}).values()]
    return Storage(
        key=key_of(how),
        how=how,
        bits=bits[0],
        stored=bits[1],
        error=float(np.sqrt(np.mean(np.square(errors)))) if errors else 0.0,
        log_perplexity=mean_interval(log_perplexity),
        loss=float(np.sum(row["losses"]) / predicted.sum()),
        added=None if how is None else paired_difference(log_perplexity, np.asarray(dense["losses"]) / predicted),
        accuracy=share_interval(row["right"]) if asked else None,
        letters=mean_interval(row["letter_losses"]) if asked else None,
        added_accuracy=paired_difference(row["right"], dense["right"]) if paired else None,
        added_letters=paired_difference(row["letter_losses"], dense["letter_losses"]) if paired else None,
    )


def difference(one: str, other: str, rows: dict[str, Any], predicted: np.ndarray) -> Interval:
    """Return the difference of the log-perplexities of two storages over texts, first minus second."""
    return paired_difference(np.asarray(rows[one]["losses"]) / predicted, np.asarray(rows[other]["losses"]) / predicted)


def verdict(found: Interval) -> str:
    """Return the verdict about the first storage for an interval of differences in log-perplexity."""
    return "worse" if found.low > 0 else "better" if found.high < 0 else "no clear difference"


@dataclasses.dataclass(frozen=True)
class Step:
    """Two storages that are neighbours in an order, and what the second one adds."""

    before: str
    after: str
    added: Interval
    verdict: str


def order(keys: Sequence[str], rows: dict[str, Any], predicted: np.ndarray, *, by_mean: bool = True) -> list[Step]:
    """Return the steps between storages, ordered from the best to the worst, or in the given order."""
    ranked = sorted(keys, key=lambda key: np.mean(np.asarray(rows[key]["losses"]) / predicted)) if by_mean else list(keys)
    steps = []
    for before, after in itertools.pairwise(ranked):
        added = difference(after, before, rows, predicted)
        steps.append(Step(before, after, added, verdict(added)))
    return steps


def paper_order(block_size: int, rows: dict[str, Any], predicted: np.ndarray) -> list[Step]:
    """Return the steps of the order in the paper; an empty list if one of its types was not measured."""
    keys = [key_of(Quantization(name, block_size, double)) for name, double in PAPER]  # type: ignore[arg-type]
    return order(keys, rows, predicted, by_mean=False) if all(key in rows for key in keys) else []


def by_kind(errors: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the values of all matrices by the name of their module, in the order of the layers."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in errors.items():
        found.setdefault(name.split(".")[-2], []).append(values)
    return found
