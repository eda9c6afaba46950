"""The names of a model's parameters in a Hugging Face checkpoint: one declarative list of mappings for each family.

A mapping pairs the name of a tensor with the path of a parameter in our module tree. `{layer}` in the name stands for the
index of a layer; the parameter then stacks this tensor of all layers along its first axis. Hugging Face stores the matrix of
a linear layer as `[out, in]`, and the module tree holds it as `[in, out]`. `linear` marks these matrices, which are
transposed, can be quantised and can have an adapter.
"""

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class ParameterMapping:
    """The correspondence of a parameter to one tensor of a checkpoint, or to the same tensor of every layer.

    Attributes:
        name: Hugging Face's name of the tensor, with `{layer}` if the parameter is stacked.
        path: attribute names from the model to the parameter.
        layers: number of stacked layers; 0: the parameter is a single tensor.
        linear: whether the parameter is the matrix of a linear layer.
    """

    name: str
    path: tuple[str, ...]
    layers: int = 0
    linear: bool = False

    @property
    def stacked(self) -> bool:
        return self.layers > 0

    def names(self) -> list[str]:
        """Return the names of the tensors, by layer."""
        return [self.name.format(layer=layer) for layer in range(self.layers)] if self.stacked else [self.name]

    def modules(self) -> list[str]:
        """Return the full names of the modules that contain these tensors, by layer; PEFT's targets match these names."""
        return [name.rsplit(".", 1)[0] for name in self.names()]


def linear_modules(mappings: Sequence[ParameterMapping]) -> dict[str, list[str]]:
    """Return, for the dotted path of each stacked linear layer, the full names of the modules that it stacks."""
    return {".".join(mapping.path[:-1]): mapping.modules() for mapping in linear_mappings(mappings)}


def linear_mappings(mappings: Sequence[ParameterMapping]) -> Iterator[ParameterMapping]:
    """Return the mappings of the matrices of linear layers."""
    return (mapping for mapping in mappings if mapping.linear)


def layer_mappings(
    prefix: str, layers: int, names: Sequence[tuple[str, str]], *, linear: bool, biased: Sequence[str] = ()
) -> Iterator[ParameterMapping]:
    """Yield the mappings of stacked modules.

    Args:
        prefix: Hugging Face's name of the list of layers, e.g. "model.layers".
        layers: number of layers.
        names: pairs (Hugging Face's name of a module within a layer, our name).
        linear: whether the modules are linear layers.
        biased: our names of the modules that have a bias.
    """
    for theirs, ours in names:
        path = ("layers", *ours.split("."))
        yield ParameterMapping(f"{prefix}.{{layer}}.{theirs}.weight", (*path, "weight"), layers, linear)
        if ours in biased:
            yield ParameterMapping(f"{prefix}.{{layer}}.{theirs}.bias", (*path, "bias"), layers)
