"""Checkpoints of a run: what comes back is what was saved, bit for bit and where it lay, or there is a clear error."""

import collections
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny_config import CONFIG

from qlora_jax.errors import CheckpointError
from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import MeshShape, data_mesh, mesh_context
from qlora_jax.nn.parallel import put_adapter
from qlora_jax.peft import LoRA
from qlora_jax.train import TrainState, adamw, create_state, host_offload, init_state, optimizer, split
from qlora_jax.train.state_store import StateStore, latest_step

POSITION = {"epoch": 1, "batch": 2, "data": {"seed": 0, "checksum": 2**32 - 1, "packing": True}}


def make_state(seed: int = 0, *, width: int = 3, offload: bool = True) -> TrainState:
    """A state of two matrices with moments that are not zero, one of them not a number."""
    draws = np.random.default_rng(seed)
    adapter = {name: jnp.asarray(draws.standard_normal((64, width), np.float32)) for name in ("a", "b")}
    tx = host_offload(adamw(1e-2)) if offload else adamw(1e-2)
    state = jax.jit(lambda adapter: init_state(tx, adapter, 2**32 - 1))(adapter)

    def fill(leaf: Any) -> Any:
        value = draws.standard_normal(leaf.shape).astype(leaf.dtype) if leaf.ndim else np.asarray(seed, leaf.dtype)
        if leaf.ndim:
            value.flat[0] = np.nan
        return jax.device_put(value, leaf.sharding)

    return dataclasses.replace(state, step=jnp.int32(seed), opt_state=jax.tree.map(fill, state.opt_state))


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., StateStore]]:
    opened: list[StateStore] = []

    def open_(keep: int = 3, folder: Path = tmp_path / "checkpoints") -> StateStore:
        opened.append(StateStore(folder, keep=keep))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def save(store: StateStore, step: int, state: Any = None, position: dict[str, Any] = POSITION) -> None:
    store.save(step, make_state(step) if state is None else state, position)
    store.wait()


def assert_same(found: TrainState, expected: TrainState) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == wanted.dtype
        assert leaf.sharding == wanted.sharding
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


@pytest.mark.parametrize("offload", [True, False])
def test_what_is_saved_comes_back(open_store: Callable[..., StateStore], offload: bool) -> None:
    """The bits, the types and the memories, in a store opened anew; the template's values do not matter."""
    state = make_state(5, offload=offload)
    save(open_store(), 5, state)
    store = open_store()
    assert store.latest_step() == 5
    restored, position = store.restore(make_state(9, offload=offload))
    assert_same(restored, state)
    assert position == POSITION
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(restored.opt_state)}
    assert ("pinned_host" in kinds) == offload


def test_the_state_of_another_choice_of_offload_is_an_error(open_store: Callable[..., StateStore]) -> None:
    """In host memory each layer's state is one by itself; a run goes on with the options that it began with."""
    save(open_store(), 5, make_state(5, offload=True))
    with pytest.raises(CheckpointError, match="step 5 is of another run"):
        open_store().restore(make_state(0, offload=False))


def test_the_newest_are_kept(open_store: Callable[..., StateStore], tmp_path: Path) -> None:
    store = open_store(keep=2)
    assert store.latest_step() is None
    for step in (3, 6, 9, 12):
        save(store, step)
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(kept, key=int) == ["9", "12"]
    assert int(open_store().restore(make_state())[0].step) == 12


def test_none_is_an_error(open_store: Callable[..., StateStore]) -> None:
    with pytest.raises(CheckpointError, match="checkpoints: holds no checkpoint"):
        open_store().restore(make_state())


def test_other_shapes_types_and_leaves_are_an_error(open_store: Callable[..., StateStore]) -> None:
    """All of them in one message."""
    state = make_state(5)
    save(open_store(), 5, state)
    store = open_store()
    with pytest.raises(CheckpointError, match=r"step 5 is of another run") as error:
        store.restore(make_state(width=2))
    assert "adapter.a: expected float32 [64, 2], found float32 [64, 3]" in str(error.value)
    assert str(error.value).count("expected") == 6, "A and B, and the two moments of each"
    with pytest.raises(CheckpointError, match=r"adapter\.b: expected bfloat16 \[64, 3\], found float32 \[64, 3\]"):
        store.restore(dataclasses.replace(state, adapter=state.adapter | {"b": state.adapter["b"].astype(jnp.bfloat16)}))
    with pytest.raises(CheckpointError) as error:
        store.restore(dataclasses.replace(state, adapter={"a": state.adapter["a"], "c": state.adapter["b"]}))
    assert "adapter.b: expected none, found float32 [64, 3]" in str(error.value)
    assert "adapter.c: expected float32 [64, 3], found none" in str(error.value)


def test_a_checkpoint_that_is_half_written_is_none(open_store: Callable[..., StateStore], tmp_path: Path) -> None:
    """A kill while Orbax writes leaves a folder under a temporary name: the one before is the newest."""
    save(open_store(), 5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "5", folder / "10.orbax-checkpoint-tmp")
    store = open_store()
    assert store.latest_step() == 5
    assert int(store.restore(make_state())[0].step) == 5
    save(store, 10)
    assert int(open_store().restore(make_state())[0].step) == 10


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_failing_write_leaves_what_was_there(
    open_store: Callable[..., StateStore], monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    store = open_store()

    def fail(*arguments: Any, **options: Any) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(CheckpointError, match=rf"step 5 \(.*{failure.strerror}.*\); no checkpoint was saved before"):
            save(store, 5)
    save(store, 5)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        with pytest.raises(CheckpointError, match=rf"step 10 \(.*{failure.strerror}.*\); that of step 5 is intact"):
            save(store, 10)
    restored, _ = open_store().restore(make_state())
    assert_same(restored, make_state(5))


@pytest.fixture(autouse=True)
def _hook_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


def test_a_disk_that_is_too_small_is_found_before(
    open_store: Callable[..., StateStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing of the checkpoint is left; without the check before, Orbax leaves a folder."""
    store = open_store()
    save(store, 5)
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(9, 8, 1))
        with pytest.raises(CheckpointError, match=r"step 10 \(it needs [\d,]+ bytes, and 1 are free\); that of step 5 is"):
            save(store, 10)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]


def move_between_meshes(folder: Path) -> None:
    """Save the state of a tiny Llama on one mesh after the other, and restore it on the next; for 8 devices."""
    spec = ModelSpec(llama_config(CONFIG | {"model_type": "llama"}), None, "none", LoRA(4), "float32", "none")
    _, adapter, _ = split(spec.build(nnx.Rngs(0)))
    adapter = jax.tree.map(np.array, adapter)
    meshes = ("data=2,tensor=4", "fsdp=8", None, "data=2,fsdp=2,tensor=2", "data=8", "data=2,tensor=4")
    rules = {
        "adamw8bit": optimizer("adamw8bit", 1e-3),
        "adafactor": host_offload(optimizer("adafactor", 1e-3), adapter=True),
    }
    split_leaves = 0
    draws = np.random.default_rng(0)
    for name, tx in rules.items():
        expected = None
        for number, text in enumerate(meshes):
            mesh = None if text is None else data_mesh(MeshShape.parse(text))
            with mesh_context(mesh):
                state = create_state(tx, put_adapter(mesh, jax.tree.map(jnp.array, adapter)))
            store = StateStore(folder / name, keep=2)
            if expected is None:  # moments that are not zero
                expected = jax.tree.map(lambda leaf: draws.integers(0, 200, leaf.shape).astype(leaf.dtype), state)
                state = jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), expected, state)
            else:
                like, (state, _) = state, store.restore(state)
                assert_same(state, jax.tree.map(lambda leaf, old: jax.device_put(leaf, old.sharding), expected, like))
            split_leaves += sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
            save(store, number + 1, state)
            store.close()
    assert split_leaves > 0


@pytest.mark.integration
def test_a_checkpoint_is_restored_on_any_mesh(tmp_path: Path) -> None:
    """8 devices to 1 and back, tensor to fsdp, data to tensor, bit for bit; 8-bit moments, an adapter in host memory.

    `scripts/studies/checkpoint_meshes.py` does more with models that train. (About 9 s of CPU.)
    """
    program = "import sys; from pathlib import Path; import test_state_store as t; t.move_between_meshes(Path(sys.argv[1]))"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_a_write_that_fails_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk; libraries' threads print nothing."""
    program = (
        "import resource, sys, numpy as np; from pathlib import Path; from qlora_jax.train.state_store import StateStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); store = StateStore(Path(sys.argv[1]), keep=1)\n"
        "try: store.save(1, {str(n): np.random.default_rng(n).random(9_000) for n in range(20)}, {}); store.wait()\n"
        "except ValueError as error: print(error)\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path / "checkpoints")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("cannot save the checkpoint of step 1 (File too large); no checkpoint was saved before\n")
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_position_alone(open_store: Callable[..., StateStore], tmp_path: Path) -> None:
    """It is read without the state, and without a change of the folder."""
    save(open_store(), 5)
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir()
    store = StateStore(tmp_path / "checkpoints", keep=3, create=False)
    assert store.position() == POSITION
    store.close()
    assert latest_step(tmp_path / "checkpoints") == 5
    assert (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").exists()
    open_store()
    assert not (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").exists()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert latest_step(tmp_path / "none") is None


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(open_store: Callable[..., StateStore], tmp_path: Path) -> None:
    state = make_state(5)
    save(open_store(), 5, state)
    shutil.rmtree(tmp_path / "checkpoints" / "5" / "checksums")
    store = open_store()
    assert store.position() == POSITION
    assert_same(store.restore(make_state())[0], state)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_with_the_earlier_name_of_a_module_comes_back(open_store: Callable[..., StateStore]) -> None:
    """GPT-NeoX's fused projection had the name that Phi-3's has; a checkpoint of Phi-3 still has it."""
    values = {"o_proj": jnp.arange(3.0), "query_key_value": jnp.arange(4.0), "z": jnp.arange(5.0)}
    before = {{"query_key_value": "qkv_proj"}.get(name, name): value for name, value in values.items()}
    store = open_store()
    save(store, 1, {"adapter": before})
    for expected in ({"adapter": values}, {"adapter": before}):
        found, _ = store.restore(expected)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(leaf, wanted)
    with pytest.raises(CheckpointError, match=r"adapter\.qkv_proj: expected none"):
        store.restore({"adapter": {name: value for name, value in values.items() if name != "query_key_value"}})


def test_a_flipped_byte_is_found(open_store: Callable[..., StateStore], tmp_path: Path) -> None:
    """Each file of the checkpoint, in turn: an error that names it, or the values that were saved. (About 4 s of CPU.)"""
    state = make_state(5)
    save(open_store(), 5, state)
    folder, draws, found = tmp_path / "checkpoints", np.random.default_rng(0), 0
    for path in sorted(path for path in (folder / "5").rglob("*") if path.is_file()):
        before = path.read_bytes()
        for place in draws.integers(0, len(before), 3):
            path.write_bytes(before[:place] + bytes([before[place] ^ 1 << draws.integers(8)]) + before[place + 1 :])
            store = open_store()
            if store.latest_step() is None:
                continue
            try:
                restored, position = store.restore(make_state())
            except CheckpointError:
                found += 1
            else:
                assert_same(restored, state)
                assert position == POSITION
        path.write_bytes(before)
    assert found >= 6


def test_a_value_that_changed_is_found_by_its_checksum(
    open_store: Callable[..., StateStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Values of a whole checkpoint under the checksums of another one, as if the files had no checks of their own."""
    store = open_store()
    save(store, 5)
    save(store, 10, make_state(10), POSITION | {"batch": 3})
    for item, names in (("state", "adapter.a, adapter.b, opt_state"), ("data", "the position in the data")):
        folder = tmp_path / item
        shutil.copytree(tmp_path / "checkpoints", folder)
        shutil.rmtree(folder / "10" / item)
        shutil.copytree(folder / "5" / item, folder / "10" / item)
        assert_same(open_store(folder=folder).restore(make_state())[0], make_state(5))
        [message] = [record.getMessage() for record in caplog.records]
        assert re.search(
            rf"step 10: these are not the values that were saved: {names}.*; it is now {folder}/damaged-10", message
        )
        caplog.clear()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)


# What Orbax leaves behind when one of its reads fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(
    open_store: Callable[..., StateStore], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """Every file of it in turn; what can be told from a good one has to be, and nothing else is restored in silence."""
    store = open_store()
    for step in (5, 10):
        save(store, step)
    folder = tmp_path / "checkpoints"
    files = sorted(path.relative_to(folder) for path in (folder / "10").rglob("*") if path.is_file())
    assert len(files) > 3
    found = 0
    for number, file in enumerate(files):
        copy = tmp_path / f"{damage.__name__}-{number}"
        shutil.copytree(folder, copy)
        damage(copy / file)
        store = open_store(folder=copy)
        restored, position = store.restore(make_state())
        assert position == POSITION
        assert_same(restored, make_state(store.latest_step() or 0))
        assert (copy / "damaged-10").exists() == (store.latest_step() == 5)
        found += store.latest_step() == 5
    assert found >= 3, "the position, and the metadata and the values of the state"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_put_aside_and_written_anew(
    open_store: Callable[..., StateStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning; folders of which half is missing; a store that may change nothing; an error where none is whole."""
    store, folder = open_store(), tmp_path / "checkpoints"
    for step in (5, 10, 15):
        save(store, step)
    truncate(folder / "10" / "state" / "manifest.ocdbt")
    shutil.rmtree(folder / "15" / "state")
    reader = StateStore(folder, keep=3, create=False)
    assert_same(reader.restore(make_state())[0], make_state(5))
    reader.close()
    assert latest_step(folder) == 15
    caplog.clear()
    store = open_store()
    assert_same(store.restore(make_state())[0], make_state(5))
    assert store.latest_step() == 5
    assert [re.sub(r": .*; it is now", "; it is now", record.getMessage()) for record in caplog.records] == [
        f"{folder}; it is now {folder}/damaged-{step}, and the one of step 5 is restored." for step in (15, 10)
    ]
    save(store, 10)
    assert_same(open_store().restore(make_state())[0], make_state(10))
    for path in (folder / "5", folder / "10"):
        (path / "data" / "metadata").write_text("")
    with pytest.raises(CheckpointError, match=rf"step 10: .*; all others are damaged, too; delete {folder} to begin anew$"):
        open_store().restore(make_state())
    assert latest_step(folder) == 10


def test_what_changes_during_a_save_is_not_saved(open_store: Callable[..., StateStore]) -> None:
    """The buffers of a state are donated to the next step, and the batches go on."""
    store, state, position = open_store(), make_state(5), {"batch": [2]}
    expected = jax.tree.map(np.array, state)
    store.save(5, state, position)
    jax.block_until_ready(jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)(state))
    position["batch"][0] = 3
    store.wait()
    restored, found = open_store().restore(make_state())
    assert found == {"batch": [2]}
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_clock_that_jumps_back(
    open_store: Callable[..., StateStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps order checkpoints, not times."""
    store = open_store(keep=2)
    for step in (3, 6, 9):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda step=step: 2e9 - 1e6 * step)
            patch.setattr(time, "time_ns", lambda step=step: int((2e9 - 1e6 * step) * 1e9))
            save(store, step)
    store = open_store(keep=2)
    assert_same(store.restore(make_state())[0], make_state(9))
    save(store, 12)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "9"]
