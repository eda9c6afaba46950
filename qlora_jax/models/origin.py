"""How a model came from its checkpoint, as far as saving its adapter needs to know."""

import dataclasses

from qlora_jax.models.scaling import RopeScaling
from qlora_jax.peft import Subtracted

__all__ = ["Origin"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint of a model, and what loading changed. A model holds it as a static attribute.

    Attributes:
        name: the path or repository id of the checkpoint. It does not count in comparisons, so that models from checkpoints
            of the same shape share their compiled programs.
        scaling: the scaling of positions that was added to the checkpoint's config; None: none.
        subtracted: the LoRA matrices that were subtracted from the weights (PiSSA, LoftQ); None: none.
    """

    name: str = dataclasses.field(compare=False)
    scaling: RopeScaling | None = None
    subtracted: Subtracted | None = None
