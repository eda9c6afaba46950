"""Reads the values of a GGUF file's tensors, in bands of rows.

The packed bytes of a band of rows are read, dequantised (`gguf.quants`) and written as float32 into the result, one band
after the other, so that the peak memory is the result and one band. The packed types are those that the gguf package can
dequantise in NumPy: F32, F16, BF16, Q4_0 to Q8_0, all K-quants, the IQ types, MXFP4 and a few more.
"""

import math
from collections.abc import Sequence

import gguf.quants
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from qlora_jax.checkpoint.gguf.header import Header, StoredTensor
from qlora_jax.errors import CheckpointError, list_names

__all__ = ["check_storage", "read_values"]

BAND_BYTES = 1 << 24  # of float32 output: long enough for numpy to be quick, small beside any weight


def read_values(header: Header, name: str, order: np.ndarray | None = None) -> np.ndarray:
    """Return one tensor as float32. Row n of the file becomes row `order[n]` of the result, where an order is given.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    tensor = header.tensors[name]
    rows = _rows(tensor)
    result = np.empty((rows, math.prod(tensor.shape) // max(rows, 1)), np.float32)
    row_bytes = tensor.size // max(rows, 1)
    band = max(1, BAND_BYTES // max(result.shape[1] * 4, 1))
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        for first in range(0, rows, band):
            count = min(band, rows - first)
            packed = np.empty((count, row_bytes), np.uint8)
            found = file.readinto(packed.data)
            if found != packed.size:
                raise CheckpointError(
                    f"{tensor.file}: changed after it was opened: tensor {name!r}: expected {packed.size:,} more "
                    f"bytes at row {first}, found {found or 0:,}."
                )
            values = gguf.quants.dequantize(packed, tensor.type)
            result[slice(first, first + count) if order is None else order[first : first + count]] = values
    return result.reshape(tensor.shape)


def _rows(tensor: StoredTensor) -> int:
    """Return the number of rows to read.

    A vector of plain floats has rows of one element, so that the bias of a projection can be reordered like its weight.
    """
    block, _ = GGML_QUANT_SIZES[tensor.type]
    return math.prod(tensor.shape if len(tensor.shape) == 1 and block == 1 else tensor.shape[:-1])


def check_storage(header: Header) -> None:
    """Raise CheckpointError where the file ends early, or holds types that cannot be dequantised."""
    problems: list[str] = []
    for path in dict.fromkeys(tensor.file for tensor in header.tensors.values()):
        ends = {name: tensor.offset + tensor.size for name, tensor in header.tensors.items() if tensor.file == path}
        size = path.stat().st_size
        if cut := [name for name, end in ends.items() if end > size]:
            part = "" if path == header.path else f"part {path.name} "
            problems.append(
                f"{part}is truncated: expected {max(ends.values()):,} bytes, found {size:,}; incomplete are {_quoted(cut)} "
                f"({len(cut)} of {len(ends)} tensors)."
            )
    for storage in sorted({tensor.type for tensor in header.tensors.values()}):
        try:
            gguf.quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[storage][1]), np.uint8), storage)
        except NotImplementedError:
            names = [name for name, tensor in header.tensors.items() if tensor.type == storage]
            problems.append(f"the gguf package cannot dequantise {storage.name}, the storage type of {_quoted(names)}.")
    if problems:
        raise CheckpointError.of(header.path, problems)


def _quoted(names: Sequence[str]) -> str:
    return list_names([repr(name) for name in names])
