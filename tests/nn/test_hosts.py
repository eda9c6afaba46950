"""Two real processes over loopback: shared values, errors, rows, checkpoints, and the parts of a model (about 18 CPU-s).

`python tests/finetune/hosts.py` trains in several processes, and stops and kills them.
"""

import json
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.nn import any_process, of_main, to_numpy, together
from qlora_jax.peft import LoRA
from qlora_jax.train import split


def test_one_process_needs_no_other() -> None:
    assert of_main(lambda: {"step": 1}) == {"step": 1}
    assert any_process(None) is None
    assert any_process(2) == 2
    with pytest.raises(OSError, match="mine"), together():
        raise OSError("mine")
    assert to_numpy(jax.numpy.arange(3)).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def found(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    program = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(program.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), address, str(number), str(tiny_llama), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.mark.integration
def test_values_and_errors_reach_both_processes(found: list[dict[str, Any]]) -> None:
    for number, one in enumerate(found):
        assert one["of_main"] == {"step": 3, "number": 0}
        assert one["signal"] == 15
        different = "HostError: options: expected those of process 0 in every process, found others in process 1"
        text = "no such file on this host"
        assert one["errors"] == [different, f"OSError: {text}" if number else f"HostError: process 1 has stopped: {text}"]
        assert one["array"] == [[2.0, 3.0] if number else [0.0, 1.0], [0.0, 1.0, 2.0, 3.0]]
        same = {"split": True, "negative": True}
        assert one["store"] == [7, {"batch": 5}, same, True]
        assert one["writes"] == (number == 0)


@pytest.mark.integration
def test_each_row_is_in_one_process(found: list[dict[str, Any]]) -> None:
    first, second = (one["rows"] for one in found)
    together_ = [row for a, b in zip(first, second, strict=True) for row in (*a, *b)]
    assert sorted(together_) == [-1, -1, *range(6)]
    assert all(len(rows) == 2 for rows in (*first, *second))


@pytest.mark.integration
def test_each_process_has_its_parts_of_the_model_of_one(found: list[dict[str, Any]], tiny_llama: Path) -> None:
    _, adapter, frozen = split(load_model(open_checkpoint(str(tiny_llama)), method=LoRA(rank=4), progress=False))
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path((adapter, frozen))
    }
    for one in found:
        assert one["parts"].keys() == leaves.keys()
        for name, (index, checksum) in one["parts"].items():
            part = leaves[name][tuple(slice(*bounds) for bounds in index)]
            assert zlib.crc32(np.ascontiguousarray(part).tobytes()) == checksum, name
    split_over_both = [name for name in leaves if found[0]["parts"][name][0] != found[1]["parts"][name][0]]
    assert any("codes" in name for name in split_over_both)
