"""The main job with methods other than LoRA: what it trains, saves, goes on from, shows, plans and refuses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from huggingface_hub import ModelCard
from lowered import BOTH_PRECOMPILED, steps_lowered

from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.adapters.virtual_tokens import ENCODER
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, OptimizerOptions, Options, RunOptions, finetune
from qlora_jax.finetune.objectives.dpo import DPO
from qlora_jax.finetune.objectives.sft import SFT
from qlora_jax.finetune.options.tuning import TuningOptions
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import causal_family_of
from qlora_jax.peft import IA3, FullFineTuning, LoRA, PrefixTuning, PromptTuning, PTuning
from qlora_jax.plan.quick import quick_plan
from qlora_jax.serve import generate

LSTM = {"prompt_encoder": "lstm", "encoder_hidden_size": 16, "encoder_layers": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [{"question": f"{number}?", "answer": "blue" * (1 + number % 3)} for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options_of(model: Path, data: Path, output: Path, **tuning: Any) -> Options:
    return Options(
        model=ModelOptions(model=str(model)),
        tuning=TuningOptions(**tuning),
        data=DataOptions(data=str(data), max_length=64, held_out=0.2),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        run=RunOptions(output=output, max_steps=3, eval_every=3, save_every=3, samples=0),
    )


@pytest.mark.parametrize(
    ("tuning", "samples"),
    [
        ({"method": "ia3"}, 0),
        pytest.param(
            {"method": "prompt-tuning", "virtual_tokens": 6, "prompt_init": "text", "prompt_init_text": "What colour?"},
            1,
            marks=pytest.mark.integration,
        ),
        pytest.param({"method": "p-tuning", "virtual_tokens": 6, **LSTM}, 0, marks=pytest.mark.integration),
        pytest.param({"method": "prefix-tuning", "virtual_tokens": 6}, 0, marks=pytest.mark.integration),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else None,
)
def test_a_run_and_what_it_leaves(
    tiny_llama: Path, data: Path, tmp_path: Path, tuning: dict[str, Any], samples: int, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tiny_llama, data, tmp_path / "run", **tuning)
    options = dataclasses.replace(options, run=dataclasses.replace(options.run, samples=samples))
    with steps_lowered() as steps:
        folder = finetune(options, progress=False)
    assert steps == BOTH_PRECOMPILED
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = rows[0]["eval_loss"], rows[-1]["eval_loss"]
    assert after < before
    assert ("before" in capsys.readouterr().out) == bool(samples)
    adapter = read_adapter(folder)
    assert type(adapter.method) is type(options.method())
    assert (folder / ENCODER).exists() == (tuning["method"] == "p-tuning")
    card = ModelCard.load(folder / "README.md")
    assert tuning["method"] in card.data.to_dict()["tags"]

    model: Any = open_pretrained(model=str(tiny_llama), adapter=str(folder)).load(progress=False)
    assert all(np.isfinite(tensor).all() for tensor in adapter_tensors(model).values())
    graph, state = nnx.split(model)
    (answer,) = generate(graph, state, [[5, 6, 7]], max_new_tokens=4)
    assert len(answer) == 4
    expected = 512 if tuning["method"] == "ia3" else 506
    assert model.max_positions == expected

    more = dataclasses.replace(options_of(tiny_llama, data, tmp_path / "more"), model=ModelOptions(str(tiny_llama)))
    more = dataclasses.replace(more, model=dataclasses.replace(more.model, adapter=str(folder)))
    finetune(dataclasses.replace(more, run=dataclasses.replace(more.run, max_steps=1, eval_every=1)), progress=False)
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["eval_loss"] == pytest.approx(after, rel=1e-4), "the run goes on from there"


def test_the_methods_that_flags_describe() -> None:
    def method_of(*flags: str) -> Any:
        return parse(Options, description="", arguments=list(flags)).method()

    assert method_of("--method", "lora") == LoRA()
    assert method_of("--method", "ia3") == IA3()
    own = ("--target-modules", "v_proj", "up_proj", "--feedforward-modules", "up_proj", "--modules-to-save", "norm")
    assert method_of("--method", "ia3", *own) == IA3(("v_proj", "up_proj"), ("up_proj",), modules_to_save=("norm",))
    assert method_of("--method", "prompt-tuning") == PromptTuning(20)
    text = ("--prompt-init", "text", "--prompt-init-text", "Answer:")
    assert method_of("--method", "prompt-tuning", *text) == PromptTuning(20, "TEXT", "Answer:")
    flags = ("--prompt-encoder", "lstm", "--encoder-hidden-size", "16", "--encoder-layers", "1", "--encoder-dropout", "0.1")
    assert method_of("--method", "p-tuning", *flags) == PTuning(20, "LSTM", 16, 1, 0.1)
    flags = ("--virtual-tokens", "7", "--prefix-projection", "--encoder-hidden-size", "16")
    assert method_of("--method", "prefix-tuning", *flags) == PrefixTuning(7, True, 16)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"virtual_tokens": 5}, "virtual_tokens: expected none with method lora"),
        ({"method": "ia3", "prefix_projection": True}, "prefix_projection: expected none with method ia3"),
        ({"method": "prefix-tuning", "prompt_init": "vocabulary"}, "prompt_init: expected none with method prefix-tuning"),
        ({"method": "prefix-tuning", "encoder_hidden_size": 5}, "encoder_hidden_size: expected prefix_projection"),
        ({"method": "p-tuning", "encoder_layers": 1}, "encoder_layers: expected prompt_encoder lstm beside it"),
        ({"method": "prompt-tuning", "virtual_tokens": 0}, "virtual_tokens: expected at least 1, found 0"),
        ({"method": "prompt-tuning", "prompt_init": "text"}, "init_text: expected one with init TEXT"),
    ],
)
def test_options_of_another_method(tuning: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuningOptions(**tuning)


def test_options_of_lora_beside_another_method() -> None:
    for method in ("ia3", "prefix-tuning"):
        with pytest.raises(ValueError, match=f"rank: expected none with method {method}"):
            Options(lora=LoRAOptions(rank=4), tuning=TuningOptions(method)).check()  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="target_modules: expected none with method p-tuning"):
        Options(lora=LoRAOptions(target_modules=("q_proj",)), tuning=TuningOptions("p-tuning")).check()
    with pytest.raises(ValueError, match="adapter: is of its own method"):
        Options(model=ModelOptions(adapter="some"), tuning=TuningOptions("ia3")).check()


def test_rates() -> None:
    methods = (IA3(), PromptTuning(), PTuning(), PrefixTuning(), PrefixTuning(projection=True))
    rates = [OptimizerOptions().peak_learning_rate(10**10, SFT, method) for method in methods]
    assert rates == [3e-3, 3e-2, 1e-3, 1e-2, 1e-3]
    assert LoRA().default_learning_rate is None
    assert OptimizerOptions().peak_learning_rate(10**10, SFT, FullFineTuning()) == pytest.approx(2e-5)
    assert OptimizerOptions().peak_learning_rate(1, DPO, PrefixTuning()) == pytest.approx(5e-4)
    assert OptimizerOptions(optimizer="lion").peak_learning_rate(1, SFT, PrefixTuning()) == pytest.approx(1e-3)


def test_plans_count_virtual_tokens(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    config = causal_family_of(checkpoint.config).config(checkpoint.config)
    plans = {}
    for method, tokens in (("prompt-tuning", 64), ("prompt-tuning", 128), ("prefix-tuning", 64)):
        options = options_of(tiny_llama, data, tmp_path, method=method, virtual_tokens=tokens)
        plans[method, tokens] = quick_plan(step_spec(options, config, "cpu"), "cpu")
    assert plans["prompt-tuning", 64].adapter == 64 * 64 * 4
    assert plans["prefix-tuning", 64].adapter == 64 * 2 * 2 * 32 * 4
    assert plans["prompt-tuning", 128].residuals * 128 == plans["prompt-tuning", 64].residuals * 192
