"""Which method of fine-tuning a run takes."""

import dataclasses
from typing import Literal, get_args

MethodName = Literal["lora", "full"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)


@dataclasses.dataclass(frozen=True)
class TuningOptions:
    """The method."""

    method: MethodName = "lora"
    """lora: adapters on linear layers; full: all parameters of a decoder that is held dense (data-type none), saved as a
    model."""

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ValueError(f"method: expected one of {', '.join(METHOD_NAMES)}, found {self.method!r}")
