"""One round: a batch of every tenant that trains, as micro-batches that tenants of one objective and shape share.

    rows     tenant 1, tenant 1, tenant 2, tenant 3, …      in the order of the slots; each row is of one tenant
    padded   to a length of 2^n or 3 * 2^n tokens, and to whole micro-batches

A tenant's rows are those that a run of its own would read, packed for itself. A row of preferences is a pair of answers.

Tenants share a micro-batch if their rows are padded to the same length (`shared_length`), so that short rows are not padded
to the length of long ones. The shape of a micro-batch depends on the tenant's own length and on the file, and not on which
others still train: XLA may add up in another order for another shape, and a tenant's bits would depend on it.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qlora_jax.finetune.prepare import PreparedRun

__all__ = ["ARRAYS", "Share", "micro_batches", "padded_rows", "row_settings", "shared_length"]

Batch = Mapping[str, np.ndarray]
_LEARNED = ("inputs", "targets", "loss_mask")
ARRAYS: dict[str, tuple[str, ...]] = {  # what the losses of each objective read
    "sft": (*_LEARNED, "segment_ids", "positions"),
    "dpo": tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in _LEARNED),
}


@dataclasses.dataclass(frozen=True)
class Share:
    """The rows of one tenant in a round.

    Attributes:
        place: its place among the slots of the round.
        batch: its rows.
        units: its learned tokens, or pairs, in the round.
        settings: values that each of its rows carries, by name.
    """

    place: int
    batch: Batch
    units: float
    settings: Mapping[str, float]


def row_settings(run: PreparedRun) -> dict[str, float]:
    """Return the settings of a run's objective that its rows carry."""
    if run.spec.objective.name != "dpo":
        return {}
    given = {name.removeprefix("dpo_"): value for name, value in run.options.objective.given().items()}
    return {"beta": 0.1, "label_smoothing": 0.0} | given


def shared_length(length: int) -> int:
    """Return the tokens that rows of this length are padded to: the next 2^n or 3 * 2^n, at most a third more."""
    power = 1 << max(length - 1, 0).bit_length()
    return 3 * power // 4 if length <= 3 * power // 4 and power >= 4 else power


def padded_rows(batch: Batch, objective: str, length: int, rows: int = 0) -> dict[str, np.ndarray]:
    """Return the arrays `[rows, t]` that an objective reads, padded to `[rows, length]` without anything learned.

    Args:
        rows: the least number of rows.
    """
    names = ARRAYS[objective]
    count, own = batch[names[0]].shape
    padding = ((0, max(rows - count, 0)), (0, length - own))
    return {name: np.pad(batch[name], padding) for name in names}


def micro_batches(shares: Sequence[Share], objective: str, *, rows: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of tenants of one objective as micro-batches for `train.tenants.accumulate`.

    Args:
        rows: rows of a micro-batch.
        length: tokens of a row.
    """
    own = [padded_rows(share.batch, objective, length) for share in shares]
    arrays = {name: np.concatenate([batch[name] for batch in own]) for name in ARRAYS[objective]}
    counts = [len(batch[ARRAYS[objective][0]]) for batch in own]
    arrays["adapter_ids"] = np.repeat(np.asarray([share.place for share in shares], np.int32), counts)
    arrays["share"] = np.repeat(np.asarray([1 / max(share.units, 1.0) for share in shares], np.float32), counts)
    for name in shares[0].settings:
        arrays[name] = np.repeat(np.asarray([share.settings[name] for share in shares], np.float32), counts)
    missing = -sum(counts) % rows
    for name, array in arrays.items():
        # Rows of padding belong to the last tenant, in which they change nothing: nothing in them is learned.
        mode = "edge" if name == "adapter_ids" else "constant"
        arrays[name] = np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), mode=mode)
    for start in range(0, len(arrays["share"]), rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}
