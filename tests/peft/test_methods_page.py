"""docs/methods.md: the method that it adds in one file is short, trains, and goes through files and merging."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from method_peer import largest

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.cli import parse
from qlora_jax.errors import OptionError
from qlora_jax.export.merge import merge
from qlora_jax.finetune import LoRAOptions
from qlora_jax.finetune.options.tuning import tuning_options
from qlora_jax.peft import METHODS, FieldErrors
from qlora_jax.train import adamw, create_state, jit_train_step, language_model_loss, split

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def test_a_method_in_one_file(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 66
    (tmp_path / "rank_one.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("rank_one", tmp_path / "rank_one.py")
    assert spec is not None
    assert spec.loader is not None
    page: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    monkeypatch.setitem(METHODS, page.RankOne.name, page.RankOne)

    method, tokens = page.RankOne(), np.arange(3, 35, dtype=np.int32).reshape(2, 16)
    checkpoint = open_checkpoint(str(tiny_llama))

    def fresh(method: Any, checkpoint: Any = checkpoint) -> Any:
        return load_model(checkpoint, quantization=None, method=method, dtype=jnp.float32, progress=False)

    graph, adapter, frozen = split(fresh(method))
    tx = adamw(1e-2)
    state, losses = create_state(tx, adapter), []
    step = jit_train_step(graph, tx, language_model_loss, state)
    batch = {"inputs": tokens[None, :, :-1], "targets": tokens[None, :, 1:], "loss_mask": np.ones((1, 2, 15), np.float32)}
    for _ in range(5):
        state, metrics = step(state, frozen, {name: jnp.asarray(value) for name, value in batch.items()})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    trained = nnx.merge(graph, state.adapter, frozen)

    save_adapter(trained, tmp_path / "adapter")
    assert read_adapter_method(tmp_path / "adapter") == method
    loaded = load_adapter(fresh(method), tmp_path / "adapter")
    assert largest(loaded(tokens), trained(tokens)) < 1e-5
    merge(checkpoint, read_adapter(tmp_path / "adapter"), tmp_path / "merged", dtype="float32", progress=False)
    merged = fresh(None, open_checkpoint(str(tmp_path / "merged")))
    assert largest(merged(tokens), trained(tokens)) < 1e-4
    assert largest(merged(tokens), fresh(None)(tokens)) > 1e-2

    # The command line knows it, with the options that it declares.
    flags = ["--method", "rank-one"]
    options = parse(tuning_options(METHODS), description="", arguments=flags)
    assert options.build(LoRAOptions(target_modules=("v_proj",)).values()) == page.RankOne(("v_proj",))
    with pytest.raises(ValueError, match="virtual_tokens: expected none with method rank-one, found 3"):
        tuning_options(METHODS)(method="rank-one", virtual_tokens=3)

    # What it does not support is an error.
    stack = {"q_proj": [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]}
    with pytest.raises(OptionError, match="target_modules: expected all layers of a stack or none, found"):
        page.RankOne(("layers.1.self_attn.q_proj",)).targets(stack)
    with pytest.raises(FieldErrors, match="target_modules: expected names or one regular expression, found None"):
        page.RankOne.from_peft({"peft_type": "RANK_ONE"})
