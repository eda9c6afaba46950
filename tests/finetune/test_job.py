"""The main job on a tiny random Llama: what it leaves behind, what it learns from, and the text of the real command.

References: the files read back; the exit code of the real command.
"""

import dataclasses
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from runs import FinishedRun, but, rows_of
from safetensors.numpy import load_file, save_file
from tiers import tiered

from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, read_adapter_metadata
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.cli import parse
from qlora_jax.commands import generate, merge
from qlora_jax.commands.train import main
from qlora_jax.data import Example, encode_all, read_chat_template
from qlora_jax.export.pretrained import merge_pretrained
from qlora_jax.finetune import LoRAOptions, Options, finetune
from qlora_jax.finetune.finish import finish
from qlora_jax.finetune.objectives.corpus import Corpus, read_corpus
from qlora_jax.finetune.prepare import prepare
from qlora_jax.finetune.training import train
from qlora_jax.quant import Quantization

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train.py"


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.integration
def test_packed_tables_in_a_run(options: Options) -> None:
    """They train rows, lower the loss, and are in the record and on the card."""
    packed = but(but(options, "model", embedding_storage="nf4"), "lora", trainable_token_indices=(5, 6))
    folder = finetune(but(packed, "run", eval_every=3), progress=False)
    assert read_adapter_metadata(folder) == AdapterMetadata(Quantization(), "chat", "nf4")
    assert "its token table and head in NF4" in (folder / "README.md").read_text(encoding="utf-8")
    before, *_, after = rows_of(options.run.output)
    assert after["eval_loss"] < before["eval_loss"]


def test_what_a_run_leaves(finished_sft: FinishedRun) -> None:
    options, folder = finished_sft.options, finished_sft.folder
    output = options.run.output
    assert folder == output / "adapter"
    adapter = read_adapter(folder)
    assert (adapter.method.rank, adapter.method.alpha, adapter.base) == (4, 8.0, options.model.model)
    assert read_adapter_metadata(folder) == AdapterMetadata(Quantization(), "chat")
    assert len(adapter.tensors) == 2 * 7 * 2  # A and B, seven layers, two blocks
    assert all(np.abs(tensor).max() > 0 for tensor in adapter.tensors.values())
    rows = finished_sft.rows
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
    assert "before" in finished_sft.out
    assert "after" in finished_sft.out
    assert "Held-out loss" in finished_sft.errors


def test_the_stages_are_values(options: Options, caplog: pytest.LogCaptureFixture) -> None:
    """`prepare` writes nothing, `train` begins the run, `finish` saves it; all three log their messages."""
    caplog.set_level("INFO", "qlora_jax")
    prepared = prepare(but(options, "run", max_steps=1, eval_every=0), progress=False)
    assert (prepared.steps, prepared.spec.objective.name) == (1, "sft")
    assert not options.run.output.exists()
    trained = train(prepared)
    assert trained.chosen_step == 1
    assert not (options.run.output / "adapter").exists()
    assert finish(trained) == options.run.output / "adapter"
    assert any("trainable parameters" in message for message in caplog.messages)
    assert any(message.startswith("Saved the adapter") for message in caplog.messages)


@pytest.mark.integration
def test_new_special_tokens_are_trained_saved_and_used(options: Options, tmp_path: Path) -> None:
    """Patterns and a saved module beside them; asked and merged by the commands."""
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

    model = ["--model", str(options.model.model), "--adapter", str(folder)]
    assert generate.main([*model, "--prompt", "1<|a|>?", "--max-new-tokens", "2"]) == 0
    assert merge.main([*model, "--output", str(tmp_path / "merged"), "--no-compare"]) == 0
    result = open_checkpoint(str(tmp_path / "merged"))
    assert result.config["vocab_size"] == size + 2
    merged_rows = result.read("model.embed_tokens.weight")[size:]
    np.testing.assert_allclose(merged_rows.astype(np.float32), rows, rtol=0.01, atol=1e-3)
    assert len(load_tokenizer(tmp_path / "merged")) == size + 2


@pytest.mark.integration
def test_a_chat_template_is_saved_and_used(options: Options, tmp_path: Path) -> None:
    """Generation and a further run find it beside the adapter, and merging writes it."""
    folder = finetune(but(options, "data", chat_template="gemma"), progress=False)
    opened = open_pretrained(options.model.model, str(folder))
    assert opened.tokenizer.chat_template == read_chat_template("gemma", opened.tokenizer)
    assert opened.adapter_metadata is not None
    assert opened.adapter_metadata.template == "chat"
    further = but(but(dataclasses.replace(options, lora=LoRAOptions()), "model", adapter=str(folder)), "run", max_steps=1)
    second = finetune(but(further, "run", output=tmp_path / "further"), progress=False)
    assert load_tokenizer(second).chat_template == opened.tokenizer.chat_template
    merge_pretrained(opened, tmp_path / "merged", progress=False)
    assert load_tokenizer(tmp_path / "merged").chat_template == opened.tokenizer.chat_template


@pytest.mark.integration
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


@pytest.mark.integration
def test_it_learns_what_it_sees(options: Options) -> None:
    """A set small enough to memorise: the loss of random bytes falls to less than a third."""
    longer = but(but(options, "run", max_steps=60, epochs=100, eval_every=0, save_every=0), "data", held_out=0.0)
    finetune(but(longer, "lora", rank=16, alpha=32.0), progress=False)
    losses = [row["loss"] for row in rows_of(options.run.output) if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) / 3


@pytest.mark.parametrize("name", tiered(["adamw8bit", "lion", "adafactor"], quick=["lion"]))
def test_each_optimizer(options: Options, name: Any) -> None:
    """A step of each moves the adapter, with its state in host memory."""
    one = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    folder = finetune(
        but(one, "optimizer", optimizer=name, host_offload=True, host_adapter=name == "lion", weight_decay=0.1),
        progress=False,
    )
    assert all(np.abs(tensor).max() > 0 for tensor in read_adapter(folder).tensors.values())


@pytest.mark.integration
def test_neftune_changes_training_and_not_evaluation(options: Options, tmp_path: Path) -> None:
    rows = {}
    for alpha in (0.0, 5.0):
        noisy = but(but(options, "optimizer", neftune_alpha=alpha), "run", max_steps=1, output=tmp_path / str(alpha))
        finetune(noisy, progress=False)
        rows[alpha] = rows_of(noisy.run.output)
    assert rows[0.0][0]["eval_loss"] == rows[5.0][0]["eval_loss"]
    assert rows[0.0][1]["loss"] != rows[5.0][1]["loss"]


def write_colours(folder: Path, name: str, colour: str, count: int) -> str:
    rows = [{"question": f"{colour} {number}?", "answer": f"{colour} {number}"} for number in range(count)]
    return write(folder / name, "".join(json.dumps(row) + "\n" for row in rows))


def test_several_sources_with_weights(options: Options, tmp_path: Path) -> None:
    """Flags and TOML alike; no held-out row is in the training data, whatever is repeated there."""
    few, many = write_colours(tmp_path, "few.jsonl", "red", 5), write_colours(tmp_path, "many.jsonl", "blue", 35)
    flags = ["--data", few, many, "--weights", "3", "1", "--held-out", "0.2"]
    chosen = parse(Options, description=None, arguments=flags)
    config = Path(
        write(tmp_path / "a.toml", f"[data]\ndata = {json.dumps([few, many])}\nweights = [3, 1]\nheld_out = 0.2\n")
    )
    assert parse(Options, description=None, arguments=["--config", str(config)]) == chosen
    assert chosen.data.sources == (few, many)
    tokenizer = load_tokenizer(str(options.model.model))

    def read(options: Options) -> Corpus[Example]:
        encode = partial(encode_all, tokenizer=tokenizer, max_length=64, progress=False)
        return read_corpus(options, tokenizer, encode, lambda example: (example,))

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


def test_flags_that_are_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag that is unknown or out of range: exit code 2, with the nearest name."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*flags: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(flags)
        assert exit_.value.code == 2
        return capsys.readouterr().err

    said = call("--learning-rat", "1e-4")
    assert "--learning-rat" in said
    assert "--learning-rate" in said.replace("--learning-rat ", "")
    assert "learning_rate: expected a number above 0, found -1.0" in call("--learning-rate", "-1")


def test_the_real_command(tiny_llama: Path, tmp_path: Path) -> None:
    """Bad input: exit code 1, one line."""
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_llama), "--rank", "0", "--output", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 1
    assert done.stderr == "error: LoRA rank: expected at least 1, found 0\n"


def test_a_diverged_run_stops_with_the_last_good_checkpoint(options: Options) -> None:
    with pytest.raises(ValueError, match=r"step \d+: found .*(nan|inf).*lower learning rate"):
        finetune(
            but(but(options, "optimizer", learning_rate=1e30, warmup_ratio=0.0), "run", max_steps=20, epochs=20),
            progress=False,
        )
    assert not (options.run.output / "adapter").exists()
    assert all(np.isfinite(row.get("loss", 0.0)) for row in rows_of(options.run.output))
