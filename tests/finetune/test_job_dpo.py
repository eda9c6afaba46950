"""Preference optimisation in the main job: what it records, what it starts from, and what it refuses.

References: log 2 of an untrained pair; TRL's formula on log probabilities that are computed here from the logits of models
loaded with either adapter; PEFT's files.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowered import BOTH_PRECOMPILED, steps_lowered

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import read_adapter, write_adapter
from qlora_jax.adapters.names import tensor_name
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse, run
from qlora_jax.finetune import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    Options,
    RunOptions,
    finetune,
    training,
)
from qlora_jax.finetune import job as job_module
from qlora_jax.peft import LoRA

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Polite answers are chosen, rude ones rejected."""
    rows = [{"prompt": f"{n}?", "chosen": "please " * (1 + n % 3), "rejected": "no! " * (1 + n % 2)} for n in range(20)]
    return write(tmp_path_factory.mktemp("pairs"), rows)


@pytest.fixture
def options(tiny_llama: Path, pairs: str, tmp_path: Path) -> Options:
    return Options(
        ModelOptions(model=str(tiny_llama)),
        LoRAOptions(rank=4, alpha=8.0),
        DataOptions(data=pairs, max_length=64, held_out=0.2),
        OptimizerOptions(learning_rate=5e-3, warmup_ratio=0.0),
        RunOptions(output=tmp_path / "run", max_steps=6, epochs=10, eval_every=3, save_every=2, samples=0, batch_size=4),
        ObjectiveOptions(objective="dpo"),
    )


def but(options: Options, group: str, **fields: Any) -> Options:
    return dataclasses.replace(options, **{group: dataclasses.replace(getattr(options, group), **fields)})


def rows_of(options: Options) -> list[dict[str, Any]]:
    lines = (options.run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timing = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in json.loads(line).items() if name not in timing} for line in lines]


def test_it_learns_to_prefer(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    with steps_lowered() as steps:
        folder = finetune(but(options, "run", samples=1), progress=False)
    assert steps == BOTH_PRECOMPILED
    before, *rows = rows_of(options)
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
    assert read_adapter(folder).method.rank == 4
    shown = capsys.readouterr()
    assert "20 of 20 pairs kept" in shown.err
    assert "steps of 4 × 2 × 64 tokens" in shown.err
    assert "Held-out loss 0.693 before" in shown.err
    assert "perplexity" not in shown.err
    assert "before" in shown.out


def test_it_resumes(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = but(options, "run", output=tmp_path / "whole")
    finetune(whole, progress=False)
    evaluate = training.mean_metrics

    def killed(step: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if int(state.step) == 3:
            raise KeyboardInterrupt
        return evaluate(step, state, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "mean_metrics", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(options, progress=False)
    assert [row["step"] for row in rows_of(options)] == [0, 1, 2]
    finetune(options, progress=False)
    assert rows_of(options) == rows_of(whole)


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


def test_it_goes_on_from_an_adapter_which_is_the_reference(options: Options, tmp_path: Path) -> None:
    """Its first step costs log 2, whatever the adapter has learned before; the rewards after it are against that adapter."""
    first = but(options, "run", output=tmp_path / "first", eval_every=0)
    start = finetune(first, progress=False)
    second = but(but(options, "model", adapter=str(start)), "run", output=tmp_path / "second", eval_every=0)
    second = dataclasses.replace(second, lora=LoRAOptions())
    folder = finetune(second, progress=False)
    before, *rows = rows_of(second)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.1
    found = read_adapter(folder)
    assert (found.method.rank, found.method.alpha) == (4, 8.0)
    old = read_adapter(start).tensors
    assert 0 < max(np.abs(found.tensors[name] - tensor).max() for name, tensor in old.items()) < 0.2

    corpus: Any = {}
    objective = job_module.DECODER_OBJECTIVES["dpo"]

    def keep(setting: Any) -> Any:
        corpus["objective"] = objective(setting)
        return corpus["objective"]

    third = but(second, "run", output=tmp_path / "third", overwrite=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(job_module.DECODER_OBJECTIVES, "dpo", keep)
        patch.setattr(job_module, "_load", lambda *arguments: pytest.fail("loaded"))
        with pytest.raises(pytest.fail.Exception):
            finetune(third, progress=False)
    (batch,) = corpus["objective"].held_out(4)
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


def test_answers_can_be_learned_from_an_adapter_too(options: Options, tmp_path: Path) -> None:
    """The first loss of the second run is the last held-out loss of the first one, on the same data."""
    row = write(tmp_path, [{"question": f"{n}?", "answer": "red"} for n in range(8)], "answers.jsonl")
    first = dataclasses.replace(but(options, "run", batch_size=2), objective=ObjectiveOptions())
    first = but(first, "data", data=row, eval_data=row, held_out=0.0)
    start = finetune(first, progress=False)
    second = but(but(first, "model", adapter=str(start)), "run", output=tmp_path / "second")
    second = dataclasses.replace(second, lora=LoRAOptions(dropout=0.1))
    finetune(second, progress=False)
    assert rows_of(second)[0]["eval_loss"] == pytest.approx(rows_of(first)[-1]["eval_loss"], abs=1e-6)
    assert rows_of(first)[-1]["eval_loss"] < 0.9 * rows_of(first)[0]["eval_loss"]


def test_beta_and_smoothing_reach_the_loss(options: Options, tmp_path: Path) -> None:
    """The same first update; the rewards of the second step are beta times the same ratios."""
    rewards = {}
    for beta in (0.1, 0.2):
        one = but(but(options, "run", output=tmp_path / f"{beta}", max_steps=2, eval_every=0), "objective", dpo_beta=beta)
        finetune(one, progress=False)
        rewards[beta] = rows_of(one)[-1]["rewards/chosen"]
    assert abs(rewards[0.1]) > 0.01
    assert rewards[0.2] == pytest.approx(2 * rewards[0.1], rel=1e-2)
    smooth = but(but(options, "run", output=tmp_path / "smooth"), "objective", label_smoothing=0.4)
    finetune(smooth, progress=False)
    last = rows_of(smooth)[-1]
    assert last["loss"] > -0.6 * math.log(0.6) - 0.4 * math.log(0.4) - 1e-6  # the least that smoothed pairs cost


def another_adapter(folder: Path) -> str:
    tensors = {
        tensor_name("lm.q_proj", suffix): np.ones(shape, np.float32)
        for suffix, shape in zip(LoRA().suffixes, ((4, 8), (8, 4)), strict=True)
    }
    return str(write_adapter(tensors, folder / "other", method=LoRA(rank=4, target_modules=("q_proj",))))


ANSWER = [{"question": "1?", "answer": "red"}] * 3
BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "equal answers": (
        lambda folder: ["--data", write(folder, [{"prompt": "1?", "chosen": "a", "rejected": "a"}])],
        "row 0 (counted from 0): expected two different answers, chosen and rejected, found equal ones",
    ),
    "no pairs": (lambda folder: ["--data", write(folder, ANSWER)], "expected the columns chosen and rejected, found"),
    "no difference within the length": (
        lambda folder: ["--max-length", "4"],
        "preference pairs: expected at least one, found none",
    ),
    "pairs for answers": (lambda folder: ["--objective", "sft"], "found two; --objective dpo learns from pairs"),
    "sources": (lambda folder: ["--train-on-source"], "train_on_source: expected False with objective dpo, found True"),
    "packing": (lambda folder: ["--packing"], "packing: expected off with objective dpo, found on"),
    "rank beside an adapter": (
        lambda folder: ["--adapter", str(folder), "--rank", "4"],
        "adapter: has its own shape: expected no rank beside it, found some",
    ),
    "an adapter of another model": (
        lambda folder: ["--adapter", another_adapter(folder)],
        "this adapter does not fit this model",
    ),
    "no adapter": (lambda folder: ["--adapter", str(folder)], "is no adapter: it has no adapter_config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = BAD[case]
    monkeypatch.setattr(job_module, "_load", lambda *arguments: pytest.fail("loaded"))
    flags = ["--model", str(options.model.model), "--data", str(options.data.data), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--objective", "dpo", *make(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        run(finetune, Options, "")
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert expected in error[error.index("error: ") :]
    assert not (tmp_path / "run").exists()


def test_pairs_need_data(options: Options) -> None:
    with pytest.raises(ValueError, match=r"data: expected preference pairs \(chosen, rejected\) .*, found none"):
        finetune(but(options, "data", data=None), progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dpo_beta": 0.1}, r"dpo_beta: expected none with objective sft, found 0\.1"),
        ({"label_smoothing": 0.1}, r"label_smoothing: expected none with objective sft, found 0\.1"),
        ({"objective": "dpo", "dpo_beta": 0.0}, r"dpo_beta: expected a number above 0, found 0\.0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, r"label_smoothing: expected 0 to below 0\.5, found 0\.5"),
        ({"objective": "ppo"}, "objective: expected one of sft, dpo, found 'ppo'"),
    ],
)
def test_options_that_mean_nothing(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectiveOptions(**fields)


def test_flags(tmp_path: Path) -> None:
    flags = ["--objective", "dpo", "--dpo-beta", "0.3", "--label-smoothing", "0.2", "--no-packing"]
    options = parse(Options, description=None, arguments=flags)
    assert options.objective == ObjectiveOptions("dpo", 0.3, 0.2)
    assert options.data.packing is False
    assert parse(Options, description=None, arguments=["--packing"]).data.packing is True
    assert parse(Options, description=None, arguments=["--packing", "False"]).data.packing is False
    assert parse(Options, description=None, arguments=[]).data.packing is None
    config = tmp_path / "dpo.toml"
    config.write_text('[objective]\nobjective = "dpo"\ndpo_beta = 0.3\nlabel_smoothing = 0.2\n[data]\npacking = false\n')
    assert parse(Options, description=None, arguments=["--config", str(config)]) == options
