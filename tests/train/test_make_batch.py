"""An objective that makes its own data: each batch is sampled from the model as it is at that step."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tiny_config import CONFIG

from qlora_jax.models import ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.serve import generate
from qlora_jax.train import (
    BatchSpec,
    Cadence,
    MetricsLog,
    OptimizerSpec,
    Records,
    Step,
    StepSpec,
    TrainingData,
    TrainState,
    create_state,
    language_model_objective,
    learning_rate_schedule,
    split,
    train,
)

ROWS, PROMPT, LENGTH = 2, 4, 8
MODEL = ModelSpec(llama_config(CONFIG | {"model_type": "llama"}), None, "none", LoRA(4), "float32", "none")
SPEC = StepSpec(
    MODEL,
    language_model_objective(packed=False),
    BatchSpec(batch_size=ROWS, length=LENGTH - 1),
    OptimizerSpec(max_grad_norm=None),
)


class Prompts:
    """Endless prompts."""

    def __init__(self) -> None:
        self.used = 0

    def __next__(self) -> dict[str, np.ndarray]:
        self.used += 1
        return {"prompts": np.random.default_rng(self.used).integers(0, 101, (ROWS, PROMPT), np.int32)}

    def get_state(self) -> dict[str, Any]:
        return {"used": self.used}


class Nowhere:
    """No checkpoints."""

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Save nothing."""

    def wait(self) -> None:
        """Wait for nothing."""

    def restore(self) -> TrainState:
        raise AssertionError("nothing is rolled back")


def test_batches_are_sampled_from_the_current_model(tmp_path: Path) -> None:
    """What the step gets are the model's own answers; an update makes them more likely."""
    graphdef, adapter, frozen = split(MODEL.build(nnx.Rngs(0)))
    rate = learning_rate_schedule("constant", 3e-3, 6)
    tx = SPEC.optimizer.build(rate)
    state = create_state(tx, adapter)
    asked: list[tuple[int, dict[str, np.ndarray]]] = []

    def answers(state: TrainState, prompts: np.ndarray) -> np.ndarray:
        model = nnx.merge_state(state.adapter, frozen)
        found = generate(graphdef, model, prompts.tolist(), max_new_tokens=LENGTH - PROMPT, eos_ids=frozenset())
        return np.concatenate([prompts, np.asarray(found, np.int32)], axis=1)

    def make_batch(state: TrainState, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = answers(state, batch["prompts"])
        mask = np.zeros((ROWS, LENGTH - 1), np.float32)
        mask[:, PROMPT - 1 :] = 1
        made = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": mask}
        asked.append((int(state.step), made))
        expected = nnx.merge(graphdef, state.adapter, frozen)(made["inputs"]).argmax(-1)
        np.testing.assert_array_equal(np.asarray(expected)[mask > 0], made["targets"][mask > 0])  # of this very state
        return made

    step = Step(SPEC.objective, tx, graphdef, state, frozen, SPEC.batch_shapes())
    log = MetricsLog(tmp_path / "metrics.jsonl", resume_at=0)
    data = TrainingData(
        Prompts(),
        put=lambda batch: jax.device_put(SPEC.micro_batches(batch)),
        count_tokens=lambda batch: batch["inputs"].size,
        make_batch=make_batch,
    )
    state = train(
        step.jit_train(),
        state,
        frozen,
        data,
        cadence=Cadence(steps=6, save_every=0),
        records=Records(log, rate, progress=False),
        checkpoints=Nowhere(),
    )
    log.close()
    assert [number for number, _ in asked] == list(range(6))
    assert all(row["learned_tokens"] == ROWS * (LENGTH - PROMPT) for row in log.rows)
    sums, count = step.jit_eval()(state.adapter, frozen, asked[-1][1])
    assert float(sums["loss"]) / float(count) < log.rows[-1]["loss"]
