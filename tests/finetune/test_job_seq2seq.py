"""The main job on a tiny random T5: it learns targets from sources, measures RougeL, resumes, and its adapter serves.

References: greedy answers and RougeL computed here, word by word from whole forward passes; an uninterrupted run, bit for
bit; PEFT's fields.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lowered import BOTH_PRECOMPILED
from rouge_score.rouge_scorer import RougeScorer
from runs import FinishedRun, but, rows_of, without_timing

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.commands import generate, merge
from qlora_jax.finetune import Options, finetune, training


@pytest.fixture
def options(seq2seq_options: Options, tmp_path: Path) -> Options:
    return but(seq2seq_options, "run", output=tmp_path / "run")


def untimed(options: Options) -> list[dict[str, Any]]:
    return without_timing(rows_of(options.run.output))


def greedy(model: Any, sources: list[list[int]], most: int) -> list[list[int]]:
    """The likeliest word after the other, each by a whole forward pass; the sources have one length."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda state, source, inputs: nnx.merge(graph, state)(source, inputs))
    inputs = np.zeros((len(sources), most + 1), np.int32)
    for place in range(most):
        logits = np.asarray(forward(state, np.array(sources, np.int32), inputs))
        inputs[:, place + 1] = logits[:, place].argmax(-1)
    rows = inputs[:, 1:].tolist()
    return [row[: row.index(1)] if 1 in row else row for row in rows]


@pytest.mark.integration
def test_it_learns_and_serves(finished_seq2seq: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in one piece, its files, and what generation and merging make of them."""
    options, folder = finished_seq2seq.options, finished_seq2seq.folder
    assert finished_seq2seq.steps == BOTH_PRECOMPILED
    rows = finished_seq2seq.rows
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 12, 24]
    assert not any("eval_rougeL" in row for row in rows)
    assert rows[-1]["eval_loss"] < 0.5 * rows[0]["eval_loss"]
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.4 * rows[1]["loss"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert len(read_adapter(folder).tensors) == 2 * (2 * 6 + 2 * 10)  # A and B of six and ten linear layers a block
    assert "24 of 24 rows kept as pairs of source and target: plain" in finished_seq2seq.errors
    assert "6 × 64 source and 64 target tokens" in finished_seq2seq.errors
    assert "Held-out rougeL" in finished_seq2seq.errors
    assert "Prompt: what colour is" in finished_seq2seq.out

    results = json.loads((options.run.output / "eval_results.json").read_text())
    assert results["eval_loss"] == rows[-1]["eval_loss"]
    checkpoint, tokenizer = open_checkpoint(str(options.model.model)), load_tokenizer(str(options.model.model))
    model = load_model(checkpoint, method=read_adapter_method(folder), dtype=jnp.float32, progress=False)
    model = load_adapter(model, folder)
    data = [json.loads(line) for line in Path(str(options.data.data)).read_text().splitlines()]
    out = set(np.random.default_rng(0).permutation(24)[:6].tolist())
    held_out = [row for index, row in enumerate(data) if index in out]
    sources: Any = [tokenizer(row["input"])["input_ids"] for row in held_out]
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in greedy(model, sources, 8)]
    answers = dict(zip((row["input"] for row in held_out), texts, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(row["output"], answers[row["input"]])["rougeL"].fmeasure for row in held_out]
    assert results["eval_rougeL"] == pytest.approx(100 * np.mean(scores))
    assert results["eval_rougeL"] > 60

    question = next(iter(answers))
    tuned = ["--model", str(options.model.model), "--adapter", str(folder)]
    assert generate.main([*tuned, "--prompt", question]) == 0
    assert capsys.readouterr().out.strip() == answers[question].strip()
    merged = tmp_path / "merged"
    assert merge.main([*tuned, "--output", str(merged), "--base", "dequantized", "--dtype", "float32"]) == 0
    assert "the same most likely token at 100.0% of positions" in capsys.readouterr().out
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]


@pytest.mark.integration
def test_it_resumes_and_stops_early_and_measures_rouge_on_the_way(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The losses are those of a run in one piece; without a lower held-out loss after step 2 it ends at step 6."""
    run_ = {"max_steps": 10, "eval_every": 2, "save_every": 1, "early_stopping_patience": 2, "predict_with_generate": True}
    options = but(options, "run", **run_)
    evaluate, made_up = training.mean_metrics, {0: 9.0, 2: 1.0, 4: 2.0, 6: 2.0}
    kill = True

    def measured(step: Any, state: Any, *rest: Any, **more: Any) -> dict[str, float]:
        number = int(state.step)
        if kill and number == 4:
            raise KeyboardInterrupt
        return evaluate(step, state, *rest, **more) | {"loss": made_up[number]}

    monkeypatch.setattr(training, "mean_metrics", measured)
    with pytest.raises(KeyboardInterrupt):
        finetune(options, progress=False)
    assert [row["step"] for row in untimed(options)] == [0, 1, 2, 3]
    kill = False
    finetune(options, progress=False)
    whole = but(options, "run", output=tmp_path / "whole")
    finetune(whole, progress=False)
    rows = untimed(options)
    assert rows == untimed(whole)
    assert [row["step"] for row in rows if "eval_rougeL" in row] == [0, 2, 4, 6]
    assert "The adapter is that of step 2" in capsys.readouterr().err
    results = json.loads((whole.run.output / "eval_results.json").read_text())
    assert results == {name: rows[2][name] for name in ("step", "eval_loss", "eval_mean_token_accuracy", "eval_rougeL")}
    assert results["eval_loss"] == 1.0


@pytest.mark.integration
@pytest.mark.parametrize("name", ["adamw8bit", "lion", "adafactor"])
def test_each_optimizer(options: Options, name: Any) -> None:
    one = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    folder = finetune(but(one, "optimizer", optimizer=name, host_offload=True, host_adapter=True), progress=False)
    assert all(np.abs(tensor).max() > 0 for tensor in read_adapter(folder).tensors.values())
    assert not (options.run.output / "eval_results.json").exists()
