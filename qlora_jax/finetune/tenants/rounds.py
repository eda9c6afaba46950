"""One round: a batch of every tenant that trains, as micro-batches that the tenants share.

    rows     tenant 1, tenant 1, tenant 2, tenant 3, …      in the order of the slots; each row is of one tenant
    padded   to the length of the longest tenant's rows, and to whole micro-batches

A tenant's rows are those that a run of its own would read, packed for itself.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

__all__ = ["micro_batches", "padded_rows"]

Batch = Mapping[str, np.ndarray]
_ARRAYS = ("inputs", "targets", "loss_mask", "segment_ids", "positions")


def padded_rows(batch: Batch, length: int, rows: int | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of a batch `[rows, t]` that losses read, padded to `[rows, length]` without anything learned.

    Args:
        rows: the number of rows; as many as the batch has if None.
    """
    more = (0 if rows is None else rows) - len(batch["inputs"])
    padding = ((0, max(more, 0)), (0, length - batch["inputs"].shape[1]))
    return {name: np.pad(batch[name], padding) for name in _ARRAYS}


def micro_batches(batches: Sequence[Batch], *, rows: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of tenants as micro-batches for `train.tenants.accumulate`.

    Args:
        batches: of each tenant, at its place among the slots of the step.
        rows: rows of a micro-batch.
        length: tokens of a row.
    """
    own = [padded_rows(batch, length) for batch in batches]
    arrays = {name: np.concatenate([batch[name] for batch in own]) for name in _ARRAYS}
    counts = [len(batch["inputs"]) for batch in own]
    learned = [max(float(batch["loss_mask"].sum()), 1.0) for batch in own]
    arrays["adapter_ids"] = np.repeat(np.arange(len(own), dtype=np.int32), counts)
    arrays["share"] = np.repeat(np.asarray([1 / total for total in learned], np.float32), counts)
    missing = -sum(counts) % rows
    for name, array in arrays.items():
        # Rows of padding belong to the last tenant, in which they change nothing: nothing in them is learned.
        mode = "edge" if name == "adapter_ids" else "constant"
        arrays[name] = np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1)), mode=mode)
    for start in range(0, len(arrays["share"]), rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}
