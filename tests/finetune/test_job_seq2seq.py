"""The main job on a tiny random T5: it learns targets from sources, measures RougeL, resumes, and its adapter serves.

References: greedy answers and RougeL computed here, word by word from whole forward passes; an uninterrupted run, bit for
bit; PEFT's fields.
"""

import dataclasses
import importlib.util
import json
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
from rouge_score.rouge_scorer import RougeScorer
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import load_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.cli import run
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

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COLOURS = ("red", "green", "blue", "black")
WORDS = ("<pad>", "</s>", "<unk>", "what", "colour", "is", "it", "?", *COLOURS, *map(str, range(24)))
SIZES: dict[str, int] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random T5 v1.0 and a tokenizer whose tokens are words."""
    folder = tmp_path_factory.mktemp("t5")
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True) for token in WORDS[:3]])
    backend.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])  # pyright: ignore
    names: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    config = {"model_type": "t5", "vocab_size": len(WORDS), "eos_token_id": 1, "pad_token_id": 0, **SIZES}
    (folder / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 0}), encoding="utf-8")
    draws = np.random.default_rng(0)

    def normal(*shape: int, scale: float) -> np.ndarray:
        return scale * draws.standard_normal(shape, np.float32)

    hidden, inner = SIZES["d_model"], SIZES["d_ff"]
    tensors = {"shared.weight": normal(len(WORDS), hidden, scale=1.0)}
    for stack, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors |= {first: normal(32, 4, scale=1.0), f"{stack}.final_layer_norm.weight": np.ones(hidden, np.float32)}
        for block in range(SIZES["num_layers"]):
            for layer, part in enumerate((*parts, "DenseReluDense")):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                tensors[f"{prefix}.layer_norm.weight"] = np.ones(hidden, np.float32)
                shapes = {"wi": (inner, hidden), "wo": (hidden, inner)} if part == "DenseReluDense" else {}
                for name, shape in (shapes or dict.fromkeys("qkvo", (hidden, hidden))).items():
                    scale = (shape[1] * (16 if name == "q" else 1)) ** -0.5
                    tensors[f"{prefix}.{part}.{name}.weight"] = normal(*shape, scale=scale)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write(folder: Path, rows: list[dict[str, str]], name: str = "data.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder / name)


@pytest.fixture
def options(t5: Path, tmp_path: Path) -> Options:
    rows = [{"input": f"what colour is {n} ?", "output": f"it is {COLOURS[n % 4]}"} for n in range(24)]
    return Options(
        ModelOptions(model=str(t5)),
        LoRAOptions(rank=8, alpha=16.0),
        DataOptions(data=write(tmp_path, rows), max_length=16, held_out=0.25),
        OptimizerOptions(learning_rate=1e-2, warmup_ratio=0.0),
        RunOptions(output=tmp_path / "run", max_steps=24, epochs=20, batch_size=6, eval_every=12, save_every=8, samples=0),
    )


def but(options: Options, group: str, **fields: Any) -> Options:
    return dataclasses.replace(options, **{group: dataclasses.replace(getattr(options, group), **fields)})


def rows_of(options: Options) -> list[dict[str, Any]]:
    lines = (options.run.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timing = ("tokens_per_second", "peak_memory_bytes")
    return [{name: value for name, value in json.loads(line).items() if name not in timing} for line in lines]


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


def test_new_special_tokens_are_refused(options: Options) -> None:
    """Before the data are read."""
    unread = but(options, "data", data="none.jsonl")
    with pytest.raises(ValueError, match="special_tokens: expected a decoder-only model, found t5"):
        finetune(but(unread, "lora", special_tokens=("<|a|>",)), progress=False)


def test_it_learns_and_serves(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in one piece, its files, and what generation and merging make of them."""
    with steps_lowered() as steps:
        folder = finetune(but(options, "run", samples=1), progress=False)
    assert steps == BOTH_PRECOMPILED
    rows = rows_of(options)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 12, 24]
    assert not any("eval_rougeL" in row for row in rows)
    assert rows[-1]["eval_loss"] < 0.5 * rows[0]["eval_loss"]
    assert np.mean([row["loss"] for row in rows[-3:]]) < 0.4 * rows[1]["loss"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert len(read_adapter(folder).tensors) == 2 * (2 * 6 + 2 * 10)  # A and B of six and ten linear layers a block
    shown = capsys.readouterr()
    assert "24 of 24 rows kept as pairs of source and target: plain" in shown.err
    assert "6 × 64 source and 64 target tokens" in shown.err
    assert "Held-out rougeL" in shown.err
    assert "Prompt: what colour is" in shown.out

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
    generate = script("generate")
    assert generate.main(["--model", str(options.model.model), "--adapter", str(folder), "--prompt", question]) == 0
    assert capsys.readouterr().out.strip() == answers[question].strip()
    merge, merged = script("merge"), tmp_path / "merged"
    arguments = ["--model", str(options.model.model), "--adapter", str(folder), "--output", str(merged)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["merge.py", *arguments, "--base", "dequantized", "--dtype", "float32"])
        assert merge.main() == 0
    assert "the same most likely token at 100.0% of positions" in capsys.readouterr().out
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_script", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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
    assert [row["step"] for row in rows_of(options)] == [0, 1, 2, 3]
    kill = False
    finetune(options, progress=False)
    whole = but(options, "run", output=tmp_path / "whole")
    finetune(whole, progress=False)
    rows = rows_of(options)
    assert rows == rows_of(whole)
    assert [row["step"] for row in rows if "eval_rougeL" in row] == [0, 2, 4, 6]
    assert "The adapter is that of step 2" in capsys.readouterr().err
    results = json.loads((whole.run.output / "eval_results.json").read_text())
    assert results == {name: rows[2][name] for name in ("step", "eval_loss", "eval_mean_token_accuracy", "eval_rougeL")}
    assert results["eval_loss"] == 1.0


@pytest.mark.parametrize("name", ["adamw8bit", "lion", "adafactor"])
def test_each_optimizer(options: Options, name: Any) -> None:
    one = but(but(options, "run", max_steps=1), "data", held_out=0.0)
    folder = finetune(but(one, "optimizer", optimizer=name, host_offload=True, host_adapter=True), progress=False)
    assert all(np.abs(tensor).max() > 0 for tensor in read_adapter(folder).tensors.values())
    assert not (options.run.output / "eval_results.json").exists()


BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "dpo": (lambda folder: ["--objective", "dpo"], "objective: expected sft with an encoder-decoder, found dpo"),
    "packing": (lambda folder: ["--packing"], "packing: expected off with an encoder-decoder, found on"),
    "sources": (lambda folder: ["--train-on-source"], "train_on_source: expected False with an encoder-decoder, found True"),
    "NEFTune": (lambda folder: ["--neftune-alpha", "5"], "neftune_alpha: expected 0.0 with an encoder-decoder, found 5.0"),
    "a text without a source": (
        lambda folder: ["--data", write(folder, [{"text": "it is red"}])],
        "row 0 (counted from 0): expected a text before the answer, the source of an encoder-decoder, found none",
    ),
    "empty targets": (
        lambda folder: ["--data", write(folder, [{"input": "is", "output": " "}])],
        "expected at least one pair of source and target, found none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = BAD[case]
    monkeypatch.setattr(job_module, "_load", lambda *arguments: pytest.fail("loaded"))
    flags = ["--model", str(options.model.model), "--data", str(options.data.data), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, *make(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        run(finetune, Options, "")
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert expected in error[error.index("error: ") :]
    assert not (tmp_path / "run").exists()


def test_a_decoder_has_no_rouge(tiny_llama: Path, options: Options) -> None:
    decoder = but(but(options, "model", model=str(tiny_llama)), "run", predict_with_generate=True)
    with pytest.raises(ValueError, match="predict_with_generate: expected False with a decoder-only model, found True"):
        finetune(decoder, progress=False)
