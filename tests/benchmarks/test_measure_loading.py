"""scripts/benchmarks/measure_loading.py in small: the criterion itself needs gigabytes, its parts do not."""

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from scripts.benchmarks import measure_loading as script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "measure_loading.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "checkpoint"
    script.write_checkpoint(path, "tiny", 0.001, shard_bytes=300_000)
    return path


def test_what_is_written_is_a_sharded_checkpoint_of_the_wanted_size(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert 1_000_000 <= index["metadata"]["total_size"] < 1_500_000
    expected = script.synthetic_checkpoint("tiny", 0.001)
    found: dict[str, np.ndarray] = {}
    for shard in shards:
        with safe_open(shard, "np") as file:  # an independent reader
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == expected.shapes.keys()
    for name, tensor in found.items():
        assert tensor.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensor, expected.read(name))


def test_tensors_differ_and_have_the_scale_of_a_linear_layer() -> None:
    checkpoint = script.synthetic_checkpoint("tiny", 0.0)
    matrices = [np.float32(checkpoint.read(f"model.layers.0.mlp.{name}_proj.weight")) for name in ("gate", "up")]
    assert not np.array_equal(*matrices)
    for matrix in matrices:
        assert matrix.std() == pytest.approx(matrix.shape[1] ** -0.5, rel=0.02)


def test_it_loads(folder: Path) -> None:
    model = load_model(open_checkpoint(str(folder)), progress=False)
    assert model.layers.mlp.gate_proj.weight.get_value().shape[1:] == (128, 320)


def test_the_sampler_sees_memory_come_and_go() -> None:
    """Pages of their own: an array could come from memory that an earlier test of this process freed."""
    size = 200_000_000
    with script.sampling(0.001) as samples, mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
        time.sleep(0.2)
    assert max(samples) >= samples[0] + 0.9 * size
    assert samples[-1] <= max(samples) - 0.9 * size


@pytest.mark.integration
def test_the_report_of_a_process_of_its_own(folder: Path) -> None:
    arguments = script.Arguments(folder=folder, stage="load", rank=4, dtype="bfloat16")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *script.flags(arguments)], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["tensors"] == len(script.synthetic_checkpoint("tiny", 0.001).shapes)
    assert report["dtype"] == "bfloat16"
    # The offset and the partial blocks of scales weigh more in matrices this small.
    assert 4.12 < report["bits_per_parameter"] < 4.2
    assert report["allowed_bytes"] == report["result_bytes"] + 2 * report["largest_tensor_bytes"]
    assert report["largest_tensor_bytes"] == 2 * 512 * 128
    assert report["memory_passes"] == (report["peak_above_baseline_bytes"] <= report["allowed_bytes"])
    assert done.returncode == (0 if report["memory_passes"] and report["bits_pass"] else 1)


def test_the_command_line_survives_the_way_to_the_other_process() -> None:
    arguments = script.Arguments(folder=Path("x"), double_quantization=False, dtype="bfloat16", stage="load", rank=0)
    assert parse(script.Arguments, description=None, arguments=script.flags(arguments)) == arguments
