"""The metrics of a state on held-out data."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from tqdm import tqdm

from qlora_jax.train.loop import Batch
from qlora_jax.train.step import TrainState

__all__ = ["mean_metrics"]


def mean_metrics(
    eval_step: Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]],
    state: TrainState,
    frozen: Any,
    batches: Iterable[Batch],
    *,
    put: Callable[[Batch], dict[str, jax.Array]],
    progress: bool = True,
) -> dict[str, float]:
    """Return the means of what `eval_step` sums, `loss` among it, over the units (such as learned tokens) of all batches."""
    total: dict[str, float] = {"loss": 0.0}
    units = 0.0
    for batch in tqdm(batches, desc="evaluating", unit="batch", leave=False, disable=not progress):
        sums, count = eval_step(state.adapter, frozen, put(batch))
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + float(value)
        units += float(count)
    return {name: value / max(units, 1.0) for name, value in total.items()}
