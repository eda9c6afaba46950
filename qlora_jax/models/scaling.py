"""A scaling of rotary positions that a user adds to a checkpoint, for sequences longer than its context.

    linear     positions are divided by the factor, so that those of the longer sequence are within the range of the context
               (Chen et al. 2023; LongLoRA trains in this way)
    dynamic    theta increases with the length of a sequence that is longer than the context (NTK-aware scaling)
    yarn       low frequencies as in linear, high ones unchanged, a ramp between (Peng et al. 2023)

The scaling is written into the fields of config.json before anything reads them. So the code that builds the model, limits
the length or writes the config.json of a merged checkpoint finds it there, as transformers does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from qlora_jax.errors import OptionError, shortened
from qlora_jax.models.config import DecoderConfig

RopeKind = Literal["linear", "dynamic", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A scaling of rotary positions.

    Attributes:
        kind: the method.
        factor: length of the longest sequence, as a multiple of the context.

    Raises:
        OptionError: an unknown kind, or a factor that is not above 1.
    """

    kind: RopeKind
    factor: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise OptionError(f"rope_scaling: expected one of {', '.join(get_args(RopeKind))}, found {shortened(self.kind)}")
        if not 1 < self.factor < math.inf:
            raise OptionError(f"rope_factor: expected a number above 1, found {self.factor}")

    @property
    def changes(self) -> str:
        """A description of the scaling in words."""
        return f"{self.kind} scaling of positions by {self.factor:g}"


def factor_for(length: int, context: int) -> int:
    """Return the factor for sequences of `length` tokens, as LongLoRA chooses it."""
    return math.ceil(length / context)


def scaled(hf_config: Mapping[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """Return a config.json with a scaling of positions added.

    Args:
        hf_config: the config.json.
        config: the same, parsed by the model's family.
        scaling: the scaling to add.

    Raises:
        OptionError: the layers do not all have the same rotary positions, or the model has a scaling already.
    """
    context = unscaled_context(config)
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        fields["original_max_position_embeddings"] = context
    changed = dict(hf_config)
    # Dynamic scaling reads the original context from max_position_embeddings; for the others it is the new context.
    if scaling.kind != "dynamic":
        changed["max_position_embeddings"] = round(context * scaling.factor)
    if hf_config.get("rope_parameters"):  # transformers 5 stores theta in the same object
        others = {name: hf_config["rope_parameters"].get(name) for name in ("rope_theta", "partial_rotary_factor")}
        changed["rope_parameters"] = {name: value for name, value in others.items() if value is not None} | fields
        changed.pop("rope_scaling", None)  # of older versions; it said the same
    else:
        changed["rope_scaling"] = fields
    return changed


def unscaled_context(config: Any) -> int:
    """Return the context length that a model without a scaling was trained on, in tokens.

    Raises:
        OptionError: see `scaled`.
    """
    ropes = {kind.rope for kind in config.kinds if kind.rope is not None} if isinstance(config, DecoderConfig) else set()
    if len(ropes) != 1:
        found = "several kinds of them" if ropes else "none"
        raise OptionError(f"rope_scaling: expected a model with rotary positions, alike in all layers, found {found}")
    kind = dict(next(iter(ropes)).scaling).get("rope_type", "default")
    if kind != "default":
        raise OptionError(f"rope_scaling: expected a model without a scaling of its own, found {kind}")
    return config.max_position_embeddings
