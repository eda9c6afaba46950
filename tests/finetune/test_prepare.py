"""The first stage of a run: what is wrong is found in one clear error, before any weights are read and any file is written.

The stage is called as the command calls it, so that the text on stderr and the exit code are those of the command.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import FinishedRun, but

from qlora_jax import cli
from qlora_jax.adapters.files import write_adapter
from qlora_jax.adapters.names import tensor_name
from qlora_jax.finetune import DataOptions, LoRAOptions, Options, TuningOptions
from qlora_jax.finetune.folder import claim, start
from qlora_jax.finetune.prepare import prepare
from qlora_jax.peft import LoRA


def write(folder: Path, text: str, name: str = "data.jsonl") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def write_rows(folder: Path, rows: Sequence[dict[str, str]], name: str = "rows.jsonl") -> str:
    return write(folder, "".join(json.dumps(row) + "\n" for row in rows), name)


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


def another_adapter(folder: Path) -> str:
    tensors = {
        tensor_name("lm.q_proj", suffix): np.ones(shape, np.float32)
        for suffix, shape in zip(("lora_A.weight", "lora_B.weight"), ((4, 8), (8, 4)), strict=True)
    }
    return str(write_adapter(tensors, folder / "other", method=LoRA(rank=4, target_modules=("q_proj",))))


ANSWER = [{"question": "1?", "answer": "red"}] * 3
BAD_PAIRS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "equal answers": (
        lambda folder: ["--data", write_rows(folder, [{"prompt": "1?", "chosen": "a", "rejected": "a"}])],
        "row 0 (counted from 0): expected two different answers, chosen and rejected, found equal ones",
    ),
    "no pairs": (lambda folder: ["--data", write_rows(folder, ANSWER)], "expected the columns chosen and rejected, found"),
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


BAD_TARGETS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "dpo": (lambda folder: ["--objective", "dpo"], "objective: expected sft with an encoder-decoder, found dpo"),
    "packing": (lambda folder: ["--packing"], "packing: expected off with an encoder-decoder, found on"),
    "sources": (lambda folder: ["--train-on-source"], "train_on_source: expected False with an encoder-decoder, found True"),
    "NEFTune": (lambda folder: ["--neftune-alpha", "5"], "neftune_alpha: expected 0.0 with an encoder-decoder, found 5.0"),
    "a text without a source": (
        lambda folder: ["--data", write_rows(folder, [{"text": "it is red"}])],
        "row 0 (counted from 0): expected a text before the answer, the source of an encoder-decoder, found none",
    ),
    "empty targets": (
        lambda folder: ["--data", write_rows(folder, [{"input": "is", "output": " "}])],
        "expected at least one pair of source and target, found none",
    ),
}


def check_refused(flags: Sequence[str], expected: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, or a list of several problems, and nothing written."""
    arguments = [*flags, "--output", str(output)]
    assert cli.run(partial(prepare, progress=False), Options, "", arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("error: ") == 1
    error, *more = shown.err[shown.err.index("error: ") :].splitlines()
    assert expected in "\n".join([error, *more])
    assert all(line.startswith("  - ") for line in more)
    assert "Traceback" not in shown.err
    assert not output.exists()


@pytest.fixture(autouse=True)
def _no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("qlora_jax.checkpoint.safetensors.read_tensor", lambda *_: pytest.fail("a weight was read"))


@pytest.mark.parametrize("case", BAD)
def test_answers(case: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BAD[case]
    model = str(options.model.model)
    flags = ["--model", model, "--data", str(options.data.data), *make(tmp_path, model)]
    check_refused(flags, expected, tmp_path / "run", capsys)


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_preference_pairs(case: str, dpo_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BAD_PAIRS[case]
    flags = ["--model", str(dpo_options.model.model), "--data", str(dpo_options.data.data), "--objective", "dpo"]
    check_refused([*flags, *make(tmp_path)], expected, tmp_path / "run", capsys)


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_targets(case: str, seq2seq_options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, expected = BAD_TARGETS[case]
    flags = ["--model", str(seq2seq_options.model.model), "--data", str(seq2seq_options.data.data)]
    check_refused([*flags, *make(tmp_path)], expected, tmp_path / "run", capsys)


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


def test_pairs_need_data(dpo_options: Options) -> None:
    with pytest.raises(ValueError, match=r"data: expected preference pairs \(chosen, rejected\) .*, found none"):
        prepare(but(dpo_options, "data", data=None), progress=False)


def test_an_encoder_decoder_has_no_new_special_tokens(seq2seq_options: Options) -> None:
    """This is found before the data are read."""
    unread = but(seq2seq_options, "data", data="none.jsonl")
    with pytest.raises(ValueError, match="special_tokens: expected a decoder-only model, found t5"):
        prepare(but(unread, "lora", special_tokens=("<|a|>",)), progress=False)


def test_a_decoder_has_no_rouge(options: Options) -> None:
    with pytest.raises(ValueError, match="predict_with_generate: expected False with a decoder-only model, found True"):
        prepare(but(options, "run", predict_with_generate=True), progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights: expected true, gaussian"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora: expected no init_lora_weights that changes the base"),
        ({"loftq_iter": 3}, "loftq_iter: expected at least 1, and 1 without loftq"),
    ],
)
def test_initializations(options: Options, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(but(options, "lora", **fields), progress=False)
    assert not options.run.output.exists()


def test_loftq_of_dense_layers(options: Options) -> None:
    dense = but(but(options, "lora", init_lora_weights="loftq"), "model", data_type="none")
    with pytest.raises(ValueError, match="init_lora_weights loftq: expected linear layers in 4 bits"):
        prepare(dense, progress=False)


def test_a_window_and_packed_rows(make_tiny_llama: Callable[..., Path], options: Options) -> None:
    model = make_tiny_llama(model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=16)
    plain = dataclasses.replace(options, lora=LoRAOptions(), tuning=TuningOptions(method="prefix-tuning"))
    with pytest.raises(ValueError, match="a mistral with a window of 16 tokens: expected one document a row"):
        prepare(but(plain, "model", model=str(model)), progress=False)


def test_a_damaged_model(make_tiny_llama: Callable[..., Path], options: Options) -> None:
    """Weights of other shapes than config.json says: from the headers, with names, expected and found."""
    folder = make_tiny_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight: expected \(256, 64\), found \(128, 64\)"):
        prepare(but(options, "model", model=str(folder)), progress=False)
    assert not options.run.output.exists()


# Whose folder it is


def test_a_finished_run_is_not_repeated(finished_sft: FinishedRun) -> None:
    with pytest.raises(ValueError, match=r"holds a finished run; .*--overwrite"):
        prepare(finished_sft.options, progress=False)


def test_the_folder_of_another_run(options: Options) -> None:
    start(options)
    with pytest.raises(ValueError, match=r"another run .*lora\.rank: 4 there, 5 here.*--overwrite"):
        prepare(but(options, "lora", rank=5), progress=False)
    claim(options)
    claim(but(but(options, "lora", rank=5), "run", overwrite=True))


def test_overwrite_deletes_nothing_before_the_new_run_begins(options: Options, tmp_path: Path) -> None:
    """A mistake in the new command costs nothing, and files that are no run's stay in any case."""
    output, mine = options.run.output, but(options, "run", overwrite=True)
    start(mine)
    for name in ("notes.txt", "metrics.jsonl"):
        (output / name).write_text("mine")
    before = {path: path.read_bytes() for path in output.rglob("*")}
    with pytest.raises(OSError, match=r"none\.jsonl"):
        prepare(but(mine, "data", data=str(tmp_path / "none.jsonl")), progress=False)
    prepare(but(mine, "lora", rank=5), progress=False)
    assert {path: path.read_bytes() for path in output.rglob("*")} == before
    start(but(mine, "lora", rank=5))
    assert sorted(path.name for path in output.iterdir()) == ["notes.txt", "options.json"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"options\.json: is damaged"), ("[1]", "expected the options of a run, found other JSON")]
)
def test_a_damaged_record(options: Options, text: str, message: str) -> None:
    options.run.output.mkdir()
    (options.run.output / "options.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        prepare(options, progress=False)
    start(but(options, "run", overwrite=True))
    claim(options)


def test_a_run_older_than_an_option_is_resumed(options: Options) -> None:
    start(options)
    path = options.run.output / "options.json"
    record = json.loads(path.read_text())
    for name in ("group_by_length", "weights", "source_max_length"):
        del record["data"][name]
    path.write_text(json.dumps(record))
    claim(options)


def test_a_file_is_no_folder(options: Options) -> None:
    options.run.output.write_text("")
    for output in (options.run.output, options.run.output / "run"):
        with pytest.raises(ValueError, match="expected a folder, found"):
            prepare(but(options, "run", output=output), progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_touched(options: Options, overwrite: bool) -> None:
    options.run.output.mkdir()
    (options.run.output / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="expected an empty folder or a run to resume, found other files"):
        prepare(but(options, "run", overwrite=overwrite), progress=False)
    assert (options.run.output / "thesis.tex").exists()
