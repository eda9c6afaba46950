"""Opens a Hugging Face folder: config.json and one or more .safetensors files.

Byte layout of a .safetensors file, little endian:

    offset 0      uint64  n, the length of the header
    offset 8      n bytes of JSON: {name: {"dtype": "BF16", "shape": [out, in], "data_offsets": [begin, end]},
                                    "__metadata__": {str: str}}
    offset 8 + n  data; tensor `name` is bytes begin … end of it, row-major. Tensors follow one another
                  without gaps, and the file ends where the last one does: a short file has been truncated.

A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`:
{"weight_map": {name: shard}}.

`open_safetensors_folder` reads the headers (kilobytes a shard), checks them against the index and against the sizes of the
files, and reports all problems in one error. `read` opens the shard and reads one tensor into a new array. It uses no memory
map, because the pages of a map that were read count as resident memory as long as the map exists.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint, unknown_tensor
from qlora_jax.errors import CheckpointError

__all__ = ["open_safetensors_folder"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


def open_safetensors_folder(folder: Path, name: str | None = None) -> Checkpoint:
    """Return an opened folder, after checking everything that headers show; `name` is used in messages."""
    place = name or str(folder)
    problems: list[str] = []
    config = _read_json_object(folder / "config.json", problems)
    tensors = _read_headers(folder, problems)
    if problems:
        raise CheckpointError.of(place, problems)
    assert config is not None

    def read(tensor_name: str) -> np.ndarray:
        if tensor_name not in tensors:
            raise unknown_tensor(place, tensor_name, tensors)
        return _read_tensor(tensor_name, tensors[tensor_name])

    return Checkpoint(place, config, {key: tensor.shape for key, tensor in tensors.items()}, read)


def _read_tensor(name: str, tensor: Tensor) -> np.ndarray:
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


def _read_headers(folder: Path, problems: list[str]) -> dict[str, Tensor]:
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE, problems) or {}
    if not (folder / INDEX).is_file():
        problems.append(_no_weights(folder))
        return {}
    index = _read_json_object(folder / INDEX, problems)
    if index is None:
        return {}
    names_of = _names_by_shard(index.get("weight_map"))
    if names_of is None:
        problems.append(
            f"{INDEX}: is malformed: expected an object 'weight_map' from tensor names to names of "
            ".safetensors files in this folder."
        )
        return {}
    tensors: dict[str, Tensor] = {}
    for shard, promised in names_of.items():
        if not (folder / shard).is_file():
            problems.append(f"{shard}: is missing ({len(promised)} of the tensors in {INDEX} are in it).")
            continue
        found = _read_header(folder / shard, problems)
        if found is None:
            continue
        if absent := sorted(promised - found.keys()):
            problems.append(f"{shard}: lacks {_listed(absent)}, which {INDEX} places in it.")
        if extra := sorted(found.keys() - promised):
            problems.append(f"{shard}: holds {_listed(extra)}, which {INDEX} does not place in it.")
        tensors.update(found)
    return tensors


def _names_by_shard(weight_map: object) -> dict[str, set[str]] | None:
    if not isinstance(weight_map, dict) or not weight_map:
        return None
    names_of: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A plain file name: an index must not reach outside its folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or "/" in shard or "\\" in shard:
            return None
        names_of.setdefault(shard, set()).add(tensor)
    return names_of


def _read_header(path: Path, problems: list[str]) -> dict[str, Tensor] | None:
    """Return the tensors of one file; None after adding what is wrong with the file to `problems`."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
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
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name}: has a corrupt header: expected {length:,} bytes of JSON, found: {error}.")
        return None
    if not isinstance(header, dict):
        problems.append(f"{path.name}: has a corrupt header: expected a JSON object, found a {type(header).__name__}.")
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
            if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
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


def _read_json_object(path: Path, problems: list[str]) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{path.name}: is missing.")
        return None
    except (ValueError, RecursionError, OSError) as error:
        problems.append(f"{path.name}: is malformed: expected a JSON object, found: {error}.")
        return None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: is malformed: expected a JSON object, found a {type(value).__name__}.")
        return None
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
