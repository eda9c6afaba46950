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
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from qlora_jax.errors import CheckpointError
from qlora_jax.quant import Quantization, QuantizedTensor

__all__ = ["Checkpoint", "unknown_tensor"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Invariants: `read(name).shape == shapes[name]`; `read` keeps nothing.

    `source` is the path or hub id, for messages. `config` has the form of Hugging Face's config.json.
    `shapes` maps Hugging Face's tensor names to shapes. `read` returns one tensor in Hugging Face's
    orientation (`[out, in]`), in the type it is stored in (bfloat16 and float8 through ml_dtypes), or in
    float32 where the file holds blocks.

    Of a checkpoint that is quantised already, `quantization` says how, `quantized` which tensors (the others are floats),
    and `read_quantized` returns the codes and scales of one of them, `[in, out]`.
    """

    source: str
    config: dict
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    quantization: Quantization | None = None
    quantized: frozenset[str] = frozenset()
    read_quantized: Callable[[str], QuantizedTensor] | None = None


def unknown_tensor(source: str, name: str, known: Mapping[str, object]) -> CheckpointError:
    """The error of `read` for a name that the checkpoint lacks."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Nearest: {', '.join(near)}." if near else ""
    return CheckpointError(f"{source}: has no tensor {name!r} among its {len(known)}.{hint}")
