"""The main job on a stream: it trains on what is not held out, and a run that was stopped goes on exactly."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import DataError
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, OptimizerOptions, Options, RunOptions, finetune
from qlora_jax.finetune.objectives.objective import Objective, Setting
from qlora_jax.finetune.objectives.sft import SFT

ROWS = 30


@pytest.fixture
def options(tiny_llama: Path, tmp_path: Path) -> Options:
    data = tmp_path / "rows.jsonl"
    rows = [{"question": f"{number:02}?", "answer": f"answer {number:02}"} for number in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Options(
        ModelOptions(model=str(tiny_llama)),
        LoRAOptions(rank=2),
        DataOptions(data=str(data), max_length=96, streaming=True, shuffle_buffer=8, held_out_rows=4),
        OptimizerOptions(learning_rate=1e-2),
        RunOptions(output=tmp_path / "run", max_steps=8, eval_every=0, save_every=1, keep=9, samples=0),
    )


def losses(output: Path) -> list[tuple[int, float, int]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["step"], row["loss"], row["learned_tokens"]) for row in rows if "loss" in row]


def objective_of(options: Options, folder: Path) -> Objective:
    config = open_checkpoint(str(folder)).model_config
    return SFT.read(Setting(options, load_tokenizer(folder), config, frozenset(), progress=False))


def test_the_first_rows_are_held_out_and_the_others_are_trained_on(
    options: Options, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlora_jax")
    tokenizer, objective = load_tokenizer(tiny_llama), objective_of(options, tiny_llama)
    assert objective.held_out is not None
    held_out = "".join(text for batch in objective.held_out(2) for text in tokenizer.batch_decode(batch["inputs"].tolist()))
    assert [held_out.count(f"{number:02}?") for number in range(ROWS)] == [1] * 4 + [0] * 26
    assert "held out are the first rows: 4 of 4 rows kept" in caplog.messages[0]
    source, seen = objective.training(2), ""
    while source.get_state().get("pass", 1) == 0:
        seen += "".join(tokenizer.batch_decode(next(source)["inputs"].tolist()))
    assert [seen.count(f"{number:02}?") > 0 for number in range(ROWS)] == [False] * 4 + [True] * 26


@pytest.mark.integration
def test_a_stopped_run_goes_on_as_if_it_had_not_been(options: Options, tmp_path: Path) -> None:
    """Stopped within a buffer; it goes on to the end of the data, seven steps, and begins anew."""
    whole = dataclasses.replace(options, run=dataclasses.replace(options.run, output=tmp_path / "whole"))
    finetune(whole, progress=False)
    finetune(options, progress=False)
    shutil.rmtree(options.run.output / "adapter")
    for step in range(4, 9):
        shutil.rmtree(options.run.output / "checkpoints" / str(step))
    finetune(options, progress=False)
    assert len(losses(whole.run.output)) == 8
    assert losses(options.run.output) == losses(whole.run.output)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, r"streaming: expected one source of data, found 0"),
        ({"data": ("a.jsonl", "b.jsonl")}, r"streaming: expected one source of data, found 2"),
        ({"data": "alpaca"}, r"streaming: expected a file or a hub id, found 'alpaca', which is read whole"),
        ({"data": "a.jsonl", "held_out": 0.5}, r"held_out: expected held_out_rows with streaming, found 0\.5"),
        ({"data": "a.jsonl", "show_examples": 2}, r"show_examples: expected none with streaming, found 2"),
        ({"data": "a.jsonl", "shuffle_buffer": 0}, r"shuffle_buffer: expected at least 1, found 0"),
        ({"streaming": False, "held_out_rows": 5}, r"held_out_rows: expected streaming beside it, found 5 alone"),
        ({"streaming": False, "shuffle_buffer": 5}, r"shuffle_buffer: expected streaming beside it, found 5 alone"),
    ],
)
def test_options_that_mean_nothing(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        DataOptions(**({"streaming": True} | fields))


def test_a_stream_needs_a_number_of_steps(options: Options) -> None:
    for change, expected in (
        ({"max_steps": None}, "expected max_steps beside it"),
        ({"epochs": 3}, "expected max_steps alone"),
    ):
        with pytest.raises(ValueError, match=expected):
            dataclasses.replace(options, run=dataclasses.replace(options.run, **change)).check()


def test_a_stream_of_nothing_but_held_out_rows(options: Options, tiny_llama: Path) -> None:
    short = dataclasses.replace(options, data=dataclasses.replace(options.data, held_out_rows=ROWS))
    with pytest.raises(ValueError, match=r"expected rows beyond those held out \(held_out_rows 30\), found none"):
        objective_of(short, tiny_llama)


def but(options: Options, rows: list[dict[str, Any]], **fields: Any) -> Options:
    """The options with other rows, and `fields` of the data."""
    Path(str(options.data.data)).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return dataclasses.replace(options, data=dataclasses.replace(options.data, **fields))


@pytest.mark.parametrize("held_out_rows", [0, 1])
def test_message_trees_are_refused(options: Options, tiny_llama: Path, held_out_rows: int) -> None:
    tree = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "1?"},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "1"},
    ]
    trees = but(options, tree, held_out_rows=held_out_rows)
    with pytest.raises(
        DataError, match=r"rows\.jsonl: streaming: expected rows that stand alone, found message trees \(col"
    ):
        objective_of(trees, tiny_llama)


GOOD = {"question": "1?", "answer": "one"}


@pytest.mark.parametrize(("place", "held_out_rows"), [(0, 4), (5, 4), (110, 4), (110, 0)])
def test_a_bad_row_is_named_with_its_file(options: Options, tiny_llama: Path, place: int, held_out_rows: int) -> None:
    """Among those held out, among those looked at before the run, and while it trains."""
    bad = [GOOD] * place + [{"question": "1?", "reply": "x"}] + [GOOD] * 3
    rows = but(options, bad, held_out_rows=held_out_rows, on_bad_row="error")

    def train() -> None:
        source = objective_of(rows, tiny_llama).training(2)
        for _ in range(200):
            next(source)

    with pytest.raises(DataError, match=rf"^{options.data.data}, row {place} \(counted from 0\): "):
        train()


@pytest.mark.parametrize("held_out_rows", [0, 2])
def test_a_line_that_is_no_json_is_left_out(
    options: Options, tiny_llama: Path, held_out_rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "qlora_jax")
    path = Path(str(options.data.data))
    good = json.dumps(GOOD) + "\n"
    late = good.replace("}", ', "more": {"a": [1, "x"]}}')  # a column that the first rows lack
    options = but(options, [], held_out_rows=held_out_rows, shuffle_buffer=50)
    path.write_text(good + '{"question": \n' + good * 120 + '["a"]\n' + late * 20, encoding="utf-8")
    source = objective_of(options, tiny_llama).training(2)
    while not any("at the end of the rows" in message for message in caplog.messages):
        next(source)
    place = "rows.jsonl, line 2, column 14: expected one JSON object a line"
    assert sum(place in message for message in caplog.messages) == (1 if held_out_rows else 2)
    assert "line 123: expected a JSON object, found list ['a']" in caplog.messages[-1]
    assert "not used: more" in caplog.messages[-1]
    path.write_text(good * 3 + '{"question": \n' * 3, encoding="utf-8")
    with pytest.raises(DataError, match=rf"^{path}, 3 of [46] rows cannot be used, more than one in ten"):
        objective_of(options, tiny_llama)


def test_bad_rows_at_the_start_are_judged_with_more_rows(options: Options, tiny_llama: Path) -> None:
    bad = {"question": "1?"}
    many = but(options, [bad] * 50 + [GOOD] * 500, held_out_rows=0)
    assert objective_of(many, tiny_llama).template == "chat"
    with pytest.raises(DataError, match="60 of 550 rows cannot be used, more than one in ten"):
        objective_of(but(options, [bad] * 60 + [GOOD] * 490, held_out_rows=0), tiny_llama)


def test_rows_that_teach_nothing_are_told(options: Options, tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora_jax")
    empty = {"question": "2?", "answer": ""}
    rows = but(options, [GOOD] * 9 + [empty] * 10, held_out_rows=1, shuffle_buffer=8)
    source = objective_of(rows, tiny_llama).training(2)
    caplog.clear()
    while len(caplog.messages) < 5:
        next(source)
    path = str(options.data.data)
    assert [text.split(" kept")[0] for text in caplog.messages] == [
        f"{path}, rows 9 to 16 (counted from 0): 0 of 8 rows",
        f"{path}, rows 17 to 18 (counted from 0): 0 of 2 rows",
        f"{path}: at the end of the rows to train on: 8 of 18 rows",
        *(f"{path}, rows {rows} (counted from 0): 0 of {count} rows" for rows, count in (("9 to 16", 8), ("17 to 18", 2))),
        f"{path}: at the end of the rows to train on: 8 of 18 rows",
    ][: len(caplog.messages)]
