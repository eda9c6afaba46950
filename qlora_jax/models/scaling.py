"""Another scaling of rotary positions than a checkpoint states, for sequences beyond its context.

    linear     positions are divided by the factor: those of the longer sequence lie where those of the context did (Chen et
               al. 2023; LongLoRA trains so)
    dynamic    theta grows with the length of a sequence that is beyond the context (NTK-aware)
    yarn       slow pairs as linear, fast ones as they were, a ramp between (Peng et al. 2023)

The scaling goes into config.json's own fields, before anything reads them: what makes the model, limits its length or writes
a merged checkpoint's config.json finds it there, as transformers does.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from qlora_jax.models.config import DecoderConfig

RopeKind = Literal["linear", "dynamic", "yarn"]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """A scaling of positions.

    Attributes:
        kind: which.
        factor: how many times the context it is for.

    Raises:
        ValueError: an unknown kind, or a factor that is not above 1.
    """

    kind: RopeKind
    factor: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise ValueError(f"rope_scaling: expected one of {', '.join(get_args(RopeKind))}, found {self.kind!r}")
        if not 1 < self.factor < math.inf:
            raise ValueError(f"rope_factor: expected a number above 1, found {self.factor}")

    @property
    def changes(self) -> str:
        """What it is, in words."""
        return f"{self.kind} scaling of positions by {self.factor:g}"


def factor_for(length: int, context: int) -> int:
    """The factor that makes room for so many tokens, as LongLoRA chooses it."""
    return math.ceil(length / context)


def scaled(hf_config: Mapping[str, Any], config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """A config.json with a scaling of positions in place of none.

    Args:
        hf_config: config.json; config: what its family reads from it.

    Raises:
        ValueError: the model has no rotary positions of one kind, or a scaling of its own.
    """
    context = unscaled_context(config)
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "yarn":
        fields["original_max_position_embeddings"] = context
    changed = dict(hf_config)
    # Dynamic scaling reads the context from max_position_embeddings; with the others that is what the model is now for.
    if scaling.kind != "dynamic":
        changed["max_position_embeddings"] = round(context * scaling.factor)
    if hf_config.get("rope_parameters"):  # transformers 5 keeps theta in the same place
        kept = {name: hf_config["rope_parameters"].get(name) for name in ("rope_theta", "partial_rotary_factor")}
        changed["rope_parameters"] = {name: value for name, value in kept.items() if value is not None} | fields
    else:
        changed["rope_scaling"] = fields
    return changed


def unscaled_context(config: Any) -> int:
    """The positions that a model without a scaling was trained on.

    Raises:
        ValueError: see `scaled`.
    """
    ropes = {kind.rope for kind in config.kinds if kind.rope is not None} if isinstance(config, DecoderConfig) else set()
    if len(ropes) != 1:
        found = "several kinds of them" if ropes else "none"
        raise ValueError(f"rope_scaling: expected a model with rotary positions, alike in all layers, found {found}")
    kind = dict(next(iter(ropes)).scaling).get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_scaling: expected a model without a scaling of its own, found {kind}")
    return config.max_position_embeddings
