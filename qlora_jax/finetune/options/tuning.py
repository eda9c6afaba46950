"""The choice of a method of fine-tuning, and the options of the methods other than LoRA.

The methods declare their options themselves (`Method.options`), and `METHODS` lists the methods; this module makes one group
of options of them. LoRA's options are a group of their own (lora.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from qlora_jax.errors import OptionError
from qlora_jax.finetune.options.declared import dataclass_fields
from qlora_jax.peft import METHODS, LoRA, Method, option_problems

__all__ = ["MethodChoice", "MethodName", "TuningOptions", "tuning_options"]

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]


@dataclasses.dataclass(frozen=True)
class MethodChoice:
    """The method of fine-tuning."""

    method: str = LoRA.name

    @classmethod
    def methods(cls) -> Mapping[str, type[Method]]:
        """Return the methods to choose from, by name."""
        return METHODS

    def __post_init__(self) -> None:
        methods = self.methods()
        if self.method not in methods:
            raise OptionError(f"method: expected one of {', '.join(methods)}, found {self.method!r}")
        owners = {name: method.options for name, method in methods.items()}
        if problems := option_problems(vars(self), owners, self.method, "method"):
            raise OptionError("; ".join(problems))
        if not methods[self.method].lora_options:  # otherwise the values of LoRA's options are needed as well
            self.build({})

    def build(self, lora: Mapping[str, Any]) -> Method:
        """Return the method that the options describe.

        Args:
            lora: the values of LoRA's options by name (`LoRAOptions.values`), of which some methods take a part.

        Raises:
            OptionError: options that contradict each other.
        """
        chosen = self.methods()[self.method]
        own = {option.name: getattr(self, option.name) for option in chosen.options}
        return chosen.from_options(own | {name: lora[name] for name in chosen.lora_options})


def tuning_options(methods: Mapping[str, type[Method]]) -> Any:
    """Return the dataclass of the options of these methods: the fields are `method` and what the methods declare."""
    summaries = "; ".join(f"{name}: {method.summary}" for name, method in methods.items())
    choice: Any = Literal[tuple(methods)]  # pyright: ignore[reportInvalidTypeForm]
    method = ("method", Annotated[choice, tyro.conf.arg(help=f"{summaries}.")], dataclasses.field(default=LoRA.name))
    return dataclasses.make_dataclass(
        "TuningOptions",
        [method, *dataclass_fields({name: method.options for name, method in methods.items()})],
        bases=(MethodChoice,),
        namespace={"methods": classmethod(lambda cls: methods), "__module__": __name__, "__doc__": MethodChoice.__doc__},
        frozen=True,
    )


if TYPE_CHECKING:

    class TuningOptions(MethodChoice):
        def __init__(self, method: MethodName = LoRA.name, **options: Any) -> None: ...

else:
    TuningOptions = tuning_options(METHODS)
