"""Runs of many tenants over one base: against runs of their own, resumed, and with one that fails.

About 70 CPU-seconds, nearly all in the integration tier.

The references are what `finetune` leaves for the same options, and the file formats of its folders.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from runs import rows_of

from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.finetune import Options, finetune
from qlora_jax.finetune.tenants import ManyOptions, pause, train_many, training, unpause
from qlora_jax.finetune.tenants.options import read_tenants

COMMON = """
output = "{output}"
rows = 4
{shared}
[model]
model = "{model}"
[data]
data = "{data}"
max_length = 64
held_out = 0.2
[run]
max_steps = 3
eval_every = 2
save_every = 2
batch_size = 1
[lora]
rank = 4
alpha = 8.0
[optimizer]
learning_rate = 1e-2
"""
PLAIN = "[tenants.plain]\n"
SMALL = """
[tenants.small.lora]
rank = 2
target_modules = ["q_proj", "down_proj"]
[tenants.small.optimizer]
weight_decay = 0.5
schedule = "linear"
[tenants.small.run]
batch_size = 3
max_steps = 5
seed = 3
"""
POLITE = """
[tenants.polite.objective]
objective = "dpo"
dpo_beta = 0.3
[tenants.polite.optimizer]
learning_rate = 1e-3
[tenants.polite.run]
batch_size = 2
[tenants.polite.data]
data = "{pairs}"
"""
PACKED = """
[tenants.packed.data]
packing = true
max_length = 48
[tenants.packed.optimizer]
schedule = "cosine"
max_grad_norm = 0.5
warmup_steps = 2
"""
TENANTS = PLAIN + SMALL + POLITE + PACKED


@pytest.fixture
def write_file(tmp_path: Path, tiny_llama: Path, colours: str, pairs: str) -> Callable[..., Path]:
    """Write a file of tenants."""

    def write(tenants: str = TENANTS, shared: str = "", output: str = "many") -> Path:
        path = tmp_path / "tenants.toml"
        common = COMMON.format(output=tmp_path / output, model=tiny_llama, data=colours, shared=shared)
        path.write_text(common + tenants.replace("{pairs}", pairs), encoding="utf-8")
        return path

    return write


def adapter(folder: Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def own_run(options: Options, output: Path) -> Path:
    import dataclasses

    return finetune(dataclasses.replace(options, run=dataclasses.replace(options.run, output=output)), progress=False)


@pytest.mark.integration
def test_each_tenant_equals_a_run_of_its_own(write_file: Callable[..., Path], tmp_path: Path) -> None:
    """Metrics, held-out losses, files and PEFT's configuration too.

    AdamW divides each gradient by its own size. Where a gradient is almost zero, rounding is a part of it: a difference of
    2e-10 in a gradient of 4e-8 moves an element by 1e-3 of the learning rate, where those around it have gradients of 6e-3.
    One element of a tensor may therefore differ more than all others together. At a learning rate of 1e-2 the pairs are
    learned in one step, and all gradients are then almost zero; theirs is lower.

    Three slots for four tenants: the last one waits. One has preferences. The first has nothing that the last has not.
    """
    path = write_file(shared="slots = 3")
    assert train_many(ManyOptions(path), progress=False) == 4
    for name, options in list(read_tenants(path).tenants.items())[1:]:
        alone, together = own_run(options, tmp_path / "alone" / name), tmp_path / "many" / name / "adapter"
        found, expected = adapter(together), adapter(alone)
        assert found.keys() == expected.keys()
        for tensor in expected:
            *others, largest = np.sort(np.abs(found[tensor] - expected[tensor]), axis=None)
            size = np.linalg.norm(expected[tensor])
            assert np.linalg.norm(others) <= 1e-5 * size, tensor
            assert largest <= 1e-3 * size, tensor
        config, own = (json.loads((folder / "adapter_config.json").read_text()) for folder in (together, alone))
        assert config == own
        rows, own_rows = rows_of(tmp_path / "many" / name), rows_of(tmp_path / "alone" / name)
        assert [row.keys() for row in rows] == [row.keys() - {"goodput"} for row in own_rows]
        for row, other in zip(rows, own_rows, strict=True):
            for key in row.keys() - {"tokens_per_second", "peak_memory_bytes"}:
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        files = {path.name for path in (tmp_path / "many" / name).iterdir()}
        assert files | {"goodput.json"} == {path.name for path in (tmp_path / "alone" / name).iterdir()}
    with pytest.raises(OptionError, match="nothing to train: all tenants are finished"):
        train_many(ManyOptions(path), progress=False)


@pytest.mark.integration
def test_one_tenant_fails_and_the_others_do_not_notice(write_file: Callable[..., Path], tmp_path: Path) -> None:
    """One diverges, one has no data; the others have the bits of a run without these two."""
    good = PLAIN + SMALL
    bad = "[tenants.wild.optimizer]\nlearning_rate = 1e30\nmax_grad_norm = 0\n[tenants.lost.data]\ndata = 'nowhere.jsonl'\n"
    with pytest.raises(CheckpointError, match=r"(?s)2 of 4 tenants are set aside.*lost: .*nowhere.*wild: step \d: found"):
        train_many(ManyOptions(write_file(bad + good)), progress=False)
    train_many(ManyOptions(write_file(good, output="without")), progress=False)
    for name in ("plain", "small"):
        found, expected = (adapter(tmp_path / output / name / "adapter") for output in ("many", "without"))
        for tensor in expected:
            np.testing.assert_array_equal(found[tensor], expected[tensor])
    assert not (tmp_path / "many" / "wild" / "adapter").exists()


@pytest.mark.integration
def test_a_killed_process_resumes_every_tenant(write_file: Callable[..., Path], tmp_path: Path) -> None:
    """By SIGKILL once one tenant has a checkpoint; the adapters have the bits of a process that was not killed."""
    tenants = SMALL + PACKED
    path = write_file(tenants)
    script = [sys.executable, "scripts/train_many.py", str(path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(script, env=environment, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "many" / "small" / "checkpoints").glob("2")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not ended by itself
    train_many(ManyOptions(path), progress=False)
    train_many(ManyOptions(write_file(tenants, output="whole")), progress=False)
    for name in ("small", "packed"):
        found, expected = (adapter(tmp_path / output / name / "adapter") for output in ("many", "whole"))
        for tensor in expected:
            np.testing.assert_array_equal(found[tensor], expected[tensor])


@pytest.mark.integration
def test_tenants_that_take_turns_and_rest_have_the_same_bits(write_file: Callable[..., Path], tmp_path: Path) -> None:
    """Three tenants take turns in two slots, and one of them rests until the others have finished."""
    good = PLAIN + SMALL + "[tenants.other.run]\nseed = 5\n"
    shared = "slots = 2\n"
    train_many(ManyOptions(write_file(good, shared, output="without")), progress=False)
    path = write_file(good, shared + "host_states = true\n")
    pause(tmp_path / "many" / "small")
    assert train_many(ManyOptions(path), progress=False) == 2
    assert not (tmp_path / "many" / "small" / "adapter").exists()
    unpause(tmp_path / "many" / "small")
    assert train_many(ManyOptions(path), progress=False) == 1
    for name in ("plain", "small", "other"):
        found, expected = (adapter(tmp_path / output / name / "adapter") for output in ("many", "without"))
        for tensor in expected:
            np.testing.assert_array_equal(found[tensor], expected[tensor])
        assert not (tmp_path / "many" / name / ".lock").exists()


@pytest.mark.integration
def test_only_tenants_in_a_slot_have_open_files(
    write_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant rests from the round on in which the file appears, saved at its step, and its files are closed."""
    seen: list[tuple[int, list[str]]] = []
    step = training._Tenants._step

    def watched(tenants: Any, training_now: Any) -> None:
        step(tenants, training_now)
        seen.append((len(training_now), [tenant.name for tenant in tenants.all if tenant._files is not None]))
        if len(seen) == 2:
            pause(tmp_path / "many" / "small")

    monkeypatch.setattr(training._Tenants, "_step", watched)
    tenants = "[tenants.small.run]\nmax_steps = 5\nsave_every = 0\neval_every = 0\n" + "".join(
        f"[tenants.t{number}.run]\nmax_steps = 2\neval_every = 0\nseed = {number}\n" for number in range(3)
    )
    assert train_many(ManyOptions(write_file(tenants, "slots = 2")), progress=False) == 3
    assert all(len(names) <= count for count, names in seen)
    assert seen[0] == (2, ["small", "t0"])
    assert all("small" not in names for _, names in seen[2:])
    assert [path.name for path in (tmp_path / "many" / "small" / "checkpoints").iterdir()] == ["2"]


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        ("", "expected a table .tenants.NAME. for each tenant, found none"),
        ("[tenants.a.lora]\nrnak = 3\n", "tenants.a: unknown key lora.rnak; did you mean lora.rank"),
        ("[tenants.a.lora]\nuse_dora = true\n", "tenants.a: .*cannot hold DoRA"),
        ("[tenants.a.lora]\ndropout = 0.1\n", "tenants.a: lora.dropout: expected 0.0 among many tenants, found 0.1"),
        ("[tenants.a.run]\nmesh = 'data=8'\n", "tenants.a: run.mesh: expected None among many tenants, found 'data=8'"),
        ("[tenants.a.tuning]\nmethod = 'ia3'\n", "tenants.a: .*method ia3"),
        ("[tenants.a.optimizer]\noptimizer = 'lion'\n", "optimizer.optimizer: expected 'adamw' among many tenants"),
        (
            "[tenants.a.objective]\nobjective = 'dpo'\n[tenants.a.lora]\ninit_lora_weights = 'loftq'\n",
            "objective dpo: expected a new adapter",
        ),
        ("[tenants.a]\n[tenants.b.model]\ndata_type = 'fp4'\n", "tenants.b: expected the base of a"),
        ("[tenants.'../a']\n", "expected a name of letters"),
        ("[tenants.a.run]\noutput = 'x'\n", "tenants.a.run.output: expected none"),
    ],
)
def test_what_a_file_of_tenants_cannot_say(write_file: Callable[..., Path], tenants: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s)config file .*tenants.toml: .*{message}"):
        read_tenants(write_file(tenants))


def test_options_of_all_tenants_and_of_one(write_file: Callable[..., Path], tmp_path: Path) -> None:
    file: Any = read_tenants(write_file(shared="slots = 2"))
    assert (file.slots, file.rows, list(file.tenants)) == (2, 4, ["plain", "small", "polite", "packed"])
    small = file.tenants["small"]
    assert (small.lora.rank, small.lora.alpha, small.run.max_steps, small.run.samples) == (2, 8.0, 5, 0)
    assert small.run.output == tmp_path / "many" / "small"
