"""The first stage of a run: what is wrong is found in one clear error, before any weights are read and any file is written.

The stage is called as the command calls it, so that the text on stderr and the exit code are those of the command.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from runs import but

from qlora_jax import cli
from qlora_jax.adapters.files import write_adapter
from qlora_jax.adapters.names import tensor_name
from qlora_jax.errors import OptionError
from qlora_jax.finetune import DataOptions, LoRAOptions, Options, TuningOptions
from qlora_jax.finetune.prepare import count_steps, prepare
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
    "unknown chat template": (
        lambda folder, model: ["--chat-template", "chatlm"],
        "chat_template: expected a file or one of chatml, gemma,",
    ),
    "malformed line": (
        lambda folder, model: ["--on-bad-row", "error", "--data", write(folder, ROW + '{"question": \n')],
        "row 1 (counted from 0): data.jsonl, line 2, column 14: expected one JSON object a line",
    ),
    "too many bad rows": (
        lambda folder, model: ["--data", write(folder, ROW * 9 + '{"question": \n' * 2)],
        "2 of 11 rows cannot be used, more than one in ten",
    ),
    "wrong columns": (
        lambda folder, model: ["--columns", "answer=replay", "--data", write(folder, ROW * 9)],
        "columns answer=replay: expected a column of the data, found ['answer', 'question']",
    ),
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
        "row 0: expected two different answers, chosen and rejected, found equal ones",
    ),
    "no pairs": (lambda folder: ["--data", write_rows(folder, ANSWER)], "expected the columns chosen and rejected, found"),
    "no difference within the length": (
        lambda folder: ["--max-length", "2"],
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
        "row 0: expected a text before the answer, the source of an encoder-decoder, found none",
    ),
    "empty targets": (
        lambda folder: ["--data", write_rows(folder, [{"input": "is", "output": " "}])],
        "expected at least one pair of source and target, found none",
    ),
}


def check_refused(flags: Sequence[str], expected: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, or a list of several problems, and nothing written."""
    chosen: dict[str, list[str]] = {}  # the flags of a case replace those of the run that it changes
    for flag in flags:
        if flag.startswith("--"):
            chosen[last := flag] = []
        else:
            chosen[last].append(flag)
    arguments = [part for flag, values in chosen.items() for part in (flag, *values)] + ["--output", str(output)]
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


def test_the_chat_template_of_the_options_writes_the_data(
    options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": f"{n}?", "output": "yes"} for n in range(4)]
    alpaca = but(options, "data", data=write_rows(tmp_path, rows), chat_template="chatml", held_out=0, max_length=256)
    prepare(but(alpaca, "run", output=tmp_path / "alpaca", memory_check=False), progress=False)
    assert any("most rows, which have the form alpaca; --template chat uses it" in message for message in caplog.messages)
    prepared = prepare(but(but(options, "data", chat_template="zephyr"), "run", memory_check=False), progress=False)
    tokenizer = prepared.pretrained.tokenizer
    assert prepared.adapter_metadata.template == "chat"
    text = str(tokenizer.decode(next(prepared.batches)["inputs"][0].tolist()))
    assert text.startswith("<|user|>\n")
    assert "<|assistant|>\n" in text


def test_an_encoder_decoder_has_no_new_special_tokens(seq2seq_options: Options, tmp_path: Path) -> None:
    """This is found before the data are read."""
    unread = but(seq2seq_options, "data", data=write(tmp_path, "{"))
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


# How long a run is, and its learning rate


class Unchanging:
    """Batches of which each epoch has seven, and which take any position."""

    def batches_in_epoch(self, epoch: int = 0) -> int:
        return 7

    def set_state(self, state: dict[str, Any]) -> None:
        raise ValueError("examples: saved 24, now 23")


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"max_steps": 50}, 50),
        ({"max_steps": 50, "epochs": 1}, 50),
        ({"max_steps": 3, "epochs": 100}, 3),
        ({"max_steps": None}, 14),
        ({"max_steps": None, "epochs": 0.5}, 4),
        ({"max_steps": None, "epochs": 0.01}, 1),
        ({"max_steps": None, "epochs": 1.1}, 8),
        ({"max_steps": None, "epochs": 3}, 21),
    ],
)
def test_the_number_of_steps(options: Options, fields: dict[str, Any], steps: int) -> None:
    """`max_steps` alone, else so many epochs, rounded up as transformers does."""
    assert count_steps(but(options, "run", **fields), cast(Any, Unchanging())) == steps


def test_missing_held_out_data_are_found_before_any_are_read(options: Options, tmp_path: Path) -> None:
    missing = str(tmp_path / "none.jsonl")
    with pytest.raises(OSError, match=r"none\.jsonl: expected a data file or a folder, found nothing at"):
        prepare(but(options, "data", data=write(tmp_path, "{"), eval_data=missing, held_out=0.0), progress=False)


@pytest.mark.parametrize(("fields", "steps"), [({"warmup_steps": 5}, 5), ({"warmup_steps": 0}, 0), ({}, 3)])
def test_the_warm_up(options: Options, fields: dict[str, Any], steps: int) -> None:
    assert but(options, "optimizer", **fields).optimizer.warmup(100) == steps


@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("optimizer", {"warmup_steps": -1}, "warmup_steps: expected at least 0, found -1"),
        (
            "optimizer",
            {"warmup_steps": 2, "warmup_ratio": 0.1},
            "warmup_ratio: expected none beside warmup_steps, found 0.1",
        ),
        ("run", {"epochs": 0}, "epochs: expected a number above 0 and at most 100,000, found 0"),
        ("run", {"epochs": float("nan")}, "epochs: expected a number above 0"),
        ("run", {"epochs": 1e9}, "epochs: expected a number above 0 and at most 100,000, found 1e"),
        ("run", {"max_steps": 0}, "max_steps: expected at least 1, found 0"),
    ],
)
def test_lengths_that_mean_nothing(options: Options, group: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        but(options, group, **fields)


def test_a_warm_up_longer_than_the_run(options: Options) -> None:
    with pytest.raises(OptionError, match="warm-up: expected between 0 and the 3 steps of the run, found 4"):
        prepare(but(options, "optimizer", warmup_steps=4), progress=False)


def test_what_weight_decay_pulls_towards(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "qlora_jax")
    decayed = but(options, "optimizer", weight_decay=0.1)
    prepare(decayed, progress=False)
    assert "weight_decay 0.1 pulls towards the base model as it is" in caplog.text
    prepare(but(decayed, "lora", init_lora_weights="pissa"), progress=False)
    assert "pulls towards the base without what init_lora_weights took out of its weights" in caplog.text
