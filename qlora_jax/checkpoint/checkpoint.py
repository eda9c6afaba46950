"""The contract of an opened checkpoint: names, shapes, and a function that reads one tensor.

A checkpoint may be larger than the memory that it is allowed to occupy, so nothing here holds a whole one. Opening reads
headers only and finds every problem that can be found without the data. Reading brings exactly one tensor into memory, which
the caller quantises and drops before it asks for the next:

    checkpoint = open_checkpoint("path/to/folder")    # or "model.gguf", or the hub's "owner/name"
    for name, shape in checkpoint.shapes.items():
        tensor = checkpoint.read(name)                # NumPy, [out, in], in the file's float type

Whatever the format, tensors have the names that Hugging Face's implementation of the architecture gives them, and the
configuration has the form of Hugging Face's `config.json`: a loader that is written once serves all formats.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from qlora_jax.checkpoint.hub import Snapshot
from qlora_jax.errors import CheckpointError, QLoRAError
from qlora_jax.models import DecoderConfig, Family, ModelConfig, family_of
from qlora_jax.quant import Quantization, QuantizedTensor

__all__ = ["Checkpoint", "unknown_tensor"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Invariants: `read(name).shape == shapes[name]`; `read` holds no tensor after it returned.

    Attributes:
        name: the path or repository id, for messages.
        config: a dictionary of the form of Hugging Face's config.json.
        shapes: the shape of each tensor, by Hugging Face's tensor names.
        read: returns one tensor in Hugging Face's orientation (`[out, in]`), in the dtype in which it is stored (bfloat16
            and float8 through ml_dtypes), or in float32 where the file holds blocks.
        quantization: how the weights of a checkpoint that is quantised already are stored; None for a plain one.
        quantized: the names of the tensors that are quantised; the other tensors are floats.
        read_quantized: returns the codes and scales of one quantised tensor, `[in, out]`.
        dtypes: the dtype in which a tensor is stored, by name, for the tensors that are stored as plain numbers.
        text_prefix: what the whole model puts before the names of the modules, where this is the text part of a model that
            also reads pictures or sound; None: it is a whole model.
        snapshot: the files that the checkpoint was opened from; None for a checkpoint that was made in memory.
    """

    name: str
    config: dict
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    quantization: Quantization | None = None
    quantized: frozenset[str] = frozenset()
    read_quantized: Callable[[str], QuantizedTensor] | None = None
    dtypes: Mapping[str, np.dtype] = field(default_factory=dict)
    text_prefix: str | None = None
    snapshot: Snapshot | None = None

    @cached_property
    def family(self) -> Family:
        """The model family of `config`.

        Raises:
            UnsupportedError: the architecture is not supported.
        """
        return family_of(self.config)

    @cached_property
    def model_config(self) -> ModelConfig:
        """The parsed `config`.

        Raises:
            UnsupportedError: the architecture is not supported.
            QLoRAError: a field of the config has no meaning here.
            CheckpointError: the config describes a model that is far larger than the file.
        """
        try:
            config = self.family.config(self.config)
        except QLoRAError as error:
            raise type(error)(f"{self.name}: {error}") from error
        self._check_size(config)
        return config

    def _check_size(self, config: ModelConfig) -> None:
        """Compare the sizes in the config with the tensors, before anything as large as the config says is made."""
        layers = (
            config.num_hidden_layers if isinstance(config, DecoderConfig) else config.num_layers + config.num_decoder_layers
        )
        if layers > len(self.shapes):
            raise CheckpointError(
                f"{self.name}: config.json: expected at most as many layers as tensors, {len(self.shapes)}, found {layers}."
            )
        # Two weights of 4 bits are stored in one element.
        held = 2 * sum(math.prod(shape) for shape in self.shapes.values())
        for name, size in (("vocab_size", config.vocab_size), ("intermediate_size", config.intermediate_size)):
            if size * config.hidden_size > held:
                raise CheckpointError(
                    f"{self.name}: config.json: expected a model of at most {held:,} parameters, found {name} {size:,} and "
                    f"{config.hidden_size:,} features."
                )

    def renamed(self, stored: Mapping[str, str], config: dict) -> "Checkpoint":
        """Return a checkpoint with other names of the tensors and another configuration.

        Args:
            stored: the name of each tensor in this checkpoint, by its new name. Tensors that it does not name are left out;
                one tensor may have several new names.
            config: the new `config`.
        """
        read, read_quantized = self.read, self.read_quantized
        return replace(
            self,
            config=config,
            shapes={new: self.shapes[name] for new, name in stored.items()},
            dtypes={new: self.dtypes[name] for new, name in stored.items() if name in self.dtypes},
            read=lambda new: read(stored.get(new, new)),
            quantized=frozenset(new for new, name in stored.items() if name in self.quantized),
            read_quantized=None if read_quantized is None else lambda new: read_quantized(stored[new]),
        )

    @property
    def dense_modules(self) -> frozenset[str]:
        """The full names of the linear layers that are dense in a checkpoint whose others are quantised."""
        if not self.quantized:
            return frozenset()
        names = (name for mapping in self.model_config.parameter_mappings if mapping.linear for name in mapping.names())
        return frozenset(name.rpartition(".")[0] for name in names if name not in self.quantized)


def unknown_tensor(place: str, name: str, known: Mapping[str, object]) -> CheckpointError:
    """Return the error of `read` for a name that the checkpoint at `place` does not have."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return CheckpointError(f"{place}: has no tensor {name!r} among its {len(known)}.{hint}")
