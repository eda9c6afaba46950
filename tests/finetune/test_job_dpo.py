"""Preference optimisation in the main job: what it records and what it starts from.

References: log 2 of an untrained pair; TRL's formula on log probabilities that are computed here from the logits of models
loaded with either adapter; PEFT's files.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowered import BOTH_PRECOMPILED
from runs import FinishedRun, but, rows_of, without_timing

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from qlora_jax.errors import OptionError
from qlora_jax.finetune import LoRAOptions, ObjectiveOptions, Options, RunOptions, finetune, training
from qlora_jax.finetune.objectives import OBJECTIVES
from qlora_jax.finetune.objectives.sft import SFT
from qlora_jax.finetune.prepare import prepare

NAMES = ", ".join(dict.fromkeys(kind.name for kind in OBJECTIVES))
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


@pytest.fixture
def options(dpo_options: Options, tmp_path: Path) -> Options:
    return but(dpo_options, "run", output=tmp_path / "run")


def untimed(options: Options) -> list[dict[str, Any]]:
    return without_timing(rows_of(options.run.output))


def test_it_learns_to_prefer(finished_dpo: FinishedRun) -> None:
    assert finished_dpo.steps == BOTH_PRECOMPILED
    before, *rows = finished_dpo.rows
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert all(row.keys() >= {*REWARDS, "learned_pairs"} for row in rows)
    assert all(row["learned_pairs"] == 4 for row in rows[:4])
    last = rows[-1]
    assert last["loss"] < 0.9 * math.log(2)
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-5)
    assert last["rewards/margins"] > 0.1
    assert last["rewards/accuracies"] == 1.0
    assert last["eval_loss"] < 0.9 * math.log(2)
    assert last["eval_rewards/accuracies"] == 1.0
    assert read_adapter(finished_dpo.folder).method.rank == 4
    assert "20 of 20 pairs kept" in finished_dpo.errors
    assert "steps of 4 × 2 × 64 tokens" in finished_dpo.errors
    assert "Held-out loss 0.693 before" in finished_dpo.errors
    assert "perplexity" not in finished_dpo.errors
    assert "before" in finished_dpo.out


@pytest.mark.integration
def test_it_resumes(options: Options, finished_dpo: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = training.mean_metrics

    def killed(step: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if int(state.step) == 3:
            raise KeyboardInterrupt
        return evaluate(step, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "mean_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(options, progress=False)
    assert [row["step"] for row in untimed(options)] == [0, 1, 2]
    finetune(options, progress=False)
    assert untimed(options) == untimed(finished_dpo.options)


def sequence_log_probabilities(options: Options, adapter: str, texts: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Σ log π of each answer, by NumPy from the logits of the model with an adapter."""
    checkpoint = open_checkpoint(str(options.model.model))
    model: Any = load_model(checkpoint, method=read_adapter_method(adapter), dtype=jnp.float32, progress=False)
    graph, state = nnx.split(load_adapter(model, adapter))
    forward = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    sums = []
    for prompt, answer in texts:
        tokens = np.array([[*prompt, *answer]], np.int32)
        logits = np.asarray(forward(state, tokens))[0].astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(len(prompt), len(prompt) + len(answer))
        sums.append(logs[places - 1, tokens[0, places]].sum())
    return np.array(sums)


@pytest.mark.integration
def test_it_continues_from_an_adapter_which_is_the_reference(
    options: Options, finished_dpo: FinishedRun, tmp_path: Path
) -> None:
    """Its first step costs log 2, whatever the adapter has learned before; the rewards after it are against that adapter."""
    start = finished_dpo.folder
    second = but(but(options, "model", adapter=str(start)), "run", output=tmp_path / "second", eval_every=0)
    second = dataclasses.replace(second, lora=LoRAOptions())
    folder = finetune(second, progress=False)
    before, *rows = untimed(second)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.1
    found = read_adapter(folder)
    assert (found.method.rank, found.method.alpha) == (4, 8.0)
    old = read_adapter(start).tensors
    assert 0 < max(np.abs(found.tensors[name] - tensor).max() for name, tensor in old.items()) < 0.2

    prepared = prepare(but(second, "run", output=tmp_path / "third"), progress=False)
    assert prepared.objective.held_out is not None
    (batch,) = prepared.objective.held_out(4)
    expected = {}
    for side in ("chosen", "rejected"):
        texts = []
        for inputs, targets, mask in zip(*(batch[f"{side}_{x}"] for x in ("inputs", "targets", "loss_mask")), strict=True):
            places = np.flatnonzero(mask)
            texts.append((inputs[: places[0] + 1].tolist(), targets[places].tolist()))
        differences = [sequence_log_probabilities(options, str(adapter), texts) for adapter in (folder, start)]
        expected[side] = 0.1 * (differences[0] - differences[1])
    margin = expected["chosen"] - expected["rejected"]
    assert rows[-1]["eval_rewards/chosen"] == pytest.approx(expected["chosen"].mean(), abs=2e-4)
    assert rows[-1]["eval_rewards/rejected"] == pytest.approx(expected["rejected"].mean(), abs=2e-4)
    assert rows[-1]["eval_loss"] == pytest.approx(np.log1p(np.exp(-margin)).mean(), abs=2e-4)


@pytest.mark.integration
def test_answers_can_be_learned_from_an_adapter_too(options: Options, tmp_path: Path) -> None:
    """The first loss of the second run is the last held-out loss of the first one, on the same data."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(f'{{"question": "{n}?", "answer": "red"}}\n' for n in range(8)), encoding="utf-8")
    row = str(answers)
    first = dataclasses.replace(but(options, "run", batch_size=2), objective=ObjectiveOptions())
    first = but(first, "data", data=row, eval_data=row, held_out=0.0)
    start = finetune(first, progress=False)
    second = but(but(first, "model", adapter=str(start)), "run", output=tmp_path / "second")
    second = dataclasses.replace(second, lora=LoRAOptions(dropout=0.1))
    finetune(second, progress=False)
    assert untimed(second)[0]["eval_loss"] == pytest.approx(untimed(first)[-1]["eval_loss"], abs=1e-6)
    assert untimed(first)[-1]["eval_loss"] < 0.9 * untimed(first)[0]["eval_loss"]


@pytest.mark.integration
def test_beta_and_smoothing_reach_the_loss(options: Options, tmp_path: Path) -> None:
    """The same first update; the rewards of the second step are beta times the same ratios."""
    rewards = {}
    for beta in (0.1, 0.2):
        one = but(but(options, "run", output=tmp_path / f"{beta}", max_steps=2, eval_every=0), "objective", dpo_beta=beta)
        finetune(one, progress=False)
        rewards[beta] = untimed(one)[-1]["rewards/chosen"]
    assert abs(rewards[0.1]) > 0.01
    assert rewards[0.2] == pytest.approx(2 * rewards[0.1], rel=1e-2)
    smooth = but(but(options, "run", output=tmp_path / "smooth"), "objective", label_smoothing=0.4)
    finetune(smooth, progress=False)
    last = untimed(smooth)[-1]
    assert last["loss"] > -0.6 * math.log(0.6) - 0.4 * math.log(0.4) - 1e-6  # the least that smoothed pairs cost


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dpo_beta": 0.1}, r"dpo_beta: expected none with objective sft, found 0\.1"),
        ({"label_smoothing": 0.1}, r"label_smoothing: expected none with objective sft, found 0\.1"),
        ({"objective": "dpo", "dpo_beta": 0.0}, r"dpo_beta: expected a number above 0, found 0\.0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, r"label_smoothing: expected 0 to below 0\.5, found 0\.5"),
        ({"objective": "ppo"}, f"objective: expected one of {NAMES}, found 'ppo'"),
    ],
)
def test_options_that_mean_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**fields)


def test_flags(tmp_path: Path) -> None:
    flags = ["--objective", "dpo", "--dpo-beta", "0.3", "--label-smoothing", "0.2", "--no-packing"]
    options = parse(Options, description=None, arguments=flags)
    assert options.objective == ObjectiveOptions(objective="dpo", dpo_beta=0.3, label_smoothing=0.2)
    assert options.data.packing is False
    assert parse(Options, description=None, arguments=["--packing"]).data.packing is True
    assert parse(Options, description=None, arguments=["--packing", "False"]).data.packing is False
    assert parse(Options, description=None, arguments=[]).data.packing is None
    config = tmp_path / "dpo.toml"
    config.write_text('[objective]\nobjective = "dpo"\ndpo_beta = 0.3\nlabel_smoothing = 0.2\n[data]\npacking = false\n')
    assert parse(Options, description=None, arguments=["--config", str(config)]) == options


def test_the_objective_is_named_beside_an_option_that_means_nothing() -> None:
    given = Options(run=RunOptions(predict_with_generate=True))
    for kind, where in ((SFT, "a decoder-only model"), (dataclasses.replace(SFT, name="focal"), "objective focal")):
        with pytest.raises(OptionError, match=f"predict_with_generate: expected False with {where}, found True"):
            kind.check(given)
