"""Writes the files of a Hugging Face folder: .safetensors shards whose tensors are streamed, and JSON.

The sizes of all tensors are known before any is read. The header of a shard is therefore written first, and its tensors are
streamed after it, one at a time.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

__all__ = ["Entry", "bytes_of", "split_into_shards", "write_json", "write_shard"]

Entry = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of a tensor in a file
_CODES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint8): "U8",
}


def bytes_of(entries: Mapping[str, Entry]) -> int:
    """Return the size of these tensors in a file."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())


def split_into_shards(entries: Mapping[str, Mapping[str, Entry]], limit: int) -> dict[str, list[str]]:
    """Return which file holds which tensors. Files are filled in order, up to `limit` bytes each.

    Args:
        entries: what each tensor of the checkpoint is written as, by its name.
    """
    groups: list[list[str]] = [[]]
    filled = 0
    for name, parts in entries.items():
        size = bytes_of(parts)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_shard(path: Path, entries: Mapping[str, Entry], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """Write one .safetensors file: the length of the header as uint64, the header padded to 8 bytes, and the data without
    gaps. `tensors` must come in the order of `entries`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), (found, tensor) in zip(entries.items(), tensors, strict=True):
            assert (name, dtype, math.prod(shape)) == (found, tensor.dtype, tensor.size), (name, found)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
