"""What the files of an adapter hold: its tensors under the names that PEFT gives them today.

Programs and years differ in these names. All of them say the same:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight             PEFT's
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight     with the name of the adapter
    base_model.model.module.model.layers.0…, …_orig_mod.…                      of a model that was wrapped or compiled
    model.layers.0…, base_model.model.layers.0…                                without a prefix, or of a model without a head
    base_model.model.model.language_model.layers.0…                            of the text part of a larger model
    base_model.model.language_model.model.layers.0…
    base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias           a bias that trains beside an adapter

Tensors of towers of vision and sound have no place in a language model; they are left out, and a warning says so.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from qlora_jax.adapters.names import PREFIX
from qlora_jax.adapters.pickled import open_pickled
from qlora_jax.checkpoint.hub import Snapshot
from qlora_jax.checkpoint.safetensors import read_safetensors, read_tensor
from qlora_jax.checkpoint.text_part import text_name
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.peft.prompt import EMBEDDINGS

__all__ = ["PICKLED", "WEIGHTS", "Held", "HeldTensor", "our_name", "read_held"]

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
_WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_ADAPTER_NAME = re.compile(
    r"(?P<before>.*\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l|trainable_tokens_delta))"
    r"\.(?!weight$|bias$)[^.]+(?P<after>(?:\.(?:weight|bias))?)"
)
_BARE = re.compile(r"(?:layers\.\d+|embed_tokens|norm)\..*")


class HeldTensor(NamedTuple):
    """A tensor of the files.

    Attributes:
        stored: its name there.
        shape: its shape.
        read: returns its values.
    """

    stored: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Held:
    """The tensors of an adapter's files.

    Attributes:
        tensors: by PEFT's names.
        left_out: the names, as stored, of those that belong to towers of vision or sound.
    """

    tensors: Mapping[str, HeldTensor]
    left_out: tuple[str, ...] = ()

    def warn(self, place: str) -> None:
        """Say what is left out."""
        if self.left_out:
            warnings.warn(
                f"{place}: {len(self.left_out)} tensors of parts that are no language model are left out: "
                f"{list_names(self.left_out[:3])}",
                stacklevel=3,
            )


def read_held(snapshot: Snapshot) -> Held | None:
    """Return what the files of an adapter hold; None where there is no file of weights. Only headers are read.

    Raises:
        CheckpointError: a file is damaged, or holds two tensors of one name.
    """
    path = snapshot.path / WEIGHTS
    if path.is_file():
        problems: list[str] = []
        found = read_safetensors(path, problems)
        if found is None:
            raise CheckpointError(f"{snapshot.name}: {WEIGHTS} is damaged: {problems[0]}")
        stored = {
            name: HeldTensor(name, tensor.shape, lambda name=name, tensor=tensor: read_tensor(name, tensor))
            for name, tensor in found.items()
        }
    elif (path := snapshot.path / PICKLED).is_file():
        opened = open_pickled(path, snapshot.name)
        stored = {name: HeldTensor(name, tensor.shape, tensor.read) for name, tensor in opened.items()}
    else:
        return None
    tensors: dict[str, HeldTensor] = {}
    left: list[str] = []
    for name, tensor in stored.items():
        ours = our_name(name)
        if ours is None:
            left.append(name)
        elif ours in tensors:
            raise CheckpointError(f"{snapshot.name}: {path.name} holds {ours} twice: {tensors[ours].stored} and {name}")
        else:
            tensors[ours] = tensor
    return Held(tensors, tuple(left))


def our_name(stored: str) -> str | None:
    """Return PEFT's name of a tensor of an adapter's files; None for one of a tower of vision or sound."""
    if stored == EMBEDDINGS:
        return stored
    rest = ".".join(part for part in stored.split(".") if part not in _WRAPPERS)
    while rest.startswith(PREFIX):
        rest = rest.removeprefix(PREFIX)
    if match := _ADAPTER_NAME.fullmatch(rest):
        rest = match["before"] + match["after"]
    if rest.endswith("lora_magnitude_vector.weight"):
        rest = rest.removesuffix(".weight")
    if ".token_adapter." not in rest:
        rest = rest.replace(".base_layer.", ".")
    if rest.startswith("model.model."):
        rest = rest.removeprefix("model.")
    name = text_name(rest)
    if name is None:
        return None
    return PREFIX + (f"model.{name}" if _BARE.fullmatch(name) else name)
