"""The LoRA matrices A0 and B0 that PiSSA and LoftQ subtract from the weights of the base before these are stored.

    stored base    4 bits of (W - s A0 B0)

They are needed twice: to save the adapter as an ordinary LoRA for the original weights, and to make the same base again.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array

from qlora_jax.peft.lora import LoRA
from qlora_jax.peft.pissa import subtract_update

__all__ = ["Subtracted"]


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: a model holds it as a static attribute
class Subtracted:
    """What was subtracted from the weights of a base.

    Attributes:
        method: gives the scaling s of each module.
        initialization: the value of `init_lora_weights` that subtracted them, e.g. "pissa".
        matrices: (A0 `[in, r]`, B0 `[r, out]`), float32, by the full names of the linear modules.
    """

    method: LoRA
    initialization: str
    matrices: Mapping[str, tuple[np.ndarray, np.ndarray]]

    def from_weight(self, module: str, w: Array) -> Array | None:
        """Return float32 w - s A0 B0 `[in, out]` of a module; None for a module from which nothing is subtracted."""
        if module not in self.matrices:
            return None
        a, b = (jnp.asarray(matrix) for matrix in self.matrices[module])
        return subtract_update(w, a, b, self.method.scaling_of(module))
