"""A run that was killed, interrupted or stopped early: it costs nothing, and the result is that of a run in one piece.

References: an uninterrupted run, bit for bit; the text and the exit code of the real command.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import but, rows_of, without_timing
from virtual_devices import virtual_devices

from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.cli import parse
from qlora_jax.finetune import Options, finetune, training
from qlora_jax.finetune.reporting import picture
from qlora_jax.train import learning_rate_schedule

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"


@pytest.mark.integration
def test_early_stopping_saves_the_best_adapter(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evaluations made up, lowest after step 4: the adapter is that of a run of 4 steps, wherever the run was killed."""
    made_up = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 1.0}
    monkeypatch.setattr(training, "mean_metrics", lambda step, state, *rest, **options: {"loss": made_up[int(state.step)]})
    long = but(options, "run", max_steps=10, epochs=100, save_every=3, keep=1, early_stopping_patience=2)
    found = finetune(long, progress=False)
    assert "Stopped after step 8 of 10: no lower held-out loss in 2 evaluations." in (text := capsys.readouterr().err)
    assert "The adapter is that of step 4, which has the lowest held-out loss." in text
    assert "Held-out loss 9.000 before, 3.000 after" in text
    assert rows_of(long.run.output)[-1]["step"] == 8
    four = but(options, "run", max_steps=4, epochs=100, output=tmp_path / "four")
    expected = read_adapter(finetune(four, progress=False)).tensors
    for name, tensor in read_adapter(found).tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])

    class Killed(BaseException):
        pass

    for kill_at in (4, 8):  # at every second step is an evaluation
        broken = but(long, "run", output=tmp_path / f"killed-{kill_at}")

        def evaluate(step: Any, state: Any, *rest: Any, kill_at: int = kill_at, **options: Any) -> dict[str, float]:
            if int(state.step) >= kill_at:
                raise Killed
            return {"loss": made_up[int(state.step)]}

        with monkeypatch.context() as patch:
            patch.setattr(training, "mean_metrics", evaluate)
            with pytest.raises(Killed):
                finetune(broken, progress=False)
        folder = finetune(broken, progress=False)
        assert [row["step"] for row in rows_of(broken.run.output)] == list(range(9))
        for name, tensor in read_adapter(folder).tensors.items():
            np.testing.assert_array_equal(tensor, expected[name])

    # Killed after it had stopped, before the adapter was written.
    shutil.rmtree(found)
    finetune(long, progress=False)
    for name, tensor in read_adapter(found).tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.integration
def test_a_killed_run_goes_on_as_if_it_had_not_been(options: Options, tmp_path: Path) -> None:
    """SIGKILL at a random step, then the same command: every loss is that of a run in one piece."""
    flags = ["--config", str(write_config(options, tmp_path))]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(parse(Options, description=None, arguments=[*flags, "--output", str(whole)]), progress=False)
    expected = without_timing(rows_of(whole))
    assert [row["step"] for row in expected] == list(range(21))

    with start(flags, broken) as process:
        wait_for_step(broken, int(np.random.default_rng(os.getpid()).integers(1, 16)), process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    killed_after = rows_of(broken)[-1]["step"]
    assert not (broken / "adapter").exists()
    with start(flags, broken) as process:
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    # Steps 5, 10 … were saved; the row of step 5 is older than its checkpoint, that of step 6 is not.
    assert killed_after < 6 or f"Resuming {broken} after step" in errors
    assert without_timing(rows_of(broken)) == expected, f"killed after step {killed_after}"
    for name, tensor in read_adapter(whole / "adapter").tensors.items():
        np.testing.assert_array_equal(read_adapter(broken / "adapter").tensors[name], tensor)


def write_config(options: Options, folder: Path) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f"""
        [model]
        model = {json.dumps(options.model.model)}
        [lora]
        rank = 4
        dropout = 0.2
        [data]
        data = {json.dumps(options.data.data)}
        max_length = 64
        held_out = 0.2
        [optimizer]
        learning_rate = 1e-3
        schedule = "cosine"
        host_offload = true
        [run]
        accumulation_steps = 2
        batch_size = 1
        epochs = 100
        max_steps = 20
        eval_every = 7
        save_every = 5
        samples = 0
        """,
        encoding="utf-8",
    )
    return path


def start(flags: list[str], output: Path, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the step's row is written; it polls often, since steps take milliseconds."""
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_the_step_that_it_is_in(options: Options, tmp_path: Path, number: signal.Signals) -> None:
    flags = ["--config", str(write_config(options, tmp_path)), "--save-every", "0", "--max-steps", "2000"]
    output = tmp_path / "run"
    with start(flags, output) as process:
        wait_for_step(output, 3, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 128 + number, errors
    last = rows_of(output)[-1]["step"]
    assert errors.splitlines()[-1] == f"interrupted: stopped after step {last}, which is saved"
    assert [path.name for path in (output / "checkpoints").iterdir()] == [str(last)]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, after a read that failed
def test_grouped_by_length_resumes(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of several shapes, from the checkpoint before a damaged one: the losses of a run in one piece. Examples are
    shown in either and change neither."""
    rows = [{"question": "?", "answer": "red " * (1 + 12 * (number % 3))} for number in range(24)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    grouped = but(options, "data", data=str(path), max_length=256, packing=False, group_by_length=True, held_out=0.0)
    grouped = but(grouped, "run", max_steps=6, save_every=1, accumulation_steps=2)
    whole = but(grouped, "run", output=tmp_path / "whole")
    finetune(whole, progress=False)
    shown = capsys.readouterr().err
    assert "tokens learned" not in shown
    assert "4 × up to 128 tokens" in shown
    finetune(grouped, progress=False)
    shutil.rmtree(grouped.run.output / "adapter")
    checkpoints = grouped.run.output / "checkpoints"
    shutil.rmtree(checkpoints / "6")  # as if it had been killed in the sixth step
    (checkpoints / "5" / "state" / "manifest.ocdbt").write_bytes(b"")  # and the disk had lost a file
    finetune(but(grouped, "data", show_examples=2), progress=False)
    shown = capsys.readouterr().err
    assert shown.count("tokens learned") == 2
    assert "\x1b" not in shown
    assert shown.count(f"it is now {checkpoints / 'damaged-5'}, and the one of step 4 is restored") == 1
    assert f"Resuming {grouped.run.output} after step 4 of 6" in shown
    assert without_timing(rows_of(grouped.run.output)) == without_timing(rows_of(whole.run.output))


@pytest.mark.integration
def test_a_finished_run_is_extended(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More steps of a constant rate: bit for bit the run of that length; the first one ends within an epoch."""
    mine = but(but(options, "data", held_out=0.0), "run", eval_every=0, save_every=0)
    whole = but(mine, "run", max_steps=5, output=tmp_path / "whole")
    finetune(whole, progress=False)
    short = but(mine, "run", max_steps=None, epochs=0.5)
    finetune(short, progress=False)
    assert len(rows_of(mine.run.output)) == 4, "half of an epoch of seven steps, rounded up"
    capsys.readouterr()
    finetune(but(mine, "run", max_steps=5), progress=False)
    assert "Extending the finished run in" in (shown := capsys.readouterr().err)
    assert "from 4 to 5 steps; from here on, the learning rate is that of a run of 5." in shown
    assert without_timing(rows_of(mine.run.output)) == without_timing(rows_of(whole.run.output))
    expected = read_adapter(whole.run.output / "adapter").tensors
    for name, tensor in read_adapter(mine.run.output / "adapter").tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])
    with pytest.raises(ValueError, match="holds a finished run"):
        finetune(but(mine, "run", max_steps=5), progress=False)
    names = {path.name for path in mine.run.output.iterdir()}
    assert names == {"adapter", "checkpoints", "completed", "goodput.json", "loss.png", "metrics.jsonl", "options.json"}


@pytest.mark.integration
def test_the_schedule_of_an_extended_run(options: Options) -> None:
    """From the first new step on, the learning rate is that of a run of the new length, and the optimizer goes on."""
    mine = but(but(options, "optimizer", schedule="cosine", warmup_steps=2), "run", max_steps=4, epochs=9)
    finetune(mine, progress=False)
    finetune(but(mine, "run", max_steps=8), progress=False)
    found = [row["learning_rate"] for row in rows_of(mine.run.output)[1:]]
    rates = {steps: learning_rate_schedule("cosine", 1e-2, steps, 2) for steps in (4, 8)}
    np.testing.assert_allclose(found, [float(rates[4 if step < 4 else 8](step)) for step in range(8)], rtol=1e-6)


@pytest.mark.integration
def test_a_run_goes_on_with_another_split_on_another_number_of_devices(options: Options, tmp_path: Path) -> None:
    """Eight rows a step: 4 x 2 on one device, then 4 x 1 on four, of which two share rows; to rounding, the same losses."""
    mine = but(but(options, "data", held_out=0.0), "run", eval_every=0, save_every=0)
    whole = but(mine, "run", batch_size=4, accumulation_steps=2, max_steps=4, output=tmp_path / "whole")
    finetune(whole, progress=False)
    finetune(but(whole, "run", max_steps=2, output=mine.run.output), progress=False)
    flags = ["--model", str(mine.model.model), "--data", str(mine.data.data), "--rank", "4", "--alpha", "8"]
    flags += ["--max-length", "64", "--held-out", "0", "--learning-rate", "1e-2", "--eval-every", "0", "--save-every", "0"]
    flags += ["--samples", "0", "--max-steps", "4", "--batch-size", "4", "--mesh", "data=2,tensor=2"]
    with start(flags, mine.run.output, XLA_FLAGS=virtual_devices(4)["XLA_FLAGS"]) as process:
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert "4 steps of 8 × 64 tokens on 4 cpu" in errors
    losses, expected = ([row["loss"] for row in rows_of(run.run.output)] for run in (mine, whole))
    np.testing.assert_allclose(losses, expected, rtol=2e-5)


@pytest.mark.integration
def test_a_picture_that_cannot_be_drawn_does_not_stop_a_run(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(picture, "plot_losses", lambda *_: 1 / 0)
    finetune(options, progress=False)
    assert capsys.readouterr().err.count("loss.png: cannot be drawn (division by zero); the run goes on") == 1
    assert (options.run.output / "completed").exists()


@pytest.mark.integration
def test_a_finished_run_ends_again_and_overwrite_begins_anew(options: Options) -> None:
    """A run that was killed at its end has nothing left to do but the adapter."""
    output, mine = options.run.output, but(but(options, "run", max_steps=1), "data", held_out=0.0)
    finetune(mine, progress=False)
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(output / "adapter")
    finetune(mine, progress=False)
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [row["step"] for row in rows_of(output)] == [1]

    (output / "notes.txt").write_text("mine")
    finetune(but(but(mine, "lora", rank=5), "run", max_steps=2, overwrite=True), progress=False)
    assert [row["step"] for row in rows_of(output)] == [1, 2]
    assert read_adapter_method(output / "adapter").rank == 5
    assert (output / "notes.txt").read_text() == "mine"
