"""What the tests of runs share: small data sets, options of short runs on tiny models, and finished runs of each objective.

A finished run is made once a session, and serves every test that only reads what a run leaves.
"""

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from lowered import steps_lowered
from runs import FinishedRun, but
from tiny_t5 import write_tiny_t5

from qlora_jax.finetune import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizerOptions,
    Options,
    RunOptions,
    finetune,
)

COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 questions with an answer."""
    rows = [{"question": f"{number}?", "answer": COLOURS[number % 8] * (1 + number % 3)} for number in range(24)]
    return write(tmp_path_factory.mktemp("data") / "colours.jsonl", rows)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """20 preference pairs: polite answers are chosen, rude ones rejected."""
    rows = [{"prompt": f"{n}?", "chosen": "please " * (1 + n % 3), "rejected": "no! " * (1 + n % 2)} for n in range(20)]
    return write(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random T5 v1.0 with a tokenizer whose tokens are words."""
    return write_tiny_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def sft_options(tiny_llama: Path, colours: str) -> Options:
    """A run of three steps on answers; its output folder is still to be chosen."""
    return Options(
        model=ModelOptions(model=str(tiny_llama)),
        lora=LoRAOptions(rank=4, alpha=8.0),
        data=DataOptions(data=colours, max_length=64, held_out=0.2),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        run=RunOptions(max_steps=3, eval_every=2, save_every=2, samples=0),
    )


@pytest.fixture(scope="session")
def dpo_options(tiny_llama: Path, pairs: str) -> Options:
    """A run of six steps on preference pairs."""
    return Options(
        ModelOptions(model=str(tiny_llama)),
        LoRAOptions(rank=4, alpha=8.0),
        DataOptions(data=pairs, max_length=64, held_out=0.2),
        OptimizerOptions(learning_rate=5e-3, warmup_ratio=0.0),
        RunOptions(max_steps=6, epochs=10, eval_every=3, save_every=2, samples=0, batch_size=4),
        ObjectiveOptions(objective="dpo"),
    )


@pytest.fixture(scope="session")
def seq2seq_options(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """A run of 24 steps on pairs of source and target."""
    rows = [{"input": f"what colour is {n} ?", "output": f"it is {COLOURS[n % 4]}"} for n in range(24)]
    return Options(
        ModelOptions(model=str(tiny_t5)),
        LoRAOptions(rank=8, alpha=16.0),
        DataOptions(data=write(tmp_path_factory.mktemp("data") / "targets.jsonl", rows), max_length=16, held_out=0.25),
        OptimizerOptions(learning_rate=1e-2, warmup_ratio=0.0),
        RunOptions(max_steps=24, epochs=20, batch_size=6, eval_every=12, save_every=8, samples=0),
    )


@pytest.fixture
def options(sft_options: Options, tmp_path: Path) -> Options:
    """The run on answers with a folder of this test."""
    return but(sft_options, "run", output=tmp_path / "run")


@pytest.fixture(scope="session")
def finished_sft(sft_options: Options, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run on answers, with samples."""
    return finish_run(sft_options, tmp_path_factory.mktemp("sft") / "run")


@pytest.fixture(scope="session")
def finished_dpo(dpo_options: Options, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run on preference pairs, with samples."""
    return finish_run(dpo_options, tmp_path_factory.mktemp("dpo") / "run")


@pytest.fixture(scope="session")
def finished_seq2seq(seq2seq_options: Options, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A finished run on pairs of source and target, with samples."""
    return finish_run(seq2seq_options, tmp_path_factory.mktemp("seq2seq") / "run")


def finish_run(options: Options, output: Path) -> FinishedRun:
    options = dataclasses.replace(options, run=dataclasses.replace(options.run, output=output, samples=1))
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors), steps_lowered() as steps:
        folder = finetune(options, progress=False)
    return FinishedRun(options, folder, out.getvalue(), errors.getvalue(), steps)
