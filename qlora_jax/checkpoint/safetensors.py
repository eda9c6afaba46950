"""Opens a Hugging Face folder: config.json and one or more .safetensors files.

Byte layout of a .safetensors file, little endian:

    offset 0      uint64  n, the length of the header
    offset 8      n bytes of JSON: {name: {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]},
                                    "__metadata__": {str: str}}
    offset 8 + n  data; tensor `name` is bytes begin … end of it, row-major. Tensors follow one another
                  without gaps, and the file ends where the last one does: a short file has been truncated.

A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`:
{"weight_map": {name: shard}}. The index says which files belong to the model. Which tensors they hold, their headers say:
an index may list a tensor that its shard lacks, or leave one out, as indexes do that were made for another version of the
model. A shard may be missing if no tensor that the index places in it is needed, such as that of a vision tower; a warning
says so. Whether every tensor of the model is there is checked against the model (checkpoint/load.py).

`open_safetensors_folder` reads the headers (kilobytes a shard), checks them against the sizes of the files, and reports all
problems in one error. `read` opens the shard and reads one tensor into a new array. It uses no memory map, because the pages
of a map that were read count as resident memory as long as the map exists. `read_safetensors` and `read_tensor` do the
same for one file, such as that of an adapter.
"""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint, unknown_tensor
from qlora_jax.checkpoint.files import parse_object, read_object
from qlora_jax.checkpoint.index import INDEX, SINGLE, shards_of_index
from qlora_jax.errors import CheckpointError, failed_download, list_names

__all__ = ["Tensor", "open_safetensors_folder", "read_safetensors", "read_tensor"]

SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
MAX_AXES = 32  # as many as NumPy can always hold
MAX_HEADER_BYTES = 100_000_000  # the format's own limit; beyond it the length itself is damaged
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        # These are no floats, but parts of checkpoints that are quantised already (packed codes, codebooks).
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


class Tensor(NamedTuple):
    """The place of one tensor: `offset` counts from the start of `file`."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def open_safetensors_folder(
    folder: Path, name: str | None = None, needs: Callable[[dict], Callable[[str], bool]] | None = None
) -> Checkpoint:
    """Return an opened folder, after checking everything that headers show.

    Args:
        folder: the folder.
        name: its name in messages.
        needs: returns, for a config.json, a function that says whether the model needs the tensor of a name; it is called
            if a shard is missing. None: all tensors are needed.

    Raises:
        CheckpointError: files are missing or damaged; all problems in one message.
    """
    place = name or str(folder)
    problems: list[str] = []
    config = _read_json(folder / "config.json", problems)
    tensors, lost = _read_folder(folder, problems)
    needed = needs(config) if lost and needs is not None and config is not None else None
    for shard, absent in lost.items():
        if wanted := [name for name in absent if needed is None or needed(name)]:
            problems.append(f"{shard}: is missing ({len(wanted)} of the tensors in {INDEX} are in it).")
    if problems:
        raise CheckpointError.of(place, problems)
    assert config is not None
    for shard, absent in lost.items():
        warnings.warn(
            f"{place}: {shard} is missing; the model does not need the {len(absent)} tensors that {INDEX} places in it: "
            f"{list_names(sorted(absent))}",
            stacklevel=3,
        )

    def read(tensor_name: str) -> np.ndarray:
        if tensor_name not in tensors:
            raise unknown_tensor(place, tensor_name, tensors)
        return read_tensor(tensor_name, tensors[tensor_name])

    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    return Checkpoint(place, config, shapes, read, dtypes={key: tensor.dtype for key, tensor in tensors.items()})


def read_tensor(name: str, tensor: Tensor) -> np.ndarray:
    """Return one tensor of a file whose header was read.

    Raises:
        CheckpointError: the file has become shorter since.
    """
    array = np.empty(tensor.shape, tensor.dtype)
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(tensor.offset)
        view = array.reshape(-1).view(np.uint8).data
        filled = 0
        while filled < len(view):  # one call returns at most 2 GiB
            count = file.readinto(view[filled:])
            if not count:
                raise CheckpointError(
                    f"{tensor.file}: changed after it was opened: tensor {name!r}: expected {len(view):,} "
                    f"bytes at offset {tensor.offset:,}, found {filled:,}."
                )
            filled += count
    return array


def _read_folder(folder: Path, problems: list[str]) -> tuple[dict[str, Tensor], dict[str, set[str]]]:
    """Return (the tensors of a folder by name, the names of the tensors of each missing shard).

    What is wrong with its files is added to `problems`.
    """
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE, problems) or {}, {}
    if (folder / INDEX).is_file():
        try:
            names_of = shards_of_index(folder / INDEX)
        except CheckpointError as error:
            problems.append(str(error))
            return {}, {}
    elif complete := _complete_shards(folder):
        names_of = {name: set[str]() for name in complete}
    else:
        problems.append(_no_weights(folder))
        return {}, {}
    tensors: dict[str, Tensor] = {}
    lost: dict[str, set[str]] = {}
    for shard, promised in names_of.items():
        if not (folder / shard).is_file():
            lost[shard] = promised
            continue
        for name, tensor in (read_safetensors(folder / shard, problems) or {}).items():
            if name not in tensors or name in promised:
                tensors[name] = tensor
            elif name not in names_of[tensors[name].file.name]:
                problems.append(f"{shard}: holds {name!r}, which {tensors[name].file.name} holds too.")
    return tensors, {shard: absent for shard, promised in lost.items() if (absent := promised - tensors.keys())}


def _complete_shards(folder: Path) -> list[str]:
    """Return the shards model-00001-of-N to model-N-of-N of a folder without an index, if they are all there."""
    found = sorted(path.name for path in folder.glob("model-*-of-*.safetensors") if SHARD.fullmatch(path.name))
    count = int(found[0][-17:-12]) if found else 0
    return found if found == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] else []


def read_safetensors(path: Path, problems: list[str]) -> dict[str, Tensor] | None:
    """Return the tensors of one file by name; None after adding what is wrong with the file to `problems`.

    Only the header is read; `read_tensor` reads a tensor.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(40)
        if found := failed_download(first):
            problems.append(f"{path.name}: expected weights, found {found}.")
            return None
        file.seek(8)
        prefix = first[:8]
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > MAX_HEADER_BYTES:
            problems.append(
                f"{path.name}: has a corrupt header: expected 8 bytes with its length (at most "
                f"{MAX_HEADER_BYTES:,}), found "
                + (f"the length {length:,}." if len(prefix) == 8 else f"a file of {size:,} bytes.")
            )
            return None
        if 8 + length > size:
            problems.append(
                f"{path.name}: is truncated within its header: expected at least {8 + length:,} bytes, found {size:,}."
            )
            return None
        text = file.read(length)
    try:
        header = parse_object(text)
    except CheckpointError as error:
        problems.append(f"{path.name}: has a corrupt header: expected {length:,} bytes of JSON, an object, found {error}.")
        return None
    header.pop("__metadata__", None)

    start = 8 + length
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int, str]] = []
    wrong: list[str] = []
    for name, entry in header.items():
        try:
            dtype = DTYPES.get(entry["dtype"])
            shape = tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            sizes = (*shape, begin, end)
            if len(shape) > MAX_AXES or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            wrong.append(f"tensor {name!r}: expected dtype, shape and data_offsets, found {str(entry)[:120]}")
            continue
        if dtype is None:
            wrong.append(f"tensor {name!r}: expected one of the types {', '.join(DTYPES)}; found {entry['dtype']!r}")
            continue
        if math.prod(shape) * dtype.itemsize != end - begin:
            wrong.append(
                f"tensor {name!r}: expected {math.prod(shape) * dtype.itemsize:,} bytes for {entry['dtype']} "
                f"{list(shape)}, found data_offsets {begin}…{end}"
            )
            continue
        tensors[name] = Tensor(path, start + begin, dtype, shape)
        spans.append((begin, end, name))
    if wrong:
        problems.extend(f"{path.name}: has a corrupt or unsupported header: {text}." for text in wrong)
        return None

    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            problems.append(
                f"{path.name}: has a corrupt header: expected tensor {name!r} to begin at offset "
                f"{reached:,}, where its predecessor ends, found {begin:,}."
            )
            return None
        reached = end
    if start + reached != size:
        what = "is truncated" if size < start + reached else "has bytes that belong to no tensor"
        problems.append(f"{path.name}: {what}: expected {start + reached:,} bytes, found {size:,}.")
        return None
    return tensors


def _read_json(path: Path, problems: list[str]) -> dict | None:
    try:
        value = read_object(path)
    except CheckpointError as error:
        problems.append(str(error))
        return None
    if value is None:
        problems.append(f"{path.name}: is missing.")
    return value


def _no_weights(folder: Path) -> str:
    """Return the problem of a folder without weights, with advice for the likely mistakes."""
    text = f"has neither {SINGLE} nor {INDEX}"
    if next(folder.glob("pytorch_model*.bin*"), None) is not None:
        return (
            f"{text}, only PyTorch's pickled .bin weights, which are not read: convert them to safetensors, "
            "with PyTorch installed, by "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) of transformers."
        )
    if (folder / "adapter_config.json").is_file():
        return f"{text}; it holds an adapter (adapter_config.json), not a base model."
    if ggufs := sorted(folder.glob("*.gguf")):
        return f"{text}; to read a GGUF file give its own path, for instance {ggufs[0]}."
    if others := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"{text}; it holds {_listed(others)}: several shards need their index, a single file that name."
    return f"{text}."


def _listed(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
