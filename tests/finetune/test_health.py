"""The options that keep a long run healthy, and what a run with them leaves in its folder.

The test of a whole run takes about 6 s of a core.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from runs import but, rows_of

from qlora_jax.finetune import HealthOptions, Options, finetune, training
from qlora_jax.finetune.folder import _differences, record_of
from qlora_jax.train import Goodput, TrainingData


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"on_bad_step": "ignore"}, "on_bad_step: expected one of stop, skip, rollback, found 'ignore'"),
        ({"bad_steps_in_a_row": 0}, "bad_steps_in_a_row: expected a number of at least 1, found 0"),
        ({"loss_spike": float("nan")}, "loss_spike: expected a number of at least 0, found nan"),
        ({"stall_timeout": -1.0}, "stall_timeout: expected a number of at least 0, found -1.0"),
        ({"stall_exit": True, "stall_timeout": 0.0}, "stall_exit: expected stall_timeout beside it, found 0"),
        *(
            ({"profile_steps": text}, f"profile_steps: .*, found '{text}'")
            for text in ("0-3", "7-5", "a", "1-", "3-4-5", "")
        ),
    ],
)
def test_options_that_cannot_be_used(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        HealthOptions(**fields)


@pytest.mark.parametrize(("text", "steps"), [("10-12", (10, 12)), ("7", (7, 7)), (None, None)])
def test_the_steps_of_a_trace(text: str | None, steps: tuple[int, int] | None, tmp_path: Path) -> None:
    profile = HealthOptions(profile_steps=text).monitor(tmp_path, Goodput()).profile
    assert (profile and (profile.first, profile.last)) == steps


def test_a_run_may_resume_with_other_options_of_its_health() -> None:
    """A run that diverged goes on with another policy."""
    other = dataclasses.replace(Options(), health=HealthOptions("rollback", 9, 3.0, 5.0, True, 1.0, "3"))
    assert all(value != getattr(HealthOptions(), name) for name, value in vars(other.health).items())
    assert _differences(record_of(Options()), other) == []


@pytest.mark.integration
def test_a_run_rolls_back_and_accounts_for_its_time(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth batch is poisoned; the checkpoint of the second step is restored, and the third batch is left out too."""
    make, learned = training._training_data, []

    def poisoned(*arguments: Any) -> TrainingData:
        data = make(*arguments)

        def put(batch: dict[str, np.ndarray]) -> Any:
            learned.append(int(batch["loss_mask"].sum()))
            put = data.put(batch)
            return put | {"loss_mask": put["loss_mask"] * jnp.nan} if len(learned) == 4 else put

        return dataclasses.replace(data, put=put)

    monkeypatch.setattr(training, "_training_data", poisoned)
    run = but(but(options, "run", max_steps=4, samples=1), "health", on_bad_step="rollback", health_every=1e-9)
    run = but(run, "watch", sample_every=3)
    finetune(run, progress=False)
    said = capsys.readouterr().err
    problem = "found loss nan and grad_norm nan, expected finite numbers"
    assert f"Step 4: {problem}; back to the checkpoint of step 2, without the data since." in said
    assert "Step 4 of 4: loss " in said
    assert "Goodput " in said.splitlines()[-1]
    rows = rows_of(run.run.output)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    answered = [json.loads(line)["step"] for line in (run.run.output / "samples.jsonl").read_text("utf-8").splitlines()]
    assert answered == sorted(answered)
    assert answered.count(3) == answered.count(4), "the answers of the step that was done again are there once"
    assert rows[3]["rolled_back"] == [f"step 4: {problem}"]
    assert [row["learned_tokens"] for row in rows[1:]] == [learned[index] for index in (0, 1, 4, 5)]
    account = json.loads((run.run.output / "goodput.json").read_text("utf-8"))
    assert account["reached"] == 4
    assert account["seconds"].keys() >= {"starting", "loading", "compiling", "useful", "redone", "saving", "finishing"}
    assert 0 < rows[4]["goodput"] < 1
