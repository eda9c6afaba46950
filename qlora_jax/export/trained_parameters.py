"""Parameters that an adapter trained besides linear layers: in a merged checkpoint they replace those of the base."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.names import PREFIX, rows_name
from qlora_jax.models import ParameterMapping, TrainableBase, tied_head
from qlora_jax.models.trainable import EMBEDDING, TIED_HEAD

__all__ = ["Retrained", "retrained_parameters"]


@dataclasses.dataclass(frozen=True)
class Retrained:
    """The values that an adapter gives to parameters, or to rows of them, in place of the checkpoint's.

    Attributes:
        values: the trained values: a whole parameter, or rows of an embedding.
        rows: the tokens whose rows they are; None: a whole parameter.
    """

    values: np.ndarray
    rows: tuple[int, ...] | None = None

    def put(self, tensor: np.ndarray) -> np.ndarray:
        """Return the trained parameter, given that of the checkpoint."""
        if self.rows is None:
            return self.values
        tensor = tensor.astype(np.float32)
        tensor[list(self.rows)] = self.values.astype(np.float32)
        return tensor


def retrained_parameters(
    adapter: Adapter | None, trained: TrainableBase, mappings: Sequence[ParameterMapping]
) -> dict[str, Retrained]:
    """Return what an adapter trained besides linear layers, by the checkpoint's names.

    Args:
        trained: of the model with the adapter's method.
        mappings: the parameter mappings of the model.
    """
    if adapter is None:
        return {}
    by_path = {mapping.path: mapping for mapping in mappings}
    result: dict[str, Retrained] = {}
    for mapping in trained.full:
        names = [str(tied_head(mappings))] if mapping.path == TIED_HEAD else by_path[mapping.path].names()
        for name, theirs in zip(names, mapping.names(), strict=True):
            if PREFIX + theirs in adapter.tensors:  # not the bias of a layer that was no target
                result[name] = Retrained(adapter.tensors[PREFIX + theirs])
    for mapping in trained.linear:
        result |= {
            name: Retrained(adapter.tensors[PREFIX + name]) for name in mapping.names() if PREFIX + name in adapter.tensors
        }
    for mapping, rows in trained.rows:
        if mapping.path == EMBEDDING and trained.unties and (head := tied_head(mappings)) is not None and head not in result:
            result[head] = Retrained(adapter.tensors[rows_name(mapping.modules()[0])], rows)
        result[by_path[mapping.path].name] = Retrained(adapter.tensors[rows_name(mapping.modules()[0])], rows)
    return result
