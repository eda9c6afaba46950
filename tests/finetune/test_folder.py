"""The folder of a run: whose it is, what may change in a run that goes on, and what is removed.

Nothing is trained: the folders are made by the functions that a run calls, or written by hand. (About 6 s of CPU.)
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from runs import FinishedRun, but

from qlora_jax.finetune import Options
from qlora_jax.finetune.folder import claim, complete, recorded_held_out, start
from qlora_jax.finetune.lock import locked
from qlora_jax.finetune.prepare import prepare
from qlora_jax.finetune.resume import find_position
from qlora_jax.train.state_store import StateStore


@pytest.fixture(autouse=True)
def _no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_jax.checkpoint.safetensors.read_tensor", lambda *_: pytest.fail("a weight was read"))


@pytest.mark.integration
def test_a_finished_run_is_not_repeated(finished_sft: FinishedRun) -> None:
    with pytest.raises(ValueError, match=r"holds a finished run; .*--overwrite"):
        prepare(finished_sft.options, progress=False)


def test_the_folder_of_another_run(options: Options) -> None:
    start(options, 0)
    with pytest.raises(ValueError, match=r"another run .*lora\.rank: 4 there, 5 here.*--overwrite"):
        prepare(but(options, "lora", rank=5), progress=False)
    claim(options)
    claim(but(but(options, "lora", rank=5), "run", overwrite=True))


def test_overwrite_deletes_nothing_before_the_new_run_begins(options: Options, tmp_path: Path) -> None:
    """A mistake in the new command costs nothing, and files that are no run's stay in any case."""
    output, mine = options.run.output, but(options, "run", overwrite=True)
    start(mine, 0)
    for name in ("notes.txt", "metrics.jsonl"):
        (output / name).write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*")}
    with pytest.raises(OSError, match=r"none\.jsonl"):
        prepare(but(mine, "data", data=str(tmp_path / "none.jsonl")), progress=False)
    prepare(but(mine, "lora", rank=5), progress=False)
    assert {path: path.read_bytes() for path in output.rglob("*")} == before
    start(but(mine, "lora", rank=5), 0)
    assert sorted(path.name for path in output.iterdir()) == ["notes.txt", "options.json"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"options\.json: is damaged"), ("[1]", "expected the options of a run, found other JSON")]
)
def test_a_damaged_record(options: Options, text: str, message: str) -> None:
    options.run.output.mkdir()
    (options.run.output / "options.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(options, progress=False)
    start(but(options, "run", overwrite=True), 0)
    claim(options)


def test_a_run_older_than_an_option_is_resumed(options: Options) -> None:
    start(options, 0)
    path = options.run.output / "options.json"
    record = json.loads(path.read_text())
    for name in ("group_by_length", "weights", "source_max_length"):
        del record["data"][name]
    del record["held_out_data"]
    path.write_text(json.dumps(record))
    claim(options)
    assert recorded_held_out(options.run.output) is None


def test_a_run_older_than_the_name_of_a_value_is_resumed(options: Options) -> None:
    cut = but(options, "data", on_long="cut")
    start(cut, 0)
    path = cut.run.output / "options.json"
    path.write_text(path.read_text().replace('"cut"', '"truncate"'))
    claim(cut)
    with pytest.raises(ValueError, match=r"holds another run \(data\.on_long: 'cut' there, 'split' here\)"):
        claim(options)


def test_a_file_is_no_folder(options: Options) -> None:
    options.run.output.write_text("")
    for output in (options.run.output, options.run.output / "run"):
        with pytest.raises(ValueError, match="expected a folder, found"):
            prepare(but(options, "run", output=output), progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_touched(options: Options, overwrite: bool) -> None:
    """A folder with files that are no run's is free, and keeps them."""
    output, mine = options.run.output, but(options, "run", overwrite=overwrite)
    (output / "figures").mkdir(parents=True)
    (output / "thesis.tex").write_text("mine")
    claim(mine)
    start(mine, 0)
    assert sorted(path.name for path in output.iterdir()) == ["figures", "options.json", "thesis.tex"]
    assert (output / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "metrics.jsonl", "model"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_a_run_would_overwrite(options: Options, name: str, overwrite: bool) -> None:
    """Without the record of a run, nobody knows whose they are."""
    (options.run.output / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"expected no {name} without options.json.*move them, or choose another folder"):
        claim(but(options, "run", overwrite=overwrite))


def test_what_killed_runs_left_is_removed(options: Options) -> None:
    output = options.run.output
    for name in (".adapter.writing-abc", ".model.writing-abc", ".removed-abc"):
        (output / name).mkdir(parents=True)
    for name in (".metrics.jsonl.writing", ".options.json.writing", ".loss.png.writing", ".lock"):
        (output / name).write_text("")
    with locked(output):
        claim(options)
        start(options, 0)
    assert [path.name for path in output.iterdir()] == ["options.json"]


def test_one_run_at_a_time(options: Options) -> None:
    """The second is refused before any work, and the folder is free again afterwards."""
    output = options.run.output
    with locked(output):
        with pytest.raises(ValueError, match=rf"another run works there \(process {os.getpid()} on .*wait for it"):
            prepare(options, progress=False)
        with pytest.raises(ValueError, match="another run works there"), locked(output):
            pass
    assert not output.exists(), "nothing was written"
    with locked(output):
        (output / "notes.txt").write_text("mine")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_lock_that_cannot_be_removed_is_no_error(options: Options) -> None:
    """Of many tenants, one whose folder can no longer be written would otherwise end all."""
    output = options.run.output
    with locked(output):
        (output / ".lock").unlink()
        (output / ".lock").mkdir()
    (output / ".lock").rmdir()
    with locked(output):
        pass


# How long a run is


def record(options: Options, **fields: Any) -> None:
    """Write the record of a run with other options of the group `run`."""
    start(but(options, "run", **fields), 0)


def finished(options: Options, steps: int = 3) -> None:
    """Make the folder of a finished run, as far as `claim` looks."""
    start(options, 0)
    (options.run.output / "checkpoints" / str(steps)).mkdir(parents=True)
    (options.run.output / "adapter").mkdir()
    (options.run.output / "adapter" / "adapter_config.json").write_text("{}")
    complete(options)


class Unchanging:
    """Batches of which each epoch has seven, and which take any position."""

    def batches_in_epoch(self, epoch: int = 0) -> int:
        return 7

    def set_state(self, state: dict[str, Any]) -> None:
        raise ValueError("examples: saved 24, now 23")


@pytest.mark.parametrize("changed", [{"epochs": 5}, {"max_steps": 7}, {"max_steps": None, "epochs": 3}])
def test_a_finished_run_can_be_longer(options: Options, changed: dict[str, Any]) -> None:
    finished(options)
    with pytest.raises(ValueError, match="holds a finished run; more --max-steps or --epochs extend it"):
        claim(options)
    claim(but(options, "run", **changed))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, "holds a finished run; more --max-steps"),
        (2, "of which 3 steps are done: expected at least as many, found 2"),
    ],
)
def test_a_finished_run_cannot_be_shorter(options: Options, steps: int, message: str) -> None:
    finished(options)
    with pytest.raises(ValueError, match=message):
        find_position(options, cast(Any, Unchanging()), steps, 0)


def test_a_finished_run_without_checkpoints(options: Options) -> None:
    finished(options)
    shutil.rmtree(options.run.output / "checkpoints")
    with pytest.raises(ValueError, match="a finished run without its checkpoints"):
        find_position(options, cast(Any, Unchanging()), 9, 0)


def test_the_same_rows_may_be_split_in_another_way(options: Options) -> None:
    record(options, batch_size=4, accumulation_steps=2)
    claim(but(options, "run", batch_size=2, accumulation_steps=4))
    with pytest.raises(ValueError, match=r"rows of a step \(batch_size x .*: 8 there, 16 here"):
        claim(but(options, "run", batch_size=4, accumulation_steps=4))


def test_another_number_of_devices(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    record(options, batch_size=8)
    monkeypatch.setattr("jax.device_count", lambda: 4)
    claim(but(options, "run", batch_size=2))
    with pytest.raises(ValueError, match="8 there, 32 here"):
        claim(but(options, "run", batch_size=8))


def test_the_same_file_by_another_name(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    start(options, 0)
    path = Path(str(options.data.data))
    monkeypatch.chdir(path.parent)
    claim(but(options, "data", data=f"./{path.name}"))


def test_data_that_changed_are_found_before_weights_are_read(options: Options, tmp_path: Path) -> None:
    path, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    for file in (path, held_out):
        shutil.copy(str(options.data.data), file)
    mine = but(options, "data", data=str(path), eval_data=str(held_out), held_out=0)
    run = prepare(mine, progress=False)
    with locked(mine.run.output):
        start(mine, run.objective.held_out_checksum)
    store = StateStore(mine.run.output / "checkpoints", keep=3)
    next(run.batches)
    store.save(2, {"a": np.zeros(3)}, run.batches.get_state())
    store.close()
    again = prepare(mine, progress=False)
    assert again.batches.get_state() == run.batches.get_state()
    text = held_out.read_text()
    held_out.write_text(text.replace("red", "rot"))
    with pytest.raises(
        ValueError, match=rf"holds a run with other held-out data than --eval-data {held_out} now has, .*--overwrite"
    ):
        prepare(mine, progress=False)
    held_out.write_text(text)
    path.write_text(path.read_text().replace("red", "rot"))
    with pytest.raises(ValueError, match=r"holds a run on other data than these \(.*checksum: saved .*--overwrite"):
        prepare(mine, progress=False)
    prepare(but(mine, "run", overwrite=True), progress=False)
