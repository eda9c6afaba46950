"""The loop around a step that is made up here: what happens when, and what stops it."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.interrupts import Interrupted
from qlora_jax.train import (
    PAIRS,
    TOKENS,
    Cadence,
    Callback,
    DivergedError,
    MetricsLog,
    Records,
    TrainingData,
    TrainState,
    Unit,
    best_evaluation,
    evaluation,
    mean_metrics,
    train,
)


class Batches:
    """Endless; the n-th batch holds n used tokens. The position is the number of batches used."""

    def __init__(self, used: int = 0) -> None:
        self.used = used

    def __next__(self) -> dict[str, np.ndarray]:
        self.used += 1
        return {"segment_ids": (np.arange(50) < self.used).astype(np.int32)[None]}

    def get_state(self) -> dict[str, Any]:
        return {"used": self.used}


class Run:
    """A run of the loop, and everything that it called, in order."""

    def __init__(self, folder: Path, metrics: Callable[[int], dict[str, float]] | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.held_out: dict[int, float] = {}
        self.complete = True  # whether all checkpoints are
        self.log = MetricsLog(folder / "metrics.jsonl", resume_at=0)
        self.metrics = metrics or (lambda step: {"loss": 1 / step, "grad_norm": 2.0, "tokens": 3.0})

    def step(self, state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        assert frozen == "frozen"
        assert batch == "on the device"
        number = int(state.step) + 1
        self.calls.append(("step", number))
        return at(number), {name: jnp.float32(value) for name, value in self.metrics(number).items()}

    def evaluate(self, state: TrainState) -> dict[str, float]:
        self.calls.append(("evaluate", int(state.step)))
        return {"loss": self.held_out.get(int(state.step), 7.0), "accuracy": 0.5}

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        assert step == int(state.step)
        self.calls.append(("save", step, position))
        self.complete = False

    def wait(self) -> None:
        self.complete = True

    def restore(self) -> TrainState:
        raise AssertionError("nothing is rolled back")

    def callback(self, every: int) -> Callback:
        def on_step(step: int, state: TrainState) -> dict[str, float]:
            assert step == int(state.step)
            self.calls.append(("callback", step))
            return {"height": step / 8}

        return Callback(every, on_step, "height")

    def go(
        self,
        cadence: Cadence,
        *,
        evaluate_every: int,
        first: int = 0,
        held_out: bool = True,
        unit: Unit = TOKENS,
        callbacks: Sequence[Callback] = (),
    ) -> TrainState:
        data = TrainingData(
            Batches(first),
            put=lambda batch: "on the device",  # type: ignore[arg-type, return-value]
            count_tokens=lambda batch: int(batch["segment_ids"].sum()),
        )
        try:
            state = train(
                self.step,
                at(first),
                "frozen",
                data,
                cadence=cadence,
                records=Records(self.log, lambda count: 10 + count, unit, progress=False),
                checkpoints=self,
                callbacks=[*([evaluation(evaluate_every, self.evaluate)] if held_out else []), *callbacks],
            )
            assert self.complete
            return state
        finally:
            self.log.close()


def at(step: int) -> TrainState:
    return TrainState(jnp.int32(step), None, None, jnp.uint32(0))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_cadence(run: Run) -> None:
    """Evaluations before the first step, every two, and after the last; checkpoints every three, and after the last."""
    state = run.go(Cadence(steps=7, save_every=3), evaluate_every=2)
    assert int(state.step) == 7
    assert run.calls == [
        ("evaluate", 0),
        ("step", 1),
        ("step", 2),
        ("evaluate", 2),
        ("step", 3),
        ("save", 3, {"used": 3}),
        ("step", 4),
        ("evaluate", 4),
        ("step", 5),
        ("step", 6),
        ("evaluate", 6),
        ("save", 6, {"used": 6}),
        ("step", 7),
        ("evaluate", 7),
        ("save", 7, {"used": 7}),
    ]


def test_zero_is_only_at_the_end(run: Run) -> None:
    run.go(Cadence(steps=3, save_every=0), evaluate_every=0)
    rest = [call[:2] for call in run.calls if call[0] != "step"]
    assert rest == [("evaluate", 0), ("evaluate", 3), ("save", 3)]


def test_rows(run: Run) -> None:
    run.go(Cadence(steps=3, save_every=0), evaluate_every=2)
    before, *rows = run.log.rows
    assert before == {"step": 0, "eval_loss": 7.0, "eval_accuracy": 0.5}
    for step, row in enumerate(rows, start=1):
        assert row["step"] == step
        assert row["loss"] == float(np.float32(1 / step))
        assert row["grad_norm"] == 2.0
        assert row["learned_tokens"] == 3
        assert row["learning_rate"] == 10 + step - 1, "that of the update, which counts from 0"
        assert row["tokens_per_second"] > 0
        assert row["peak_memory_bytes"] > 0
        assert ("eval_loss" in row) == ("eval_accuracy" in row) == (step in (2, 3))


def test_further_means_and_units_go_into_the_rows(tmp_path: Path) -> None:
    metrics = {"loss": 1.0, "rewards/margins": 0.25, "grad_norm": 2.0, "pairs": 4.0}
    run = Run(tmp_path, lambda step: metrics)
    run.go(Cadence(steps=1, save_every=0), evaluate_every=0, unit=PAIRS)
    row = run.log.rows[-1]
    assert row["rewards/margins"] == 0.25
    assert row["learned_pairs"] == 4
    assert "learned_tokens" not in row


@pytest.mark.parametrize(("every", "steps"), [(3, [0, 3, 5]), (0, [0, 5]), (1, [0, 1, 2, 3, 4, 5])])
def test_callbacks(run: Run, every: int, steps: list[int]) -> None:
    """Before, every so many steps, and after the last; what they see goes into the row of the step."""
    run.go(Cadence(steps=5, save_every=0), evaluate_every=0, held_out=False, callbacks=[run.callback(every)])
    assert [call[1] for call in run.calls if call[0] == "callback"] == steps
    assert [(row["step"], row["height"]) for row in run.log.rows if "height" in row] == [(step, step / 8) for step in steps]
    assert [row["step"] for row in run.log.rows] == [0, 1, 2, 3, 4, 5]


def test_callbacks_of_a_run_that_stops_early_or_resumes(run: Run, tmp_path: Path) -> None:
    run.held_out = HELD_OUT
    run.go(Cadence(steps=20, save_every=0, patience=3), evaluate_every=2, callbacks=[run.callback(0)])
    assert [call[1] for call in run.calls if call[0] == "callback"] == [0, 10], "the last step, which early stopping chose"
    (tmp_path / "more").mkdir()
    more = Run(tmp_path / "more")
    more.go(Cadence(steps=5, save_every=0), evaluate_every=0, first=3, callbacks=[more.callback(2)])
    assert [call[1] for call in more.calls if call[0] == "callback"] == [4, 5]


# Lower at first, then not for three evaluations, of which one is as low; before the first step, lowest of all.
HELD_OUT = {0: 1.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: math.nan, 12: 2.0}


def test_early_stopping(run: Run) -> None:
    """At the third evaluation without a lower loss; each lowest one is saved, and so is the last step."""
    run.held_out = HELD_OUT
    state = run.go(Cadence(steps=20, save_every=7, patience=3), evaluate_every=2)
    assert int(state.step) == 10
    assert [call[1] for call in run.calls if call[0] == "save"] == [2, 4, 7, 10]
    assert best_evaluation(run.log.rows) == (4, 3)


def test_patience_that_lasts(run: Run) -> None:
    run.held_out = HELD_OUT
    assert int(run.go(Cadence(steps=14, save_every=0, patience=4), evaluate_every=2).step) == 14
    assert best_evaluation(run.log.rows) == (12, 1)


@pytest.mark.parametrize("first", [5, 7, 8, 9])
def test_a_resumed_run_keeps_the_count(tmp_path: Path, first: int) -> None:
    """It comes from the records, whenever the run was killed."""
    run = Run(tmp_path)
    run.held_out = HELD_OUT
    run.log.rows += [{"step": step, "eval_loss": loss} for step, loss in HELD_OUT.items() if step <= first]
    assert int(run.go(Cadence(steps=20, save_every=0, patience=3), evaluate_every=2, first=first).step) == 10


def test_a_run_that_had_stopped_does_not_go_on(run: Run) -> None:
    run.log.rows += [{"step": step, "eval_loss": loss} for step, loss in HELD_OUT.items() if step <= 10]
    assert int(run.go(Cadence(steps=20, save_every=0, patience=3), evaluate_every=2, first=10).step) == 10
    assert run.calls == []


def test_the_best_of_no_evaluations() -> None:
    assert best_evaluation([{"step": 0, "eval_loss": 1.0}, {"step": 1, "loss": 1.0}]) == (None, 0)
    assert best_evaluation([{"step": 1, "eval_loss": math.nan}]) == (None, 1)


def test_a_resumed_run_does_the_rest(run: Run) -> None:
    run.go(Cadence(steps=5, save_every=2), evaluate_every=2, first=3)
    assert run.calls == [
        ("step", 4),
        ("evaluate", 4),
        ("save", 4, {"used": 4}),
        ("step", 5),
        ("evaluate", 5),
        ("save", 5, {"used": 5}),
    ]


def test_a_finished_run_does_nothing(run: Run) -> None:
    assert int(run.go(Cadence(steps=4, save_every=1), evaluate_every=1, first=4).step) == 4
    assert run.calls == []


def test_without_held_out_data_nothing_is_evaluated(run: Run) -> None:
    run.go(Cadence(steps=2, save_every=1), evaluate_every=1, held_out=False)
    assert {call[0] for call in run.calls} == {"step", "save"}
    assert not any("eval_loss" in row for row in run.log.rows)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, name: str, value: float) -> None:
    def metrics(step: int) -> dict[str, float]:
        return {"loss": 1.0, "grad_norm": 2.0, "tokens": 3.0} | ({name: value} if step == 5 else {})

    run = Run(tmp_path, metrics)
    with pytest.raises(DivergedError, match=rf"step 5: found {name} .*the last good checkpoint is that of step 4\."):
        run.go(Cadence(steps=9, save_every=2), evaluate_every=0)
    assert [call[1] for call in run.calls if call[0] == "save"] == [2, 4]
    assert [row["step"] for row in run.log.rows] == [0, 1, 2, 3, 4]


def test_a_run_that_diverges_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, lambda step: {"loss": math.nan, "grad_norm": math.nan, "tokens": 3.0})
    with pytest.raises(DivergedError, match=r"found loss nan and grad_norm nan, .* no checkpoint was saved before"):
        run.go(Cadence(steps=9, save_every=2), evaluate_every=0)
    resumed = Run(tmp_path, run.metrics)
    with pytest.raises(DivergedError, match=r"step 7: .* the last good checkpoint is that of step 6"):
        resumed.go(Cadence(steps=9, save_every=2), evaluate_every=0, first=6)


def test_means_weigh_tokens_not_batches() -> None:
    sums = iter([(10.0, 2.0), (1.0, 8.0), (0.0, 0.0)])

    def eval_step(adapter: Any, frozen: Any, batch: Any) -> Any:
        loss, tokens = map(jnp.float32, next(sums))
        return {"loss": loss, "accuracy": 2 * loss}, tokens

    found = mean_metrics(
        eval_step,
        at(0),
        None,
        [{}, {}, {}],
        put=lambda batch: {},
        progress=False,
    )
    assert found == pytest.approx({"loss": 11 / 10, "accuracy": 22 / 10})
    none = mean_metrics(lambda *arguments: pytest.fail("called"), at(0), None, [], put=lambda batch: {}, progress=False)
    assert none == {"loss": 0}


@pytest.mark.parametrize("during", ["step", "evaluation"])
def test_a_signal_ends_the_loop_after_the_step_that_it_is_in(run: Run, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    """Also one that comes while the step is evaluated: no other step is made before the state is saved."""
    make, evaluate = run.step, run.evaluate

    def step(state: TrainState, *rest: Any) -> Any:
        if during == "step" and int(state.step) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(state, *rest)

    def evaluation_of(state: TrainState) -> dict[str, float]:
        if during == "evaluation" and int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(state)

    monkeypatch.setattr(run, "step", step)
    monkeypatch.setattr(run, "evaluate", evaluation_of)
    with pytest.raises(Interrupted, match="stopped after step 2, which is saved") as error:
        run.go(Cadence(9, save_every=0), evaluate_every=2)
    assert error.value.number == signal.SIGTERM
    assert run.calls[-2:] == [("evaluate", 2), ("save", 2, {"used": 2})]
    assert run.complete
