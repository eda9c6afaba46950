"""How a model came from its checkpoint, as far as saving its adapter needs to know."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from qlora_jax.models.scaling import RopeScaling
from qlora_jax.peft import Subtracted

__all__ = ["Origin", "ResizedEmbeddings"]


@dataclasses.dataclass(frozen=True, eq=False)
class ResizedEmbeddings:
    """The token embedding and head that an adapter's file holds, because PEFT had resized those of the base.

    Two values are equal only if they are the same object. Programs are then never shared between models with different
    embeddings, and no array is hashed.

    Attributes:
        tensors: the arrays by the names of the adapter's file.
    """

    tensors: Mapping[str, np.ndarray] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The checkpoint of a model, and what loading changed. A model holds it as a static attribute.

    Attributes:
        name: the path or repository id of the checkpoint. It does not count in comparisons, so that models from checkpoints
            of the same shape share their compiled programs.
        scaling: the scaling of positions that was added to the checkpoint's config; None: none.
        subtracted: the LoRA matrices that were subtracted from the weights (PiSSA, LoftQ); None: none.
        template: the form of the prompts that the adapter was trained with; None: unknown.
        text_prefix: what the whole model puts before the names of its text part, of which this is a model; None: it is a
            whole model.
        resized_embeddings: the embeddings of the adapter that the model was loaded with; None: those of the checkpoint.
    """

    name: str = dataclasses.field(compare=False)
    scaling: RopeScaling | None = None
    subtracted: Subtracted | None = None
    template: str | None = None
    text_prefix: str | None = None
    resized_embeddings: ResizedEmbeddings | None = None
