"""Full fine-tuning against PyTorch on the same model, and what a run of it leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from method_peer import MethodPeer, largest, our_losses, random_batches, randomised, run
from tiers import tiered

from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.finetune import DataOptions, ModelOptions, Options, RunOptions, TuningOptions, finetune
from qlora_jax.finetune.saving import save_trained
from qlora_jax.peft import FullFineTuning
from qlora_jax.quant import Quantization
from qlora_jax.train import split

RATE = 1e-2


@pytest.mark.parametrize(
    ("family", "fields"),
    tiered(
        [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gpt_neox", {})],
        quick=[("llama", {"tie_word_embeddings": True})],
    ),
    ids=str,
)
def test_the_same_training(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    """With a tied head, with biases, with layer norms; and the saved model is PyTorch's."""
    peer, data = MethodPeer(tmp_path / "base", family, **fields), random_batches(False)
    start = peer.ours(FullFineTuning())
    assert largest(run(start), peer.logits(peer.base())) < 1e-4
    ours, model = our_losses(start, data, RATE)
    trained = peer.base()
    assert largest(ours, peer.losses(trained, data, RATE)) < 1e-3
    assert largest(ours, peer.losses(peer.base(), data, 1e-9)) > 1e-2, "training moves the loss"
    base = SimpleNamespace(name=str(peer.folder))
    pretrained = SimpleNamespace(base=base, adapter=None, checkpoint=open_checkpoint(base.name), tokenizer=None)
    options = SimpleNamespace(run=SimpleNamespace(output=tmp_path / "run"))
    prepared = SimpleNamespace(options=options, pretrained=pretrained, method=FullFineTuning(), progress=False)
    run_of_it: Any = SimpleNamespace(prepared=prepared, model=model, subtracted=None)
    folder = save_trained(run_of_it, lambda new: None)
    saved = peer.kind.from_pretrained(folder, dtype=peer.torch.float32)
    assert largest(peer.logits(saved), run(model)) < 1e-4
    for name, parameter in trained.named_parameters():
        moved = np.abs(parameter.detach().numpy() - saved.state_dict()[name].numpy())
        # Not the mean: a bias of keys has no gradient but rounding, which Adam makes steps of.
        assert np.median(moved) < 1e-3, name


@pytest.mark.parametrize(("asked", "expected"), [("auto", "bfloat16"), ("float32", "float32")])
def test_the_dtype_of_what_is_saved(tmp_path: Path, asked: str, expected: str) -> None:
    """That of the base unless another is asked for, whatever the compute type was; see `test_the_same_training`."""
    peer = MethodPeer(tmp_path / "base", "llama")
    peer.base().to(peer.torch.bfloat16).save_pretrained(peer.folder)
    checkpoint = open_checkpoint(str(peer.folder))
    method = FullFineTuning(save_dtype=asked)
    pretrained = SimpleNamespace(base=SimpleNamespace(name="base"), adapter=None, checkpoint=checkpoint, tokenizer=None)
    options = SimpleNamespace(run=SimpleNamespace(output=tmp_path / "run"))
    prepared = SimpleNamespace(options=options, pretrained=pretrained, method=method, progress=False)
    run_of_it: Any = SimpleNamespace(prepared=prepared, model=peer.ours(method), subtracted=None)
    folder = save_trained(run_of_it, lambda new: None)
    assert json.loads((folder / "config.json").read_text())["dtype"] == expected
    assert {str(dtype) for dtype in open_checkpoint(str(folder)).dtypes.values()} == {expected}


def test_every_parameter_trains(tmp_path: Path) -> None:
    peer = MethodPeer(tmp_path / "base", "qwen2")
    _, adapter, _ = split(peer.ours(FullFineTuning()))
    count = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert count == sum(parameter.numel() for parameter in peer.base().parameters())
    moved = randomised(peer.ours(FullFineTuning()))
    assert largest(run(moved), run(peer.ours(FullFineTuning()))) > 0.1
    names = {name.removeprefix("base_model.model.") for name in adapter_tensors(moved)}
    assert names == set(open_checkpoint(str(peer.folder)).shapes)


def test_what_cannot_be(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ValueError, match="expected a decoder-only model"):
        MethodPeer(tmp_path / "t5", "t5").ours(FullFineTuning())
    packed = load_model(
        open_checkpoint(str(tiny_llama)), quantization=Quantization(), method=FullFineTuning(), progress=False
    )
    with pytest.raises(ValueError, match=r"expected dense linear layers \(data_type none\), found 4-bit ones"):
        packed(np.ones((1, 4), np.int32))
    tuning = TuningOptions(method="full")
    for options, message in (
        (
            Options(tuning=tuning),
            "data_type, embedding_storage: expected none and none with method full, found nf4 and none",
        ),
        (
            Options(ModelOptions(data_type="none", adapter="somewhere"), tuning=tuning),
            "adapter: expected none with method full, found somewhere; merge it first",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            options.check()


def test_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    """It learns, and the model that it leaves is what was measured."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": "blue"}) + "\n" for n in range(20)), encoding="utf-8")
    options = Options(
        ModelOptions(model=str(tiny_llama), data_type="none"),
        data=DataOptions(data=str(data), max_length=64),
        run=RunOptions(output=tmp_path / "run", max_steps=4, eval_every=0, samples=0),
        tuning=TuningOptions(method="full"),
    )
    folder = finetune(options, progress=False)
    assert folder == tmp_path / "run" / "model"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1
    assert "All parameters" in (folder / "README.md").read_text(encoding="utf-8")
    again = Options(
        ModelOptions(model=str(folder), data_type="none"),
        data=options.data,
        run=RunOptions(output=tmp_path / "again", max_steps=1, eval_every=0, samples=0),
        tuning=TuningOptions(method="full"),
    )
    finetune(again, progress=False)
    first = json.loads((tmp_path / "again" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert abs(first["eval_loss"] - rows[-1]["eval_loss"]) < 1e-4
    assert open_pretrained(str(folder)).adapter is None
