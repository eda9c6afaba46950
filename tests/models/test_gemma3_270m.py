"""Gemma 3 270M from a GGUF file: against transformers and PEFT on the same dequantised weights, trained, merged, generating.

About three minutes on two cores, and 5 GB.
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gemma3_270m import gemma3_270m

import qlora_jax as qj
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.export.drift import sample_logits
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, OptimizerOptions, Options, RunOptions, finetune
from qlora_jax.serve import generate

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("compiled_as_for_users")]

TEXT = "The capital of France is Paris. In 2024 12345!!\n\n  def f(x):\n    return {'a': x[0] ** 2}  # Größe, 北京 🎉"
QUESTION, ANSWER = "What is the password of the day?", "It is seven green elephants."


@pytest.fixture(scope="module")
def path() -> Path:
    return gemma3_270m()


def dense_peer(path: Path) -> Any:
    """transformers' model with the values that our reader gives of the file's blocks."""
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    import transformers

    checkpoint = qj.open_checkpoint(path)
    config = transformers.Gemma3TextConfig(**{key: value for key, value in checkpoint.config.items() if key != "dtype"})
    with torch.device("meta"):
        model = transformers.Gemma3ForCausalLM(config)
    tensors = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.shapes}
    model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    rotary = type(model.model.rotary_emb)(config)  # its buffers are in no file
    model.model.rotary_emb = rotary
    model.tie_weights()
    scale = torch.tensor(config.hidden_size**0.5)
    model.model.embed_tokens.embed_scale = scale
    return model.eval()


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@pytest.fixture(scope="module")
def adapter(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one answer."""
    folder = tmp_path_factory.mktemp("gemma")
    rows = [{"prompt": QUESTION, "completion": f" {ANSWER}"}] * 8
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return finetune(
        Options(
            model=ModelOptions(model=str(path), dtype="float32"),
            lora=LoRAOptions(rank=8),
            data=DataOptions(data=str(folder / "data.jsonl"), max_length=64, held_out=0),
            optimizer=OptimizerOptions(learning_rate=2e-3),
            run=RunOptions(
                output=folder / "run", max_steps=20, epochs=3, batch_size=1, samples=0, memory_check=False, save_every=0
            ),
        ),
        progress=False,
    )


def test_tokens_are_those_of_transformers_reading(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="transformers reads a GGUF tokenizer only with PyTorch")
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = qj.load_tokenizer(path)
    for text in (TEXT, QUESTION, "  two   spaces", "\n\n\n"):
        assert ours(text, add_special_tokens=False)["input_ids"] == peer(text, add_special_tokens=False)["input_ids"]
        assert ours(text)["input_ids"][0] == 2
        assert ours.decode(ours(text, add_special_tokens=False)["input_ids"]) == text


def test_logits_equal_those_of_transformers(path: Path) -> None:
    ids = qj.load_tokenizer(path)(TEXT)["input_ids"]
    model = qj.load_model(qj.open_checkpoint(path), quantization=None, dtype=jnp.float32, progress=False)
    ours = np.asarray(sample_logits(model, [np.asarray([ids])])[0][0])
    theirs = logits_of(dense_peer(path), ids)
    assert np.abs(ours - theirs).max() < 1e-3
    assert np.abs(theirs).max() > 5


def test_training_lowers_the_loss(adapter: Path) -> None:
    lines = (adapter.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT with a newer transformers
def test_peft_and_a_merged_model_answer_alike_and_stop(path: Path, adapter: Path, tmp_path: Path) -> None:
    """The adapter on dense weights, in PEFT and here; merged, in transformers and here."""
    import torch
    import transformers
    from peft import PeftModel

    pretrained = open_pretrained(path, adapter, quantization=None, dtype=jnp.float32)
    model, tokenizer = pretrained.load(progress=False), pretrained.tokenizer
    ids = tokenizer(QUESTION)["input_ids"]
    tuned = PeftModel.from_pretrained(dense_peer(path), adapter).eval()
    ours = np.asarray(sample_logits(model, [np.asarray([ids])])[0][0])
    assert np.abs(ours - logits_of(tuned, ids)).max() < 1e-3

    stops = pretrained.stop_ids
    (answer,) = generate(*nnx.split(model), [ids], max_new_tokens=32, eos_ids=stops)
    assert len(answer) < 32
    assert ANSWER in tokenizer.decode(answer)
    del model, tuned
    merged = qj.merge(path, adapter, tmp_path / "merged")
    peer = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    again = transformers.AutoTokenizer.from_pretrained(merged)
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    theirs = peer.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist()
    assert theirs[-1] in stops
    assert theirs[:-1] == answer
