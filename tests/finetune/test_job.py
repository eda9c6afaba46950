"""The main job on a tiny random Llama: what it leaves behind, that a kill costs nothing, and one line for what is wrong.

References: an uninterrupted run, bit for bit; the files read back; the text and the exit code of the real command.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, read_adapter_metadata
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.cli import parse, run
from qlora_jax.data import Example, encode_all
from qlora_jax.finetune import (
    DataOptions,
    LoRAOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    RunOptions,
    finetune,
    training,
)
from qlora_jax.finetune import job as job_module
from qlora_jax.finetune.objectives.corpus import Corpus, read_corpus
from qlora_jax.quant import Quantization

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"
COLOURS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"question": f"{number}?", "answer": COLOURS[number % 8] * (1 + number % 3)} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def options(tiny_llama: Path, data: Path, tmp_path: Path) -> Options:
    return Options(
        model=ModelOptions(model=str(tiny_llama)),
        lora=LoRAOptions(rank=4, alpha=8.0),
        data=DataOptions(data=str(data), max_length=64, held_out=0.2),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        run=RunOptions(output=tmp_path / "run", max_steps=3, eval_every=2, save_every=2, samples=0),
    )


def but(options: Options, group: str, **fields: Any) -> Options:
    return dataclasses.replace(options, **{group: dataclasses.replace(getattr(options, group), **fields)})


def rows_of(output: Path) -> list[dict[str, Any]]:
    """The rows that are whole; a kill may cut the last."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# What a run is


def test_packed_tables_in_a_run(options: Options) -> None:
    """They train rows, lower the loss, and are in the record and on the card."""
    packed = but(but(options, "model", embedding_storage="nf4"), "lora", trainable_token_indices=(5, 6))
    folder = finetune(but(packed, "run", eval_every=3), progress=False)
    assert read_adapter_metadata(folder) == AdapterMetadata(Quantization(), "chat", "nf4")
    assert "its token table and head in NF4" in (folder / "README.md").read_text(encoding="utf-8")
    before, *_, after = rows_of(options.run.output)
    assert after["eval_loss"] < before["eval_loss"]


def test_what_a_run_leaves(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    output = options.run.output
    folder = finetune(but(options, "run", samples=1), progress=False)
    assert folder == output / "adapter"
    adapter = read_adapter(folder)
    assert (adapter.method.rank, adapter.method.alpha, adapter.base) == (4, 8.0, options.model.model)
    assert read_adapter_metadata(folder) == AdapterMetadata(Quantization(), "chat")
    assert len(adapter.tensors) == 2 * 7 * 2  # A and B, seven layers, two blocks
    assert all(np.abs(tensor).max() > 0 for tensor in adapter.tensors.values())
    rows = rows_of(output)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 3]
    for row in rows[1:]:
        assert row.keys() >= {"loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes"}
        assert row["loss"] > 0
        assert row["tokens_per_second"] > 0
        assert row["learned_tokens"] > 0
    assert imread(output / "loss.png").ndim == 3
    record = json.loads((output / "options.json").read_text(encoding="utf-8"))
    assert record["lora"]["rank"] == 4
    assert record["data"]["data"] == options.data.data
    shown = capsys.readouterr()
    assert "before" in shown.out
    assert "after" in shown.out
    assert "Held-out loss" in shown.err


def test_new_special_tokens_are_trained_saved_and_used(options: Options, tmp_path: Path) -> None:
    """Patterns and a saved module beside them; asked and merged by the scripts, in processes of their own."""
    folder = finetune(
        but(
            options,
            "lora",
            special_tokens=("<|a|>", "<|b|>"),
            rank_pattern={r"layers\.1\..*": 2},
            alpha_pattern={"q_proj": 3.0},
            layers_to_transform=(0, 1),
            modules_to_save=("model.norm",),
        ),
        progress=False,
    )
    size = len(load_tokenizer(str(options.model.model)))
    tokenizer, adapter = load_tokenizer(folder), read_adapter(folder)
    assert tokenizer.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [size, size + 1]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert adapter.method.trainable_token_indices == (size, size + 1)
    assert adapter.method.scaling_of("model.layers.1.self_attn.q_proj") == 1.5
    ranks = {name.split(".")[4]: tensor.shape[0] for name, tensor in adapter.tensors.items() if "lora_A" in name}
    assert ranks == {"0": 4, "1": 2}
    table = open_checkpoint(str(options.model.model)).read("model.embed_tokens.weight")
    rows = adapter.tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert rows.shape == (2, 64)
    assert 1e-4 < np.abs(rows - table.mean(0)).max() < 0.1  # a tied head pushes down what is never the answer

    script, model = SCRIPT.parent, ["--model", str(options.model.model), "--adapter", str(folder)]
    asked = [sys.executable, str(script / "generate.py"), *model, "--prompt", "1<|a|>?", "--max-new-tokens", "2"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged = [sys.executable, str(script / "merge.py"), *model, "--output", str(tmp_path / "merged"), "--no-compare"]
    done = subprocess.run(merged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = open_checkpoint(str(tmp_path / "merged"))
    assert result.config["vocab_size"] == size + 2
    merged_rows = result.read("model.embed_tokens.weight")[size:]
    np.testing.assert_allclose(merged_rows.astype(np.float32), rows, rtol=0.01, atol=1e-3)
    assert len(load_tokenizer(tmp_path / "merged")) == size + 2


def test_new_special_tokens_of_whole_tables_are_saved_and_used(options: Options, tmp_path: Path) -> None:
    """And another run goes on from them, with their tokenizer, and the table and head of a base that PEFT had resized."""
    whole = but(options, "lora", special_tokens=("<|a|>",), modules_to_save=("embed_tokens", "lm_head"))
    first = finetune(whole, progress=False)
    file, size = first / "adapter_model.safetensors", len(load_tokenizer(str(options.model.model)))
    both = [f"base_model.model.{name}.original_module.weight" for name in ("model.embed_tokens", "lm_head")]
    base = np.random.default_rng(1).normal(size=(size + 1, 64)).astype(np.float32)
    save_file(load_file(file) | dict.fromkeys(both, base), file)
    further = but(dataclasses.replace(options, lora=LoRAOptions()), "model", adapter=str(first))
    further = but(further, "run", output=tmp_path / "further", max_steps=1)
    second = finetune(further, progress=False)
    for folder in (first, second):
        assert load_tokenizer(folder).convert_tokens_to_ids("<|a|>") == size
        assert read_adapter(folder).tensors["base_model.model.lm_head.weight"].shape == (size + 1, 64)
    opened = open_pretrained(options.model.model, str(second))
    assert opened.checkpoint.config["vocab_size"] == len(opened.tokenizer) == size + 1
    opened.load(progress=False)
    assert sorted(read_adapter(second).resized_embeddings) == sorted(both)
    np.testing.assert_array_equal(opened.checkpoint.read("model.embed_tokens.weight"), base)


def test_it_learns_what_it_sees(options: Options) -> None:
    """A set small enough to memorise: the loss of random bytes falls to less than a third."""
    longer = but(but(options, "run", max_steps=60, epochs=100, eval_every=0, save_every=0), "data", held_out=0.0)
    finetune(but(longer, "lora", rank=16, alpha=32.0), progress=False)
    losses = [row["loss"] for row in rows_of(options.run.output) if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) / 3


@pytest.mark.parametrize("name", ["adamw8bit", "lion", "adafactor"])
def test_each_optimizer(options: Options, name: Any) -> None:
    """A step of each moves the adapter, with its state in host memory."""
    one = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    folder = finetune(
        but(one, "optimizer", optimizer=name, host_offload=True, host_adapter=name == "lion", weight_decay=0.1),
        progress=False,
    )
    assert all(np.abs(tensor).max() > 0 for tensor in read_adapter(folder).tensors.values())


def test_neftune_changes_training_and_not_evaluation(options: Options, tmp_path: Path) -> None:
    rows = {}
    for alpha in (0.0, 5.0):
        noisy = but(but(options, "optimizer", neftune_alpha=alpha), "run", max_steps=1, output=tmp_path / str(alpha))
        finetune(noisy, progress=False)
        rows[alpha] = rows_of(noisy.run.output)
    assert rows[0.0][0]["eval_loss"] == rows[5.0][0]["eval_loss"]
    assert rows[0.0][1]["loss"] != rows[5.0][1]["loss"]


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

    for kill_at in (4, 6, 8):  # at every second step is an evaluation
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


@pytest.mark.parametrize("packing", [True, False])
def test_a_killed_run_goes_on_as_if_it_had_not_been(options: Options, tmp_path: Path, packing: bool) -> None:
    """SIGKILL at a random step, then the same command: every loss is that of a run in one piece."""
    flags = ["--config", str(write_config(options, tmp_path, packing))]
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


def without_timing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timing = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in row.items() if name not in timing} for row in rows]


def write_config(options: Options, folder: Path, packing: bool) -> Path:
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
        packing = {"true" if packing else "false"}
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


def start(flags: list[str], output: Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags, "--output", str(output)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until the step's row is written; it polls often, since steps take milliseconds."""
    metrics = output / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") <= step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_the_step_that_it_is_in(options: Options, tmp_path: Path, number: signal.Signals) -> None:
    flags = ["--config", str(write_config(options, tmp_path, True)), "--save-every", "0", "--max-steps", "2000"]
    output = tmp_path / "run"
    with start(flags, output) as process:
        wait_for_step(output, 3, process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=500)
    assert process.returncode == 130, errors
    last = rows_of(output)[-1]["step"]
    assert errors.splitlines()[-1] == f"interrupted: stopped after step {last}, which is saved"
    assert [path.name for path in (output / "checkpoints").iterdir()] == [str(last)]


# What it learns from


def colours(folder: Path, name: str, colour: str, count: int) -> str:
    rows = [{"question": f"{colour} {number}?", "answer": f"{colour} {number}"} for number in range(count)]
    return write(folder, "".join(json.dumps(row) + "\n" for row in rows), name)


def test_several_sources_with_weights(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags and TOML alike; no held-out row is in the training data, whatever is repeated there."""
    few, many = colours(tmp_path, "few.jsonl", "red", 5), colours(tmp_path, "many.jsonl", "blue", 35)
    flags = ["--data", few, many, "--weights", "3", "1", "--held-out", "0.2"]
    chosen = parse(Options, description=None, arguments=flags)
    config = Path(write(tmp_path, f"[data]\ndata = {json.dumps([few, many])}\nweights = [3, 1]\nheld_out = 0.2\n", "a.toml"))
    assert parse(Options, description=None, arguments=["--config", str(config)]) == chosen
    assert chosen.data.sources == (few, many)
    tokenizer = load_tokenizer(str(options.model.model))

    def read(options: Options) -> Corpus[Example]:
        encode = partial(encode_all, tokenizer=tokenizer, max_length=64, progress=False)
        return read_corpus(options, tokenizer, encode, lambda example: (example,), lambda text: None)

    corpus = read(chosen)

    def texts(examples: list[Example]) -> list[str]:
        return [str(tokenizer.decode(example.tokens)) for example in examples]

    training, held_out = texts(corpus.training), texts(corpus.held_out)
    assert (len(training), len(held_out)) == (32, 8)
    assert sum("red" in text for text in training) == 24
    assert not set(training) & set(held_out)
    # Without weights they are one after the other, as they are.
    plain = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, weights=(), held_out=0.0))
    corpus = read(plain)
    assert ["red" in text for text in texts(corpus.training)] == [True] * 5 + [False] * 35


def test_grouped_by_length_resumes(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches of several shapes, and the losses of a run in one piece; examples are shown in either and change neither."""
    rows = [{"question": "?", "answer": "red " * (1 + 12 * (number % 3))} for number in range(24)]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    grouped = but(options, "data", data=path, max_length=256, packing=False, group_by_length=True, held_out=0.0)
    grouped = but(grouped, "run", max_steps=6, save_every=1, accumulation_steps=2)
    whole = but(grouped, "run", output=tmp_path / "whole")
    finetune(whole, progress=False)
    shown = capsys.readouterr().err
    assert "tokens learned" not in shown
    assert "4 × up to 128 tokens" in shown
    finetune(grouped, progress=False)
    shutil.rmtree(grouped.run.output / "adapter")
    for step in ("5", "6"):  # as if it had been killed in the fifth step
        shutil.rmtree(grouped.run.output / "checkpoints" / step)
    finetune(but(grouped, "data", show_examples=2), progress=False)
    shown = capsys.readouterr().err
    assert shown.count("tokens learned") == 2
    assert "\x1b" not in shown
    assert "Resuming" in shown
    assert without_timing(rows_of(grouped.run.output)) == without_timing(rows_of(whole.run.output))


def test_a_run_older_than_an_option_goes_on(options: Options) -> None:
    mine = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    finetune(mine, progress=False)
    shutil.rmtree(mine.run.output / "adapter")
    path = mine.run.output / "options.json"
    record = json.loads(path.read_text())
    for name in ("group_by_length", "weights", "source_max_length"):
        del record["data"][name]
    path.write_text(json.dumps(record))
    finetune(mine, progress=False)
    assert read_adapter_method(mine.run.output / "adapter").rank == 4


# Whose folder it is


def test_a_folder_is_never_taken_from_another_run(options: Options) -> None:
    """Nor run twice; but the run's own command goes on, and --overwrite begins anew."""
    output = options.run.output
    mine = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    other = but(mine, "lora", rank=5)
    finetune(mine, progress=False)
    before = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds a finished run; .*--overwrite"):
        finetune(mine, progress=False)
    shutil.rmtree(output / "adapter")  # as if it had been killed at the end
    with pytest.raises(ValueError, match=r"another run .*lora\.rank: 4 there, 5 here.*--overwrite"):
        finetune(other, progress=False)
    finetune(mine, progress=False)  # nothing left to do but the adapter
    assert (output / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [row["step"] for row in rows_of(output)] == [1]

    finetune(but(other, "run", max_steps=2, overwrite=True), progress=False)
    assert [row["step"] for row in rows_of(output)] == [1, 2]
    assert read_adapter_method(output / "adapter").rank == 5


def test_overwrite_deletes_nothing_before_the_new_run_begins(options: Options, tmp_path: Path) -> None:
    """A mistake in the new command costs nothing, and files that are no run's stay in any case."""
    output = options.run.output
    mine = but(but(options, "run", max_steps=1, overwrite=True), "data", held_out=0.0)
    finetune(mine, progress=False)
    (output / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match=r"none\.jsonl"):
        finetune(but(mine, "data", data=str(tmp_path / "none.jsonl")), progress=False)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    finetune(but(mine, "lora", rank=5), progress=False)
    assert read_adapter_method(output / "adapter").rank == 5
    assert (output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"options\.json: is damaged"), ("[1]", "expected the options of a run, found other JSON")]
)
def test_a_record_that_is_none(options: Options, text: str, message: str) -> None:
    options.run.output.mkdir()
    (options.run.output / "options.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        finetune(options, progress=False)
    finetune(but(options, "run", overwrite=True, max_steps=1), progress=False)
    assert read_adapter_method(options.run.output / "adapter").rank == 4


def test_a_file_is_no_folder(options: Options) -> None:
    options.run.output.write_text("")
    for output in (options.run.output, options.run.output / "run"):
        with pytest.raises(ValueError, match="expected a folder, found"):
            finetune(but(options, "run", output=output), progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_touched(options: Options, overwrite: bool) -> None:
    options.run.output.mkdir()
    (options.run.output / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected an empty folder or a run to resume, found other files"):
        finetune(but(options, "run", overwrite=overwrite), progress=False)
    assert (options.run.output / "thesis.tex").exists()


# What is wrong is said at once


def write(folder: Path, text: str, name: str = "data.jsonl") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def add_special_token(folder: Path, model: str) -> str:
    """A model with fewer rows in its embedding than its tokenizer has tokens."""
    shutil.copytree(model, folder / "small")
    config = json.loads((folder / "small" / "config.json").read_text())
    (folder / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    return str(folder / "small")


ROW = '{"question": "1?", "answer": "red"}\n'
BAD: dict[str, tuple[Callable[[Path, str], list[str]], str]] = {
    "missing model": (lambda folder, model: ["--model", f"{folder}/nowhere"], "nowhere: no such file or folder"),
    "folder without a model": (lambda folder, model: ["--model", str(folder)], "config.json"),
    "other tokenizer": (
        lambda folder, model: ["--model", add_special_token(folder, model)],
        "expected token ids below 200",
    ),
    "missing data": (lambda folder, model: ["--data", f"{folder}/none.jsonl"], "none.jsonl: expected a data file"),
    "empty data": (lambda folder, model: ["--data", write(folder, "")], "expected at least one row, found an empty file"),
    "malformed line": (lambda folder, model: ["--data", write(folder, ROW + '{"question": \n')], "data.jsonl, line 2"),
    "unknown schema": (
        lambda folder, model: ["--data", write(folder, '{"title": "x", "body": "y"}\n' * 3)],
        "unknown schema: found the columns ['body', 'title']",
    ),
    "nothing to learn": (
        lambda folder, model: ["--data", write(folder, '{"question": "1?", "answer": ""}\n' * 3)],
        "expected at least one row with something to learn",
    ),
    "rank 0": (lambda folder, model: ["--rank", "0"], "LoRA rank: expected at least 1, found 0"),
    "rank below 0": (lambda folder, model: ["--rank", "-2"], "LoRA rank: expected at least 1, found -2"),
    "dropout": (lambda folder, model: ["--dropout", "1.0"], "LoRA dropout: expected 0 <= dropout < 1, found 1.0"),
    "no target": (lambda folder, model: ["--target-modules", "c_attn"], "LoRA target 'c_attn' matches no linear layer"),
    "no target of several": (
        lambda folder, model: ["--target-modules", "q_proj", "wq"],
        "LoRA target 'wq' matches no linear layer; their names end in: down_proj",
    ),
    "regular expression": (lambda folder, model: ["--target-regex", "q_proj"], "LoRA target 'q_proj' matches no linear"),
    "no regular expression": (lambda folder, model: ["--target-regex", "q(_proj"], "no regular expression: missing )"),
    "block size of dense weights": (
        lambda folder, model: ["--data-type", "none", "--block-size", "128"],
        "block_size, double_quantization: expected a 4-bit data_type, found none",
    ),
    "two kinds of targets": (
        lambda folder, model: ["--target-regex", ".*q_proj", "--target-modules", "v_proj"],
        "target_modules and target_regex: expected one of them, found both",
    ),
    "early stopping without evaluations": (
        lambda folder, model: ["--early-stopping-patience", "2", "--held-out", "0"],
        "early_stopping_patience: expected held-out data, found held_out 0 and no eval_data",
    ),
    "all held out": (lambda folder, model: ["--held-out", "0.99"], "leaves nothing to train on of 24 examples"),
    "block size": (lambda folder, model: ["--block-size", "65"], "block"),
    "name without a source": (lambda folder, model: ["--data", "vicuna"], "vicuna: expected a data set that can be read"),
    "trees without an answer": (
        lambda folder, model: [
            "--data",
            write(folder, '{"message_id": "a", "parent_id": null, "role": "prompter", "text": "Hi"}\n'),
        ],
        "message trees: expected at least one with an answer, found none",
    ),
    "broken tree": (
        lambda folder, model: [
            "--data",
            write(folder, '{"message_id": "a", "parent_id": "z", "role": "assistant", "text": "Hi"}\n'),
        ],
        "message a: expected its parent among the messages, found no z",
    ),
    "misspelt key": (
        lambda folder, model: ["--config", write(folder, "[lora]\nrnak = 8\n", "a.toml")],
        "unknown key lora.rnak; did you mean lora.rank?",
    ),
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data": ()}, "data: expected at least one source, found none"),
        ({"weights": (1.0,)}, "weights: expected two sources of data or more, found 1"),
        ({"data": "a.jsonl", "weights": (1.0, 2.0)}, "weights: expected two sources of data or more, found 1"),
        ({"data": ("a", "b"), "weights": (1.0,)}, "weights: expected one for each of 2 sources of data, found 1"),
        ({"data": ("a", "b"), "weights": (1.0, 0.0)}, "weights: expected numbers above 0, found 1, 0"),
        (
            {"group_by_length": True, "packing": True},
            "group_by_length: expected packing off beside it .*, found it on",
        ),
        ({"max_length": 1}, "max_length: expected at least 2 tokens"),
        ({"source_max_length": 0}, "source_max_length: expected at least 1 token, found 0"),
        ({"source_max_length": 512}, "source_max_length: expected less than max_length 512, found 512"),
        ({"target_max_length": 600}, "target_max_length: expected at most max_length 512, found 600"),
        ({"eval_split": "test"}, "eval_split: expected eval_data beside it, found 'test' alone"),
        ({"show_examples": -1}, "show_examples: expected at least 0, found -1"),
    ],
)
def test_data_options_that_mean_nothing(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        DataOptions(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str,
    options: Options,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through the same entry as the script's, before any weight is read."""
    make, expected = BAD[case]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(job_module, "train_adapter", lambda *arguments, **options: pytest.fail("trained"))
    flags = ["--model", str(tiny_llama), "--data", str(options.data.data), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *make(tmp_path, str(tiny_llama))])
    with pytest.raises(SystemExit) as exit_:
        run(finetune, Options, "")
    assert exit_.value.code == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("error: ") == 1
    error, *more = shown.err[shown.err.index("error: ") :].splitlines()
    assert expected in "\n".join([error, *more])
    assert all(line.startswith("  - ") for line in more), "one line, or a list of several problems"
    assert "Traceback" not in shown.err
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_the_real_command(tiny_llama: Path, tmp_path: Path) -> None:
    """A flag that is unknown or out of range: exit code 2, with the nearest name; bad input: exit code 1, one line."""

    def call(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})

    done = call("--learning-rat", "1e-4")
    assert done.returncode == 2
    assert "--learning-rat" in done.stderr
    assert "--learning-rate" in done.stderr.replace("--learning-rat ", "")
    done = call("--learning-rate", "-1")
    assert done.returncode == 2
    assert "learning_rate: expected a number above 0, found -1.0" in done.stderr
    done = call("--model", str(tiny_llama), "--rank", "0", "--output", str(tmp_path / "run"))
    assert done.returncode == 1
    assert done.stderr == "error: LoRA rank: expected at least 1, found 0\n"


def test_a_damaged_model_is_found_before_training(
    make_tiny_llama: Callable[..., Path], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of other shapes than config.json says: from the headers, with names, expected and found."""
    folder = make_tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    monkeypatch.setattr(job_module, "train_adapter", lambda *arguments, **options: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight: expected \(256, 64\), found \(128, 64\)"):
        finetune(but(options, "model", model=str(folder)), progress=False)
    assert not options.run.output.exists()


def test_a_diverged_run_stops_with_the_last_good_checkpoint(options: Options) -> None:
    with pytest.raises(ValueError, match=r"step \d+: found .*(nan|inf).*lower learning rate"):
        finetune(
            but(but(options, "optimizer", learning_rate=1e30, warmup_ratio=0.0), "run", max_steps=20, epochs=20),
            progress=False,
        )
    assert not (options.run.output / "adapter").exists()
    assert all(np.isfinite(row.get("loss", 0.0)) for row in rows_of(options.run.output))
