"""How a model's parameters are named in a Hugging Face checkpoint: one declarative table a family.

A row pairs the name of a tensor with the path of a parameter in our module tree. `{layer}` in the name stands for the index
of a layer; the parameter then stacks that tensor of all layers along its first axis. Hugging Face stores the matrix of a
linear layer as `[out, in]`, we hold it as `[in, out]`: `linear` says so, and marks what is quantised and can carry LoRA.
"""

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class ParameterMapping:
    """One row of the table.

    Attributes:
        name: Hugging Face's tensor name, with `{layer}` for stacked ones.
        path: attribute names from the model to the parameter.
        layers: how many layers are stacked; 0: a tensor by itself.
        linear: whether it is the matrix of a linear layer.
    """

    name: str
    path: tuple[str, ...]
    layers: int = 0
    linear: bool = False

    @property
    def stacked(self) -> bool:
        return self.layers > 0

    def names(self) -> list[str]:
        """The tensor names that this row stands for, by layer."""
        return [self.name.format(layer=layer) for layer in range(self.layers)] if self.stacked else [self.name]

    def modules(self) -> list[str]:
        """The names of the modules that hold these tensors, as PEFT's targets see them."""
        return [name.rsplit(".", 1)[0] for name in self.names()]


def linear_modules(keys: Sequence[ParameterMapping]) -> dict[str, list[str]]:
    """For each stacked linear layer, by its path in dots: the full names of the modules that it stacks."""
    return {".".join(key.path[:-1]): key.modules() for key in linear_mappings(keys)}


def linear_mappings(keys: Sequence[ParameterMapping]) -> Iterator[ParameterMapping]:
    """The rows of linear matrices."""
    return (key for key in keys if key.linear)


def layer_mappings(
    prefix: str, layers: int, names: Sequence[tuple[str, str]], *, linear: bool, biased: Sequence[str] = ()
) -> Iterator[ParameterMapping]:
    """Rows of stacked modules.

    Args:
        prefix: Hugging Face's name of the layers, e.g. "model.layers".
        names: (Hugging Face's name of a module within a layer, ours).
        linear: whether they are linear layers.
        biased: our names of the modules that have a bias.
    """
    for theirs, ours in names:
        path = ("layers", *ours.split("."))
        yield ParameterMapping(f"{prefix}.{{layer}}.{theirs}.weight", (*path, "weight"), layers, linear)
        if ours in biased:
            yield ParameterMapping(f"{prefix}.{{layer}}.{theirs}.bias", (*path, "bias"), layers)
