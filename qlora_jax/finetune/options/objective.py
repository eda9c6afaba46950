"""The choice of an objective, and the options that the objectives declare (`ObjectiveKind.options`)."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qlora_jax.errors import OptionError
from qlora_jax.finetune.objectives import OBJECTIVES
from qlora_jax.finetune.options.declared import dataclass_fields
from qlora_jax.peft import option_problems

__all__ = ["ObjectiveChoice", "ObjectiveName", "ObjectiveOptions"]

_BY_NAME = {kind.name: tuple(other for other in OBJECTIVES if other.name == kind.name) for kind in OBJECTIVES}
_OPTIONS = {name: [option for kind in kinds for option in kind.options] for name, kinds in _BY_NAME.items()}

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[*_BY_NAME]


@dataclasses.dataclass(frozen=True)
class ObjectiveChoice:
    """What the model learns."""

    objective: str = OBJECTIVES[0].name

    def __post_init__(self) -> None:
        if self.objective not in _BY_NAME:
            raise OptionError(f"objective: expected one of {', '.join(_BY_NAME)}, found {self.objective!r}")
        if problems := option_problems(vars(self), _OPTIONS, self.objective, "objective"):
            raise OptionError("; ".join(problems))

    def given(self) -> dict[str, Any]:
        """Return the chosen objective's options that were given, by name."""
        options = [option for kind in _BY_NAME[self.objective] for option in kind.options]
        return {option.name: getattr(self, option.name) for option in options if option.is_given(vars(self))}


def _make() -> Any:
    summaries = "; ".join(f"{name}: {', '.join(kind.summary for kind in kinds)}" for name, kinds in _BY_NAME.items())
    choice: Any = Annotated[ObjectiveName, tyro.conf.arg(help=f"{summaries}.")]
    return dataclasses.make_dataclass(
        "ObjectiveOptions",
        [
            ("objective", choice, dataclasses.field(default=OBJECTIVES[0].name)),
            *dataclass_fields(_OPTIONS),
        ],
        bases=(ObjectiveChoice,),
        namespace={"__module__": __name__, "__doc__": ObjectiveChoice.__doc__},
        frozen=True,
    )


if TYPE_CHECKING:

    class ObjectiveOptions(ObjectiveChoice):
        def __init__(self, objective: ObjectiveName = "sft", **options: Any) -> None: ...

else:
    ObjectiveOptions = _make()
