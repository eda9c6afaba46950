"""What the adapter of a linear layer gets besides the layer's input.

A model makes one context for a call, and a context with its own random key for each linear layer:

    call      LayerContext(key, adapter_ids)
    layer     LayerContext(key of the layer, adapter_ids)
    linear    LayerContext(key of the linear layer, adapter_ids)      `split`

The adapter ids are the same everywhere: all tokens of a row belong to one adapter (`peft.bank`).
"""

import dataclasses
from collections.abc import Sequence

import jax
from jax import Array
from jaxtyping import Int

__all__ = ["AdapterIds", "Contexts", "LayerContext"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerContext:
    """The context of a call of a linear layer, or of the layers around it.

    Attributes:
        key: random key of the dropout while training; None: no dropout.
        adapter_ids: int32 `[rows]`, for each row of the input the slot of a bank of adapters; None: all rows use the one
            adapter of the layer, and a bank adds nothing.
    """

    key: Array | None = None
    adapter_ids: Array | None = None

    def split(self, count: int) -> "list[LayerContext]":
        """Return `count` contexts with random keys of their own, or without keys if this one has none."""
        if self.key is None:
            return [self] * count
        return [LayerContext(key, self.adapter_ids) for key in jax.random.split(self.key, count)]


Contexts = Sequence[LayerContext]
AdapterIds = Int[Array, " b"] | None  # one for each row of a call; see `LayerContext`
