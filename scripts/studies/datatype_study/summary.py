"""From what was measured to figures with intervals.

Of each storage, over texts: the mean log-perplexity with its interval, and what it has more than dense weights, text by
text. Types are put in order by their means; whether a type is worse than the one before it, the interval of their
differences on the same texts says: "worse" where it lies above 0, "better" below, else "not told apart". Each interval is
one of 95 % by itself.
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
    """The figures of one storage.

    Attributes:
        how: None for dense weights.
        bits: that it needs; stored: that it takes.
        error: root of the mean over matrices of the squared relative rms error.
        log_perplexity: over texts; loss: over all tokens alike.
        added: to the log-perplexity of dense weights, paired; None for those.
        accuracy, letters: share of right answers, and log loss of the right letter among the four; None where not asked.
        added_accuracy, added_letters: to those of dense weights, paired.
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
    """The name of a storage in files: `nf4-64-double`."""
    if how is None:
        return DENSE
    return f"{how.data_type}-{how.block_size}{'-double' if how.double_quantization else ''}"


def storage_of(how: Quantization | None, rows: dict[str, Any], predicted: np.ndarray, bits: tuple[float, float]) -> Storage:
    """The figures of a storage that has been measured, and those of dense weights with it."""
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
    """The log-perplexity that the first storage has more than the other, over texts."""
    return paired_difference(np.asarray(rows[one]["losses"]) / predicted, np.asarray(rows[other]["losses"]) / predicted)


def verdict(found: Interval) -> str:
    """What an interval of differences in log-perplexity says of the first."""
    return "worse" if found.low > 0 else "better" if found.high < 0 else "not told apart"


@dataclasses.dataclass(frozen=True)
class Step:
    """Two storages that are neighbours in an order: what the later has more."""

    before: str
    after: str
    added: Interval
    verdict: str


def order(keys: Sequence[str], rows: dict[str, Any], predicted: np.ndarray, *, by_mean: bool = True) -> list[Step]:
    """The steps from the best of some storages to the worst; or in the order in which they are given."""
    ranked = sorted(keys, key=lambda key: np.mean(np.asarray(rows[key]["losses"]) / predicted)) if by_mean else list(keys)
    steps = []
    for before, after in itertools.pairwise(ranked):
        added = difference(after, before, rows, predicted)
        steps.append(Step(before, after, added, verdict(added)))
    return steps


def paper_order(block_size: int, rows: dict[str, Any], predicted: np.ndarray) -> list[Step]:
    """The steps of the paper's order; none where not all of its types were measured."""
    keys = [key_of(Quantization(name, block_size, double)) for name, double in PAPER]  # type: ignore[arg-type]
    return order(keys, rows, predicted, by_mean=False) if all(key in rows for key in keys) else []


def by_kind(errors: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """What was found for each matrix, by the name of its module, in the order of the layers."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in errors.items():
        found.setdefault(name.split(".")[-2], []).append(values)
    return found
