"""What an adapter trained besides linear layers, as a merged checkpoint takes it: values in place of the base's."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.adapters.files import PREFIX, Adapter, rows_name
from qlora_jax.models import ParameterMapping, TrainableBase, tied_head
from qlora_jax.models.trainable import TIED_HEAD

__all__ = ["Retrained", "retrained_parameters"]


@dataclasses.dataclass(frozen=True)
class Retrained:
    """The values that an adapter gives to parameters, or to rows of them, in place of the checkpoint's.

    Attributes:
        rows: the tokens that the values are for; None: the whole parameter.
    """

    values: np.ndarray
    rows: tuple[int, ...] | None = None

    def put(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, given the checkpoint's."""
        if self.rows is None:
            return self.values
        tensor = tensor.astype(np.float32)
        tensor[list(self.rows)] = self.values.astype(np.float32)
        return tensor


def retrained_parameters(
    adapter: Adapter | None, trained: TrainableBase, keys: Sequence[ParameterMapping]
) -> dict[str, Retrained]:
    """What an adapter trained besides linear layers, by the checkpoint's names."""
    if adapter is None:
        return {}
    named = {key.path: key for key in keys}
    result: dict[str, Retrained] = {}
    for key in trained.full:
        names = [str(tied_head(keys))] if key.path == TIED_HEAD else named[key.path].names()
        for name, theirs in zip(names, key.names(), strict=True):
            result[name] = Retrained(adapter.tensors[PREFIX + theirs])
    for key, rows in trained.rows:
        result[named[key.path].name] = Retrained(adapter.tensors[rows_name(key.modules()[0])], rows)
    return result
