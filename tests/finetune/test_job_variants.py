"""DoRA, LoRA+ and the starts of LoRA in the main job, end to end on a tiny model: what a run saves is what it trained.

References: the held-out loss of a run that goes on from the saved adapter, before its first step; the merged model; log 2.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.metadata import read_adapter_metadata
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.export.drift import logit_drift, sample_logits
from qlora_jax.export.merge import merge
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
from qlora_jax.peft import LoRA

TOKENS = [np.arange(3, 23, dtype=np.int32)[None]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    rows = [{"question": f"{n}?", "answer": "one two three four"[: 3 + n % 15]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options_of(model: Path, data: Path, output: Path, **lora: Any) -> Options:
    return Options(
        model=ModelOptions(model=str(model)),
        lora=LoRAOptions(rank=4, alpha=8.0, **lora),
        data=DataOptions(data=str(data), max_length=64, held_out=0.3),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        run=RunOptions(output=output, max_steps=2, eval_every=0, save_every=0, samples=0, memory_check=True),
    )


def evaluated(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["eval_loss"] for row in rows if "eval_loss" in row]


@pytest.mark.integration
def test_dora(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """It starts as the base is, learns, and the files say what it is."""
    folder = finetune(options_of(tiny_llama, data, tmp_path / "run", use_dora=True), progress=False)
    first, *_, last = evaluated(tmp_path / "run")
    assert last < first - 1e-3
    adapter = read_adapter(folder)
    assert isinstance(adapter.method, LoRA)
    assert adapter.method.use_dora
    base = load_model(open_checkpoint(str(tiny_llama)), method=adapter.method, progress=False)
    changed = [
        np.abs(adapter.tensors[name] - before).max() for name, before in adapter_tensors(base).items() if "magnitude" in name
    ]
    assert len(changed) == 14
    assert min(changed) > 1e-4


@pytest.mark.integration
def test_pissa_saves_what_it_trained(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """A run that goes on from the files starts where this one ended; merging onto the rounded base gives its logits."""
    options = options_of(tiny_llama, data, tmp_path / "run", init_lora_weights="pissa", rank_pattern={"q_proj": 3})
    folder = finetune(options, progress=False)
    first, *_, last = evaluated(tmp_path / "run")
    assert last < first - 1e-3
    record, method = read_adapter_metadata(folder), read_adapter(folder).method
    assert record is not None
    assert record.converted_from == "pissa"
    assert isinstance(method, LoRA)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "(`pissa`)" in card
    assert "load_in_4bit" not in card
    assert (method.rank, method.rank_pattern, method.init_lora_weights) == (8, (("q_proj", 6),), True)
    more = dataclasses.replace(
        options,
        model=ModelOptions(model=str(tiny_llama), adapter=str(folder)),
        lora=LoRAOptions(),
        run=dataclasses.replace(options.run, output=tmp_path / "more", max_steps=1),
    )
    again = finetune(more, progress=False)
    assert evaluated(tmp_path / "more")[0] == pytest.approx(last, abs=1e-5)
    assert read_adapter_metadata(again) == record
    assert read_adapter(again).method == method

    tuned = open_pretrained(model=str(tiny_llama), adapter=str(folder), dtype="float32")
    assert tuned.subtracted is not None
    assert tuned.adapter is not None
    merge(
        tuned.checkpoint,
        tuned.adapter,
        tmp_path / "merged",
        dtype="float32",
        from_dequantized=tuned.quantization,
        subtracted=tuned.subtracted,
        progress=False,
    )
    merged = load_model(open_checkpoint(str(tmp_path / "merged")), quantization=None, dtype="float32", progress=False)
    logits = [sample_logits(model, TOKENS) for model in (tuned.load(progress=False), merged)]
    assert logit_drift(*logits).max < 1e-4


@pytest.mark.integration
def test_loftq(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    folder = finetune(
        options_of(tiny_llama, data, tmp_path / "run", init_lora_weights="loftq", loftq_iter=2), progress=False
    )
    first, *_, last = evaluated(tmp_path / "run")
    assert last < first - 1e-3
    record, method = read_adapter_metadata(folder), read_adapter(folder).method
    assert record is not None
    assert record.converted_from == "loftq"
    assert isinstance(method, LoRA)
    assert method.rank == 8


@pytest.mark.integration
def test_eva_and_loraplus(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    """One step of Adam moves each value of B by its learning rate, and leaves A nearly as EVA made it: orthonormal."""
    options = options_of(tiny_llama, data, tmp_path / "run", init_lora_weights="eva")
    options = dataclasses.replace(
        options,
        optimizer=OptimizerOptions(learning_rate=1e-4, loraplus_lr_ratio=20.0, warmup_ratio=0.0),
        run=dataclasses.replace(options.run, max_steps=1),
    )
    adapter = read_adapter(finetune(options, progress=False))
    assert isinstance(adapter.method, LoRA)
    assert adapter.method.init_lora_weights == "eva"
    moved = [np.abs(tensor).max() for name, tensor in adapter.tensors.items() if "lora_B" in name]
    assert np.median(moved) == pytest.approx(2e-3, rel=0.05)
    for tensor in (tensor for name, tensor in adapter.tensors.items() if "lora_A" in name):
        np.testing.assert_allclose(tensor @ tensor.T, np.eye(4), atol=0.01)


@pytest.mark.integration
def test_preferences_from_pissa(tiny_llama: Path, tmp_path: Path) -> None:
    """DPO's reference is what training starts from, so that the first loss is that of indifference."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "chosen": "yes" * (1 + n % 3), "rejected": "no"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = options_of(tiny_llama, path, tmp_path / "run", init_lora_weights="pissa")
    options = dataclasses.replace(
        options,
        objective=ObjectiveOptions(objective="dpo"),
        optimizer=OptimizerOptions(learning_rate=1e-3, loraplus_lr_ratio=16.0, host_offload=True),
    )
    finetune(options, progress=False)
    first, *_, last = evaluated(tmp_path / "run")
    assert first == pytest.approx(np.log(2), abs=1e-5)
    assert last < first
