"""Reads the header of a GGUF file: the metadata and the list of tensors, which is everything before the data.

Byte layout, little endian; a string is a uint64 length and UTF-8 bytes:

    "GGUF", uint32 version (2 or 3), uint64 number of tensors, uint64 number of metadata entries
    each entry:   string key, uint32 type, value      (an array: uint32 element type, uint64 length, elements)
    each tensor:  string name, uint32 d, d x uint64 sizes (fastest first: the reverse of numpy's shape),
                  uint32 storage type, uint64 offset into the data
    padding to `general.alignment` (32), then the data: row-major, a row being a whole number of blocks

`read_header` parses it in one pass, without a memory map.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora_jax.errors import CheckpointError

__all__ = ["Header", "StoredTensor", "read_header"]

VERSIONS = (2, 3)

SCALARS = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: `shape` in NumPy's order, `offset` from the start of the file, `size` in bytes."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """A GGUF file without its data: metadata by key (arrays as lists) and tensors by GGUF's names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Return the header of a file. Raise CheckpointError where it is no GGUF file, or ends early."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        parser = _Parser(path, file, size)
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(f"{path}: is not a GGUF file: expected it to begin with b'GGUF', found {magic!r}.")
        version = parser.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"version {swapped}, big endian" if swapped in VERSIONS else f"version {version}"
            raise CheckpointError(f"{path}: expected GGUF version 2 or 3, little endian; found {what}.")
        tensor_count, entry_count = parser.scalar("Q"), parser.scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = parser.string()
            metadata[key] = parser.value(parser.scalar("I"))
        table = [parser.tensor() for _ in range(tensor_count)]
        end = file.tell()

    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise CheckpointError(f"{path}: expected general.alignment to be a positive number, found {alignment!r}.")
    start = -(-end // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, shape, code, offset in table:
        if name in tensors:
            problems.append(f"tensor {name!r} occurs twice.")
            continue
        try:
            storage = GGMLQuantizationType(code)
        except ValueError:
            problems.append(f"tensor {name!r}: has storage type {code}, which the installed gguf package does not know.")
            continue
        block, block_bytes = GGML_QUANT_SIZES[storage]
        if not shape or shape[-1] % block:
            problems.append(f"tensor {name!r}: expected rows of whole {storage.name} blocks ({block}), found {list(shape)}.")
            continue
        tensors[name] = StoredTensor(storage, shape, start + offset, math.prod(shape) // block * block_bytes)
    if problems:
        raise CheckpointError.of(path, problems)
    return Header(path, metadata, tensors)


class _Parser:
    """Reads the header's values. A file that ends early is a CheckpointError wherever it ends."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size

    def bytes(self, count: int) -> bytes:
        at = self.file.tell()
        # Compared before reading: a damaged length must not make us ask for petabytes.
        if at + count > self.size:
            raise CheckpointError(
                f"{self.path}: is truncated or damaged within its header: expected {count:,} bytes at offset "
                f"{at:,}, found {max(self.size - at, 0):,} (the file has {self.size:,})."
            )
        return self.file.read(count)

    def scalar(self, code: str) -> int:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def string(self) -> str:
        text = self.bytes(self.scalar("Q"))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: is damaged within its header: expected UTF-8 before offset "
                f"{self.file.tell():,}, found {error}."
            ) from error

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, length = self.scalar("I"), self.scalar("Q")
            if element in SCALARS:
                return self.numbers(element, length).tolist()
            return [self.value(element) for _ in range(length)]
        if kind not in SCALARS:
            raise CheckpointError(
                f"{self.path}: is damaged within its header: expected a type of value from 0 to 12 before "
                f"offset {self.file.tell():,}, found {kind}."
            )
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, length: int) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.bytes(dtype.itemsize * length), dtype)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        sizes = [self.scalar("Q") for _ in range(self.scalar("I"))]
        return name, tuple(reversed(sizes)), self.scalar("I"), self.scalar("Q")
