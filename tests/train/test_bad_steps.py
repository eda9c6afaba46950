"""What a run does at a bad step, with real steps, records and checkpoints of a model of three small matrices.

References: the same steps without the bad batches, bit for bit; quantities of NumPy. The module takes about 5 s.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.train import (
    BadStepPolicy,
    Cadence,
    DivergedError,
    MetricsLog,
    OptimizerSpec,
    Records,
    TrainingData,
    TrainState,
    create_state,
    jit_train_step,
    learning_rate_schedule,
    split,
    train,
)

RATE = learning_rate_schedule("linear", 1e-2, 12, 2)


class Squares(nnx.Module):
    """A stack of two layers, which an optimizer in host memory takes one by one, and a matrix without layers."""

    def __init__(self) -> None:
        values = np.random.default_rng(0).standard_normal((3, 16, 16)).astype(np.float32)
        self.stack, self.last = nnx.LoRAParam(jnp.asarray(values[:2])), nnx.LoRAParam(jnp.asarray(values[2]))


def loss(model: Squares, batch: Any, key: jax.Array | None) -> jax.Array:
    x = batch["inputs"]
    for index in range(2):
        x = jnp.tanh(x @ model.stack[index])
    return jnp.sum((x @ model.last[...]) ** 2) + batch["error"].sum()


class Batches:
    """Endless; the batches of `poisoned`, which count from 1, are bad."""

    def __init__(self, poisoned: Mapping[Any, float], numbers: Sequence[int] | None = None) -> None:
        self.used, self.poisoned, self.numbers = 0, poisoned, numbers

    def __next__(self) -> dict[str, np.ndarray]:
        self.used += 1
        number = self.used if self.numbers is None else self.numbers[self.used - 1]
        inputs = np.random.default_rng(number).standard_normal((2, 16)).astype(np.float32)
        error = np.full((2, 1), self.poisoned.get(number, 0.0), np.float32)
        return {"inputs": inputs, "error": error, "loss_mask": np.ones((2, 1), np.float32)}

    def get_state(self) -> dict[str, Any]:
        return {"used": self.used}


class Run:
    """The parts of a run; `go` runs the loop in a folder, from the newest checkpoint there."""

    def __init__(self, **optimizer: Any) -> None:
        self.tx = OptimizerSpec(weight_decay=0.1, **optimizer).build(RATE)
        graph, _, self.frozen = split(Squares())
        self.step = jit_train_step(graph, self.tx, loss, self.state())
        self.checkpoints: Any = InMemory()

    def state(self) -> TrainState:
        return create_state(self.tx, split(Squares())[1])

    def go(self, folder: Path, batches: Batches, steps: int, policy: BadStepPolicy, first: int = 0) -> TrainState:
        """Run to a step, from the start or from a checkpoint, with a checkpoint after every second step."""
        state, self.checkpoints.newest = self.state(), first
        if first:
            state, batches.used = self.checkpoints.restore(), self.checkpoints.saved[first][2]["used"]
        with closing(MetricsLog(folder / "metrics.jsonl", resume_at=int(state.step))) as log:
            return train(
                self.step,
                state,
                self.frozen,
                TrainingData(batches, lambda batch: {k: jnp.asarray(v[None]) for k, v in batch.items()}, lambda batch: 2),
                cadence=Cadence(steps, 2, bad_steps=policy),
                records=Records(log, RATE, progress=False),
                checkpoints=self.checkpoints,
            )


class InMemory:
    """The checkpoints by step, in memory."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[Any, Any, dict[str, Any]]] = {}

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        copies = jax.tree.map(np.array, state)
        self.newest, self.saved[step] = step, (copies, jax.tree.map(lambda leaf: leaf.sharding, state), position)

    def wait(self) -> None:
        """Wait for nothing."""

    def restore(self) -> TrainState:
        return jax.device_put(*self.saved[self.newest][:2])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def assert_same(one: TrainState, other: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array(a).tobytes() == np.array(b).tobytes()


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


@pytest.mark.parametrize(
    "optimizer",
    [{}, {"name": "adamw8bit"}, {"host_optimizer": True}, {"host_optimizer": True, "host_adapter": True}],
    ids=["adamw", "adamw8bit", "state on the host", "adapter on the host"],
)
def test_a_skipped_step_changes_nothing(optimizer: dict[str, Any], tmp_path: Path) -> None:
    """The states are those of a run in which the updates of the bad batches were not made, by a step without a limit."""
    run = Run(**optimizer)
    batches, plain = Batches({3: math.nan, 4: math.inf}), Batches({})
    found = run.go(tmp_path, batches, 6, BadStepPolicy("skip", 2))
    expected = run.state()
    for number in range(1, 7):
        batch = {name: x[None] for name, x in next(plain).items()}
        if number in (3, 4):
            expected = dataclasses.replace(expected, step=expected.step + 1)
        else:
            expected, _ = run.step(expected, run.frozen, batch)
    assert_same(found, expected)
    logged = {row["step"]: row for row in rows(tmp_path)}
    assert [step for step, row in logged.items() if "skipped" in row] == [3, 4]
    assert "found loss nan" in logged[3]["skipped"]
    assert logged[5]["learning_rate"] == pytest.approx(float(np.asarray(RATE(2)))), "the schedule counts updates"


def test_a_gradient_that_is_not_finite_is_skipped(run: Run) -> None:
    """The loss is finite: sqrt has no derivative at 0."""
    graph, _, frozen = split(Squares())
    step = jit_train_step(graph, run.tx, lambda *args: loss(*args) + jnp.sqrt(0 * jnp.sum(args[0].last[...])), run.state())
    batch = {name: x[None] for name, x in next(Batches({})).items()}
    after, metrics = step(run.state(), frozen, batch, np.float32(np.inf))
    assert math.isfinite(metrics["loss"])
    assert not math.isfinite(metrics["grad_norm"])
    assert_same(after, dataclasses.replace(run.state(), step=jnp.int32(1)))


def test_at_most_so_many_steps_in_a_row_are_skipped(run: Run, tmp_path: Path) -> None:
    """The records count them, so that a run that was killed in between does not begin to count anew."""
    bad, policy = dict.fromkeys((2, 4, 5, 6), math.nan), BadStepPolicy("skip", 2)
    for first in (0, 4):
        with pytest.raises(DivergedError, match=r"step 6: found loss nan.*, after 2 bad steps in a row; .* of step 4\."):
            run.go(tmp_path, Batches(bad), 9, policy, first)
        assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("bad", "left_out", "notes"), [((5,), (5,), (5,)), ((6, 8), (5, 6, 7, 8), (6, 6)), ((5, 6, 9), (5, 6, 9), (5, 5, 7))]
)
def test_a_rollback_leaves_out_the_batches_since_the_checkpoint(
    run: Run, tmp_path: Path, bad: tuple[int, ...], left_out: tuple[int, ...], notes: tuple[int, ...]
) -> None:
    """The states and the losses are those of a run which never saw these batches, also if it was killed."""
    policy, poisoned, paths = BadStepPolicy("rollback", 2), dict.fromkeys(bad, math.nan), [tmp_path / x for x in "ab"]
    for path in paths:
        path.mkdir()
    run.go(paths[0], Batches(poisoned), 5, policy)  # killed after the rollback, before the next checkpoint
    found = run.go(paths[0], Batches(poisoned), 10, policy, first=4)
    numbers = [number for number in range(1, 20) if number not in left_out]
    assert_same(found, run.go(paths[1], Batches({}, numbers), 10, policy))
    one, other = (rows(path) for path in paths)
    assert [(row["step"], row["loss"]) for row in one] == [(row["step"], row["loss"]) for row in other]
    noted = [note.split(":")[0] for row in one for note in row.get("rolled_back", [])]
    assert noted == [f"step {step}" for step in notes]


def test_rollbacks_to_one_checkpoint_are_limited(run: Run, tmp_path: Path) -> None:
    bad = dict.fromkeys(range(3, 20), math.nan)
    with pytest.raises(DivergedError, match=r"step 3: .*, after 3 rollbacks; the last good checkpoint is that of step 2\."):
        run.go(tmp_path, Batches(bad), 10, BadStepPolicy("rollback", 3))


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_a_spike_is_a_bad_step(run: Run, tmp_path: Path, action: Any) -> None:
    policy = BadStepPolicy(action, spike=20.0)
    poisoned = Batches({5: 1e4, 21: 1e4})  # the fifth has too few losses before it
    if action == "stop":
        with pytest.raises(DivergedError, match=r"step 21: found loss 1.*, expected at most .* after the losses before"):
            run.go(tmp_path, poisoned, 22, policy)
        return
    found = run.go(tmp_path, poisoned, 24, policy)
    noted = [row for row in rows(tmp_path) if "skipped" in row or "rolled_back" in row]
    assert [row["step"] for row in noted] == [21]
    assert int(found.step) == 24


def test_the_limit_of_a_loss() -> None:
    """Against NumPy: the last 64 losses, whatever other rows there are."""
    losses = np.random.default_rng(3).normal(2.0, 0.1, 100)
    logged: list[dict[str, Any]] = [{"step": n, "loss": float(x)} for n, x in enumerate(losses)]
    logged += [{"step": 200, "skipped": "found loss nan"}]
    last = losses[-64:]
    expected = np.median(last) + 8 * np.median(np.abs(last - np.median(last)))
    assert BadStepPolicy(spike=8.0).loss_limit(logged) == pytest.approx(expected, rel=1e-6)
    assert BadStepPolicy(spike=8.0).loss_limit(logged[:15]) == math.inf
    assert BadStepPolicy().loss_limit(logged) == math.inf
    same = [{"step": n, "loss": 2.0} for n in range(20)]
    assert BadStepPolicy(spike=5.0).loss_limit(same) == pytest.approx(2.1), "equal losses do not make each rise a spike"
