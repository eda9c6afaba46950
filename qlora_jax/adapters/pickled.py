"""Reads adapter_model.bin, the file that torch.save writes, without running anything that it says.

The file is a ZIP archive whose entries are not compressed:

    NAME/data.pkl       a pickle: {name of a tensor: _rebuild_tensor_v2(storage, offset, shape, strides, …)}
    NAME/data/KEY       the bytes of one storage; data.pkl refers to it as ("storage", type, KEY, device, number of values)
    NAME/byteorder      "little"; missing in older files

A pickle is a program that may call any function. Here only the instructions that torch.save uses are accepted, and the only
names that they may refer to are those of `_NAMES`, which stand for functions of this module. Nothing of torch is imported.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.errors import CheckpointError, list_names, shortened

__all__ = ["PickledTensor", "open_pickled"]

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_INSTRUCTIONS = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "BINPERSID",
        "MEMOIZE",
        "BINPUT",
        "LONG_BINPUT",
        "BINGET",
        "LONG_BINGET",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "BINFLOAT",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
    ]
)
_MOST_SHARED = 8  # several tensors may use one storage: so many times the bytes of the file at most
_MOST_AXES = 32
_MOST_INSTRUCTIONS = 2_000_000  # a tensor takes about 30
_MOST_BYTES = 2**26  # of the pickle


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    values: int


class _View(NamedTuple):
    """A tensor as the pickle describes it: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class PickledTensor(NamedTuple):
    """A tensor of a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_pickled(path: Path, place: str) -> dict[str, PickledTensor]:
    """Return the tensors of a file by name. Only the descriptions of the tensors are read.

    Args:
        path: the file.
        place: the name of the folder in messages.

    Raises:
        CheckpointError: the file is damaged, of an older format, or holds anything but tensors.
    """
    advice = "save it as adapter_model.safetensors, which PEFT does since version 0.6"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"expected one data.pkl in the archive, found {len(pickles)}")
            packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise CheckpointError(f"expected entries that are not compressed, found {list_names(packed)}")
            prefix = pickles[0].removesuffix("data.pkl")
            order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in entries else b"little"
            if order != b"little":
                raise CheckpointError(f"expected little-endian values, found {order[:20]!r}")
            if (size := entries[pickles[0]].file_size) > _MOST_BYTES:
                raise CheckpointError(f"expected a data.pkl of at most {_MOST_BYTES:,} bytes, found {size:,}")
            views = _views(archive.read(pickles[0]))
        problems = [problem for name, view in views.items() if (problem := _problem(name, view, prefix, entries))]
        size = sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values() if not problems)
        if size > _MOST_SHARED * path.stat().st_size:
            problems.append(f"expected tensors of at most {_MOST_SHARED} times the file's size, found {size:,} bytes")
        if problems:
            raise CheckpointError(list_names(problems))
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{place}: {path.name}: expected an archive as torch.save writes it since version 1.6, found: {error}; {advice}."
        ) from error
    # The reader of archives and that of pickles raise many types for damaged files.
    except (Exception, RecursionError) as error:
        raise CheckpointError(f"{place}: {path.name} is damaged: {error or type(error).__name__}; {advice}.") from error
    return {name: PickledTensor(view.shape, _reader(path, prefix, view)) for name, view in views.items()}


def _views(text: bytes) -> dict[str, _View]:
    """Return the tensors that a pickle describes."""
    for count, (instruction, argument, _) in enumerate(pickletools.genops(text)):
        if count > _MOST_INSTRUCTIONS:
            raise CheckpointError(f"expected a pickle of at most {_MOST_INSTRUCTIONS:,} instructions, found more")
        if instruction.name not in _INSTRUCTIONS:
            raise CheckpointError(f"expected a pickle of tensors alone, found the instruction {instruction.name}")
        if instruction.name in ("BINPUT", "LONG_BINPUT") and int(str(argument)) > len(text):
            raise CheckpointError("expected as many remembered values as the pickle has at most")
    found = _Unpickler(io.BytesIO(text)).load()
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"expected tensors by name, found {type(found).__name__}")
    if others := [name for name, value in found.items() if not isinstance(value, _View)]:
        raise CheckpointError(f"expected tensors, found other values: {list_names(others)}")
    return found


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows the names of `_NAMES` alone."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "torch" and global_name in _STORAGES:
            return global_name
        if (module_name, global_name) not in _NAMES:
            raise CheckpointError(f"refers to {module_name}.{global_name}, which is no part of a tensor and is not run")
        return _NAMES[module_name, global_name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, values = pid
        if kind != "storage" or storage not in _STORAGES or not isinstance(key, str) or type(values) is not int:
            raise CheckpointError("expected a reference to a storage, found another")
        return _Storage(key, np.dtype(_STORAGES[storage]), values)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _View:
    sizes = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(size) is not int or size < 0 for size in sizes):
        raise CheckpointError("expected a tensor of whole numbers, found another value")
    if len(shape) != len(strides) or len(shape) > _MOST_AXES:
        raise CheckpointError(f"expected a stride for each axis, found {len(shape)} axes and {len(strides)} strides")
    return _View(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


def _problem(name: str, view: _View, prefix: str, entries: dict[str, zipfile.ZipInfo]) -> str | None:
    """Return what is wrong with a tensor's view of its storage; None: nothing."""
    entry = entries.get(f"{prefix}data/{view.storage.key}")
    if entry is None:
        return f"{name}: the archive has no storage {shortened(view.storage.key)}"
    held = entry.file_size // view.storage.dtype.itemsize
    size = math.prod(view.shape)
    last = view.offset + sum((n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)) if size else -1
    if last >= held or size > held:
        return f"{name}: expected a storage of {max(last + 1, size)} values or more, found {held}"
    return None


def _reader(path: Path, prefix: str, view: _View) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        try:
            with zipfile.ZipFile(path) as archive:
                values = np.frombuffer(archive.read(f"{prefix}data/{view.storage.key}"), np.uint8)
        except (zipfile.BadZipFile, OSError, EOFError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: is damaged: {error}") from error
        dtype = view.storage.dtype
        values = values[: len(values) // dtype.itemsize * dtype.itemsize].view(dtype)[view.offset :]
        strides = [stride * dtype.itemsize for stride in view.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, view.shape, strides))

    return read
