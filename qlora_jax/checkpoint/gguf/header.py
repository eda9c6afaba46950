"""Reads the header of a GGUF file: the metadata and the list of tensors, which is everything before the data.

Byte layout, little endian; a string is a uint64 length and UTF-8 bytes:

    "GGUF", uint32 version (2 or 3), uint64 number of tensors, uint64 number of metadata entries
    each entry:   string key, uint32 type, value      (an array: uint32 element type, uint64 length, elements)
    each tensor:  string name, uint32 d, d x uint64 sizes (fastest first: the reverse of numpy's shape),
                  uint32 storage type, uint64 offset into the data
    padding to `general.alignment` (32), then the data: row-major, a row being a whole number of blocks

`read_header` parses it in one pass, without a memory map. A large model may be split into files whose names end in
-00001-of-00003.gguf: each has its own table of tensors, and the first one has the metadata.
"""

import itertools
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qlora_jax.checkpoint.files import check_regular
from qlora_jax.errors import CheckpointError, failed_download, list_names, shortened

__all__ = ["Header", "StoredTensor", "part_names", "read_header"]

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
# The bytes of the smallest values: counts are compared with the size of the file before anything is read.
SMALLEST_STRING, SMALLEST_ARRAY, SMALLEST_ENTRY, SMALLEST_TENSOR = 8, 12, 13, 24
DEEPEST, MOST_DIMENSIONS, MOST_PARTS = 2, 4, 10_000  # arrays in arrays, sizes of a tensor, parts of a split file
MOST_ENTRIES, MOST_TENSORS, MOST_VALUES, MOST_TEXT = 2**16, 2**20, 2**23, 2**26  # values of an array, bytes of a text
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor: `shape` in NumPy's order, `offset` from the start of `file`, `size` in bytes."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int
    file: Path


@dataclass(frozen=True)
class Header:
    """A GGUF file without its data: metadata by key (arrays as lists) and tensors by GGUF's names."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Return the header of a file, or that of all parts of a split file, of which `path` may be any.

    Raises:
        CheckpointError: it is no GGUF file, ends early, describes impossible tensors, or lacks a part.
    """
    header = _read_file(path)
    count = header.metadata.get("split.count", 0)
    if type(count) is not int or count <= 1:
        return header
    return _joined(header, count)


def part_names(name: str) -> list[str] | None:
    """Return the names of all parts of a split file from that of one; None for the name of a file that is not split."""
    match = PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MOST_PARTS:
        return None
    return [f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1)]


def _joined(header: Header, count: int) -> Header:
    path = header.path
    names = part_names(path.name)
    if names is None or len(names) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts of a split file: expected a name that ends in -00001-of-{count:05}.gguf, "
            f"found {path.name}."
        )
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(f"{path}: is one of {count} parts of a split file: not beside it are {list_names(missing)}.")
    parts = [header if name == path.name else _read_file(path.parent / name) for name in names]
    tensors: dict[str, StoredTensor] = {}
    for index, part in enumerate(parts):
        found = part.metadata.get("split.no", index), part.metadata.get("split.count")
        if found != (index, count):
            raise CheckpointError(f"{part.path}: expected part {index} of {count} (split.no, split.count), found {found}.")
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise CheckpointError(f"{part.path}: holds tensors that another part holds too: {list_names(twice)}.")
        tensors |= part.tensors
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{path}: expected {total} tensors in all {count} parts, found {len(tensors)}.")
    return Header(parts[0].path, parts[0].metadata, tensors)


def _read_file(path: Path) -> Header:
    check_regular(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        parser = _Parser(path, file, size)
        magic = file.read(4)
        if magic != b"GGUF":
            found = failed_download(magic + file.read(36)) or repr(magic)
            raise CheckpointError(f"{path}: is not a GGUF file: expected it to begin with b'GGUF', found {found}.")
        version = parser.scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"version {swapped}, big endian" if swapped in VERSIONS else f"version {version}"
            raise CheckpointError(f"{path}: expected GGUF version 2 or 3, little endian; found {what}.")
        tensor_count, entry_count = parser.scalar("Q"), parser.scalar("Q")
        parser.check_count(entry_count, SMALLEST_ENTRY, MOST_ENTRIES)
        parser.check_count(tensor_count, SMALLEST_TENSOR, MOST_TENSORS)
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = parser.string()
            if key in metadata:
                raise CheckpointError(f"{path}: is damaged within its header: the entry {shortened(key, 200)} occurs twice.")
            metadata[key] = parser.value(parser.scalar("I"))
        table = [parser.tensor() for _ in range(tensor_count)]
        end = file.tell()

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise CheckpointError(f"{path}: expected general.alignment to be a positive number, found {shortened(alignment)}.")
    start = -(-end // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, shape, code, offset in table:
        if name in tensors:
            problems.append(f"tensor {shortened(name)} occurs twice.")
            continue
        try:
            storage = GGMLQuantizationType(code)
        except ValueError:
            problems.append(
                f"tensor {shortened(name)}: has storage type {code}, which the installed gguf package does not know."
            )
            continue
        block, block_bytes = GGML_QUANT_SIZES[storage]
        if not shape or 0 in shape or shape[-1] % block:
            problems.append(
                f"tensor {shortened(name)}: expected rows of whole {storage.name} blocks ({block}), found {list(shape)}."
            )
            continue
        tensors[name] = StoredTensor(storage, shape, start + offset, math.prod(shape) // block * block_bytes, path)
    problems += _overlapping(tensors)
    if problems:
        raise CheckpointError.of(path, problems)
    return Header(path, metadata, tensors)


def _overlapping(tensors: dict[str, StoredTensor]) -> list[str]:
    """Return the problems of tensors whose bytes belong to another tensor too."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].offset)
    return [
        f"tensor {shortened(second)}: expected it after {shortened(first)}, which ends at byte "
        f"{before.offset + before.size:,}, found it at {after.offset:,}."
        for (first, before), (second, after) in itertools.pairwise(ordered)
        if after.offset < before.offset + before.size
    ]


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

    def check_count(self, count: int, smallest: int, most: int = MOST_VALUES) -> None:
        """Raise CheckpointError where the rest of the file has no room for so many values of at least `smallest` bytes, or
        where there are more than a header has."""
        at = self.file.tell()
        if count > most:
            raise CheckpointError(
                f"{self.path}: is damaged within its header: expected at most {most:,} values after offset {at:,}, found "
                f"{count:,}."
            )
        if count * smallest > self.size - at:
            raise CheckpointError(
                f"{self.path}: is truncated or damaged within its header: expected {count:,} values after offset {at:,}, "
                f"found {max(self.size - at, 0):,} bytes."
            )

    def scalar(self, code: str) -> int:
        return struct.unpack("<" + code, self.bytes(struct.calcsize(code)))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        self.check_count(length, 1, MOST_TEXT)
        text = self.bytes(length)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{self.path}: is damaged within its header: expected UTF-8 before offset "
                f"{self.file.tell():,}, found {error}."
            ) from error

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY and depth < DEEPEST:
            element, length = self.scalar("I"), self.scalar("Q")
            if element in SCALARS:
                self.check_count(length, 1)
                return self.numbers(element, length).tolist()
            self.check_count(length, SMALLEST_STRING if element == STRING else SMALLEST_ARRAY)
            return [self.value(element, depth + 1) for _ in range(length)]
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
        name, dimensions = self.string(), self.scalar("I")
        if dimensions > MOST_DIMENSIONS:
            raise CheckpointError(
                f"{self.path}: is damaged within its header: tensor {shortened(name)}: expected at most {MOST_DIMENSIONS} "
                f"sizes, found {dimensions}."
            )
        sizes = [self.scalar("Q") for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self.scalar("I"), self.scalar("Q")
