"""Folders of safetensors: exact values, bounded memory, and damage reported before a tensor is read."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_jax.checkpoint import safetensors as safetensors_folder
from qlora_jax.checkpoint.safetensors import open_safetensors_folder
from qlora_jax.errors import CheckpointError

NUMPY_TYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NUMPY_TYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "U8": np.uint8}


def write_file(path: Path, entries: dict[str, tuple[str, np.ndarray]], header: bytes | None = None) -> None:
    """A .safetensors file written by hand, so that it can be wrong in any way."""
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in entries.items():
        content = array.tobytes()
        table[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps(table).encode() if header is None else header
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def sharded(folder: Path, shards: dict[str, list[str]]) -> Path:
    """A well-formed folder of shards, each with small float32 tensors of the given names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for shard, names in shards.items():
        save_file({name: np.full((2, 3), index, np.float32) for index, name in enumerate(names)}, folder / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def problems_of(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_safetensors_folder(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_every_float_type_is_read_as_it_is(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=(3, 5))
    arrays = {name: values.astype(dtype) for name, dtype in NUMPY_TYPES.items()}
    (tmp_path / "config.json").write_text("{}")
    write_file(tmp_path / "model.safetensors", {name: (name, array) for name, array in arrays.items()})
    checkpoint = open_safetensors_folder(tmp_path)
    assert checkpoint.shapes == dict.fromkeys(arrays, (3, 5))
    for name, array in arrays.items():
        found = checkpoint.read(name)
        assert found.dtype == array.dtype
        assert found.flags.writeable
        assert found.flags.c_contiguous
        assert found.tobytes() == array.tobytes()


def test_scalars_and_empty_tensors(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    entries = {"scalar": ("F32", np.float32(7).reshape(())), "empty": ("F32", np.zeros((0, 4), np.float32))}
    write_file(tmp_path / "model.safetensors", entries)
    checkpoint = open_safetensors_folder(tmp_path)
    assert checkpoint.read("scalar") == np.float32(7)
    assert checkpoint.read("empty").shape == (0, 4)


def test_torch_writes_what_we_read(tmp_path: Path):
    torch = pytest.importorskip("torch", reason="compares with PyTorch's own bfloat16")
    from safetensors.torch import save_file as save_torch

    tensor = torch.randn(7, 9).to(torch.bfloat16)
    (tmp_path / "config.json").write_text("{}")
    save_torch({"w": tensor}, tmp_path / "model.safetensors")
    found = open_safetensors_folder(tmp_path).read("w")
    np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())


def test_shards(tmp_path: Path):
    checkpoint = open_safetensors_folder(sharded(tmp_path, {"a.safetensors": ["x", "y"], "b.safetensors": ["z"]}))
    assert set(checkpoint.shapes) == {"x", "y", "z"}
    assert checkpoint.read("y")[0, 0] == 1
    assert checkpoint.read("z")[0, 0] == 0


def test_each_of_hundreds_of_shards_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sharded(tmp_path, {f"model-{i:05}.safetensors": [f"layer.{i}.{j}" for j in range(5)] for i in range(300)})
    opened: list[str] = []

    def open_and_count(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return open(path, *arguments, **options)

    monkeypatch.setattr(safetensors_folder, "open", open_and_count, raising=False)
    assert len(open_safetensors_folder(tmp_path).shapes) == 1500
    assert sorted(opened) == [f"model-{i:05}.safetensors" for i in range(300)]


def test_all_problems_in_one_error(tmp_path: Path):
    shards = {f"{name}.safetensors": [f"{name}.0", f"{name}.1"] for name in "abcde"}
    folder = sharded(tmp_path, shards)
    (folder / "config.json").unlink()
    (folder / "a.safetensors").unlink()
    whole = (folder / "b.safetensors").read_bytes()
    (folder / "b.safetensors").write_bytes(whole[:-10])
    save_file({"c.0": np.zeros(1, np.float32), "other": np.zeros(1, np.float32)}, folder / "c.safetensors")
    (folder / "d.safetensors").write_bytes(b"\xff" * 64)
    text = problems_of(folder)
    assert "4 problems" in text
    assert "config.json: is missing" in text
    assert "a.safetensors: is missing (2 of the tensors" in text
    assert f"b.safetensors: is truncated: expected {len(whole)} bytes, found {len(whole) - 10}" in text
    assert "d.safetensors: has a corrupt header" in text


def test_an_index_that_lists_too_much_or_too_little(tmp_path: Path):
    """The headers say which tensors there are; one that lies in two files is taken from where the index places it."""
    folder = sharded(tmp_path, {"a.safetensors": ["x"], "b.safetensors": ["y"]})
    save_file({"x": np.zeros(1, np.float32), "unlisted": np.ones(1, np.float32)}, folder / "a.safetensors")
    save_file({"x": np.ones(2, np.float32), "y": np.ones(2, np.float32)}, folder / "b.safetensors")
    weight_map = {"x": "b.safetensors", "y": "b.safetensors", "z": "a.safetensors", "w": "gone.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert problems_of(folder).endswith(
        "gone.safetensors: is missing (1 of the tensors in model.safetensors.index.json are in it)."
    )
    index.write_text(json.dumps({"weight_map": {**weight_map, "w": "a.safetensors"}}))
    checkpoint = open_safetensors_folder(folder)
    assert dict(checkpoint.shapes) == {"x": (2,), "y": (2,), "unlisted": (1,)}
    np.testing.assert_array_equal(checkpoint.read("x"), np.ones(2))
    index.write_text(json.dumps({"weight_map": {"y": "b.safetensors", "z": "a.safetensors"}}))
    assert "safetensors: holds 'x', which" in problems_of(folder)


def test_complete_shards_need_no_index(tmp_path: Path):
    folder = sharded(tmp_path, {f"model-0000{i}-of-00002.safetensors": [f"t{i}"] for i in (1, 2)})
    (folder / "model.safetensors.index.json").unlink()
    assert open_safetensors_folder(folder).shapes.keys() == {"t1", "t2"}
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert "several shards need their index" in problems_of(folder)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n",
            "found a pointer of Git LFS; fetch the file",
        ),
        (b"\n<!DOCTYPE html><html>Not found</html>", "found a web page; download the file itself"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_download_that_failed(tmp_path: Path, name: str, content: bytes, found: str):
    (tmp_path / name).write_bytes(content)
    assert found in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"{not json", "corrupt header: expected 9 bytes of JSON"),
        (b"[]", "bytes of JSON, an object, found a list"),
        (b'{"w": {"dtype": "F32", "shape": [2]}}', "tensor 'w': expected dtype, shape and data_offsets"),
        (
            b'{"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
            "expected dtype, shape and data_offsets",
        ),
        (b'{"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', "expected dtype, shape and data_offsets"),
        (b"[" * 100_000, "nested too deeply"),
        (
            b'{"w": {"dtype": "F32", "shape": [' + b"1, " * 40 + b'2], "data_offsets": [0, 8]}}',
            "expected dtype, shape and data_offsets",
        ),
        (
            b'{"w": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}',
            "expected one of the types F64.*found 'F3'",
        ),
        (
            b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
            r"expected 12 bytes for F32 \[3\], found",
        ),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "to begin at offset 0.*found 4"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', "belong to no tensor"),
    ],
)
def test_damaged_headers(tmp_path: Path, header: bytes, expected: str):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=expected):
        open_safetensors_folder(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_truncated_within_the_header(tmp_path: Path, size: int):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    write_file(path, {"w": ("F32", np.zeros(4, np.float32))})
    path.write_bytes(path.read_bytes()[:size])
    assert re.search(rf"corrupt header|truncated within its header.*found (a file of )?{size}\b", problems_of(tmp_path))


def test_truncated_after_it_was_opened(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    write_file(path, {"w": ("F32", np.zeros(4, np.float32))})
    checkpoint = open_safetensors_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"changed after it was opened: tensor 'w': expected 16 bytes.*found 13"):
        checkpoint.read("w")


@pytest.mark.parametrize(("text", "expected"), [("{", "malformed"), ("[]", "expected a JSON object, found a list")])
def test_malformed_config(tmp_path: Path, text: str, expected: str):
    sharded(tmp_path, {"a.safetensors": ["x"]})
    (tmp_path / "config.json").write_text(text)
    assert "config.json: is malformed" in problems_of(tmp_path)
    assert expected in problems_of(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"x": 1}, {"x": "../a.safetensors"}, {"x": "a.bin"}])
def test_malformed_index(tmp_path: Path, weight_map: object):
    sharded(tmp_path, {"a.safetensors": ["x"]})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json: is malformed: expected an object 'weight_map'" in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pytorch_model.bin", "convert them to safetensors"),
        ("pytorch_model.bin.index.json", "convert them to safetensors"),
        ("adapter_config.json", "holds an adapter"),
        ("m.gguf", "to read a GGUF file give its own path"),
        ("model-00001-of-00002.safetensors", "several shards need their index"),
        ("README.md", "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_folder_without_readable_weights(tmp_path: Path, file: str, expected: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    assert expected in problems_of(tmp_path)


MEASURE = """
import sys
from pathlib import Path
from qlora_jax.checkpoint.safetensors import open_safetensors_folder

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

checkpoint = open_safetensors_folder(Path(sys.argv[1]))
before = memory("VmRSS")
for name in checkpoint.shapes:
    tensor = checkpoint.read(name)
    assert not tensor.any()
print(memory("VmHWM") - before)
"""


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident memory")
def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path):
    rows, columns, count = 5000, 2500, 20
    size = rows * columns * 2
    header = json.dumps(
        {
            f"layer.{i}": {
                "dtype": "BF16",
                "shape": [rows, columns],
                "data_offsets": [i * size, (i + 1) * size],
            }
            for i in range(count)
        }
    ).encode()
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + count * size)  # 500 MB that take no disk: a hole reads as zeros
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    # Two at once: the one just read, and the one that the loop has not let go of.
    assert int(done.stdout) < 2 * size + 2**22, f"{int(done.stdout) / size:.2f} tensors of {math.ceil(size / 1e6)} MB"
