"""What a run watches: in its files, on the screen, and after a kill; and what cannot be watched, before any work."""

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
from flax import nnx

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, Options, RunOptions, WatchOptions, finetune
from qlora_jax.finetune.folder import claim, start
from qlora_jax.finetune.prepare import prepare
from qlora_jax.finetune.reporting.mmlu import describe, read_prompts
from qlora_jax.serve import generate


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def options(tiny_llama: Path, tmp_path: Path) -> Options:
    rows = [{"question": f"{number}?", "answer": "blue" * (1 + number % 3)} for number in range(20)]
    questions = [
        {"subject": f"subject_{number % 2}", "question": f"{number}?", "choices": list("wxyz"), "answer": number % 4}
        for number in range(8)
    ]
    return Options(
        ModelOptions(model=str(tiny_llama)),
        LoRAOptions(rank=4),
        DataOptions(data=write(tmp_path / "data.jsonl", rows), max_length=64, held_out=0.2),
        run=RunOptions(output=tmp_path / "run", max_steps=5, eval_every=2, save_every=2, samples=2),
        watch=WatchOptions(
            mmlu=write(tmp_path / "mmlu.jsonl", questions), mmlu_shots=0, mmlu_limit=6, mmlu_every=2, sample_every=3
        ),
    )


def but(options: Options, group: str, **fields: Any) -> Options:
    return dataclasses.replace(options, **{group: dataclasses.replace(getattr(options, group), **fields)})


@pytest.mark.integration
def test_what_is_watched(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The records of a run, of one that was killed after its checkpoint of step 4, and of one that overwrites it."""
    output = options.run.output
    finetune(options, progress=False)
    rows, samples = read(output / "metrics.jsonl"), read(output / "samples.jsonl")
    assert [row["step"] for row in rows if "mmlu_accuracy" in row] == [0, 2, 4, 5]
    assert all(
        row.keys() >= {"mmlu_accuracy_subject_0", "mmlu_accuracy_subject_1"} for row in rows if "mmlu_accuracy" in row
    )
    shown = capsys.readouterr().err
    assert "6 of 8 questions (a sample, seed 0), 2 subjects, 0-shot; 6 prompts of up to" in shown
    assert f"MMLU accuracy {rows[0]['mmlu_accuracy']:.3f} before, {rows[-1]['mmlu_accuracy']:.3f} after" in shown
    assert [row["step"] for row in samples] == [0, 0, 3, 3, 5, 5]
    assert samples[0]["prompt"] == samples[2]["prompt"] != samples[1]["prompt"]
    assert f"[step 3] {samples[2]['prompt'].split()[1]}\n  → {samples[2]['answer']}" in shown

    # The first answers are those of the base model, asked for without the job.
    tokenizer = load_tokenizer(options.model.model or "")
    base = load_model(open_checkpoint(options.model.model or ""), quantization=options.model.quantization())
    prompt = f"<|im_start|>user\n{samples[0]['prompt'].split()[1]}<|im_end|>\n<|im_start|>assistant\n"
    (ids,) = generate(*nnx.split(base), [tokenizer(prompt)["input_ids"]], max_new_tokens=96, eos_ids={1})  # type: ignore[arg-type]
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).strip() == samples[0]["answer"]

    shutil.rmtree(output / "checkpoints" / "5")
    shutil.rmtree(output / "adapter")
    finetune(options, progress=False)
    again = read(output / "metrics.jsonl")
    assert [row["step"] for row in again] == [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row.get("mmlu_accuracy") for row in again] == [row.get("mmlu_accuracy") for row in rows]
    assert read(output / "samples.jsonl") == samples


def test_overwriting_deletes_what_was_watched(options: Options) -> None:
    output = options.run.output
    start(options, 0)
    for name in ("tensorboard", "wandb"):
        (output / name).mkdir()
        (output / name / "old").touch()
    write(output / "samples.jsonl", [{"step": 0}])
    start(but(options, "run", overwrite=True), 0)
    assert [path.name for path in output.iterdir()] == ["options.json"]


def test_which_options_make_another_run(options: Options) -> None:
    """How often is looked, and where results go, may change at a resume; what is asked may not."""
    start(options, 0)
    claim(but(options, "watch", mmlu_every=7, mmlu_batch_size=2, sample_every=0, report_to=("wandb",), push_to_hub="a/b"))
    with pytest.raises(ValueError, match=r"holds another run \(watch\.mmlu_limit: 6 there, 7 here\)"):
        claim(but(options, "watch", mmlu_limit=7))


def test_the_accuracy_of_the_adapter_that_is_kept() -> None:
    """Where early stopping goes back to a step without a record of it, it is measured."""
    rows = [{"step": 0, "mmlu_accuracy": 0.1}, {"step": 1}, {"step": 2, "mmlu_accuracy": 0.3}, {"step": 3}]

    def ask() -> dict[str, float]:
        return {"mmlu_accuracy": 0.2}

    assert describe(rows, 2, ask) == "MMLU accuracy 0.100 before, 0.300 after (mean over subjects)."
    assert describe(rows, 1, ask) == "MMLU accuracy 0.100 before, 0.200 after (mean over subjects)."


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mmlu_every": -1, "mmlu": "a"}, "mmlu_every: expected at least 0, found -1"),
        ({"mmlu_limit": 0, "mmlu": "a"}, "mmlu_limit: expected at least 1, found 0"),
        ({"mmlu_shots": 5}, "mmlu_shots: expected mmlu beside it, found 5 alone"),
        ({"report_to": ("wandb", "wandb")}, "report_to: expected each tracker once, found wandb, wandb"),
        ({"hub_private": True}, "hub_private: expected push_to_hub beside it, found none"),
        ({"sample_every": -1}, "sample_every: expected at least 0, found -1"),
    ],
)
def test_options(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WatchOptions(**fields)


def test_what_cannot_be_reported(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sample_every: expected held-out data and samples of at least 1, found none"):
        prepare(but(options, "run", samples=0), progress=False)
    with pytest.raises(ValueError, match=r"mmlu\.jsonl: expected a file of examples for 5-shot prompts"):
        prepare(but(options, "watch", mmlu_shots=None), progress=False)
    texts = write(tmp_path / "texts.jsonl", [{"text": f"number {number}"} for number in range(20)])
    with pytest.raises(ValueError, match="sample_every: expected held-out examples with something before what is learned"):
        prepare(but(options, "data", data=texts), progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to tensorboard: expected the package tensorboardX"):
        prepare(but(options, "watch", report_to=("tensorboard",)), progress=False)
    assert not options.run.output.exists()


def test_an_encoder_decoder_has_no_mmlu(options: Options, tiny_llama: Path) -> None:
    config: Any = types.SimpleNamespace()  # any that is not a decoder's
    with pytest.raises(ValueError, match="mmlu: expected a decoder, which continues a text, found an encoder-decoder"):
        read_prompts(options, load_tokenizer(tiny_llama), config)
