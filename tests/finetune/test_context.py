"""Training beyond a model's context: LongLoRA's recipe in the main job; every later program scales positions alike."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import but

from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.metadata import read_adapter_metadata
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.commands import merge
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, OptimizerOptions, Options, RunOptions, finetune
from qlora_jax.finetune.options.context import ContextOptions
from qlora_jax.finetune.prepare import prepare
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import CausalLM, RopeScaling, family_of

WORDS = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")


@pytest.fixture(scope="module")
def short_llama(make_tiny_llama: Callable[..., Path]) -> Path:
    """A model with a context of 32 tokens."""
    return make_tiny_llama(max_position_embeddings=32)


@pytest.fixture(scope="module")
def options(short_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Options:
    folder = tmp_path_factory.mktemp("context")
    data = folder / "colours.jsonl"
    rows = [{"question": f"{n}?", "answer": " ".join(WORDS[(n + i) % 8] for i in range(12))} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Options(
        model=ModelOptions(model=str(short_llama)),
        lora=LoRAOptions(rank=4, alpha=8.0),
        data=DataOptions(data=str(data), max_length=100, held_out=0.2),
        optimizer=OptimizerOptions(learning_rate=1e-2),
        run=RunOptions(output=folder / "run", max_steps=4, eval_every=4, save_every=0, samples=1),
        context=ContextOptions(longlora=True),
    )


@pytest.fixture(scope="module")
def adapter(options: Options) -> Path:
    return finetune(options, progress=False)


@pytest.mark.integration
def test_longlora_trains_norms_and_table_and_is_dense_afterwards(adapter: Path, options: Options) -> None:
    """Evaluation and the answers after the run see all of a row; the loss there falls."""
    read = read_adapter(adapter)
    assert read.method.modules_to_save == ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm")
    assert read_adapter_metadata(adapter).scaling == RopeScaling("linear", 4)  # type: ignore[union-attr]
    trained = {name for name in read.tensors if "lora" not in name}
    assert len(trained) == 1 + 1 + 2 * 2  # the table, the last norm, two norms a layer
    base = open_checkpoint(str(options.model.model))
    for name in trained:
        before = base.read(name.removeprefix("base_model.model."))
        assert np.abs(read.tensors[name] - before).max() > 1e-4, name
    rows = [json.loads(line) for line in (options.run.output / "metrics.jsonl").read_text("utf-8").splitlines()]
    held_out = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert held_out[-1] < held_out[0] - 0.1


@pytest.mark.integration
def test_the_model_is_loaded_with_the_scaling_of_the_training(adapter: Path, options: Options) -> None:
    tuned = open_pretrained(model=options.model.model, adapter=str(adapter))
    assert tuned.checkpoint.config["max_position_embeddings"] == 128
    model = tuned.load(progress=False)
    assert isinstance(model, CausalLM)
    assert dict(model.config.kinds[0].rope.scaling)["factor"] == 4  # type: ignore[union-attr]
    alone = open_pretrained(model=options.model.model)
    assert alone.checkpoint.config["max_position_embeddings"] == 32


def test_a_merged_model_is_scaled_in_transformers(adapter: Path, options: Options, tmp_path: Path) -> None:
    torch: Any = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    from transformers import AutoModelForCausalLM

    arguments = ["--model", str(options.model.model), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert merge.main([*arguments, "--dtype", "float32", "--base", "dequantized", "--no-compare"]) == 0
    config = json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4, "rope_theta": 10000.0}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, 250, (1, 100))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    model: Any = open_pretrained(model=options.model.model, adapter=str(adapter)).load(progress=False)
    found = jax.jit(lambda tokens: model(tokens))(jnp.asarray(tokens, jnp.int32))
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.integration
def test_a_run_that_goes_on_keeps_the_scaling(adapter: Path, options: Options, tmp_path: Path) -> None:
    more = dataclasses.replace(
        options,
        model=ModelOptions(model=options.model.model, adapter=str(adapter)),
        lora=LoRAOptions(),
        run=RunOptions(output=tmp_path / "more", max_steps=1, eval_every=0, save_every=0, samples=0),
        context=ContextOptions(attention_groups=2),
    )
    record = read_adapter_metadata(finetune(more, progress=False))
    assert record is not None
    assert record.scaling == RopeScaling("linear", 4)


def test_rows_beyond_the_context_are_named(options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = dataclasses.replace(
        options,
        context=ContextOptions(),
        run=RunOptions(output=tmp_path / "plain", max_steps=1, eval_every=0, save_every=0, samples=0),
    )
    finetune(plain, progress=False)
    assert "Rows of 100 tokens are beyond the model's context of 32" in capsys.readouterr().err


def test_a_plan_takes_the_same_options(options: Options) -> None:
    hf_config = open_checkpoint(str(options.model.model)).config
    config = family_of(hf_config).config(hf_config)
    spec = step_spec(options, config, "cuda")
    assert spec.objective.attention_groups == 4
    assert spec.model.method.modules_to_save[0] == "embed_tokens"
    plain = step_spec(dataclasses.replace(options, context=ContextOptions()), config, "cuda")
    assert plain.objective.attention_groups == 1


def test_options_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="attention_groups: expected at least 1, found 0"):
        ContextOptions(attention_groups=0)
    with pytest.raises(ValueError, match="rope_factor: expected rope_scaling beside it, found 4 alone"):
        ContextOptions(rope_factor=4.0)
    with pytest.raises(ValueError, match="rope_scaling: expected one of linear, dynamic, yarn, found 'ntk'"):
        ContextOptions(rope_scaling="ntk")  # type: ignore[arg-type]
    config = family_of({"model_type": "llama"}).config(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
        }
    )
    assert ContextOptions(longlora=True).scaling(config, 64) is None  # there is room
    assert ContextOptions(rope_scaling="yarn").scaling(config, 65) == RopeScaling("yarn", 2)
    assert ContextOptions(rope_scaling="yarn", rope_factor=3.0).scaling(config, 32) == RopeScaling("yarn", 3.0)
    with pytest.raises(ValueError, match="expected rope_factor, or max_length beyond the model's context of 64, found 64"):
        ContextOptions(rope_scaling="linear").scaling(config, 64)
    with pytest.raises(ValueError, match="expected a decoder-only model and objective sft, found dpo"):
        ContextOptions(longlora=True).check(config, "dpo")


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 48,
}


@pytest.mark.parametrize("packing", [False, True])
def test_rows_carry_their_positions_where_these_depend_on_the_length(
    options: Options, make_tiny_llama: Callable[..., Path], tmp_path: Path, packing: bool
) -> None:
    """A row that is padded to the length of a longer one keeps the frequencies of its own."""
    changed = dataclasses.replace(but(options, "data", packing=packing), context=ContextOptions())
    for model, expected in ((make_tiny_llama(rope_parameters=LONGROPE), 1), (options.model.model, packing)):
        run = but(but(changed, "model", model=str(model)), "run", output=tmp_path / str(expected))
        arrays = prepare(run, progress=False).spec.objective.arrays
        assert [array.name for array in arrays].count("positions") == expected


@pytest.mark.integration
def test_a_run_with_rows_on_both_sides_of_the_original_context(
    options: Options, make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = str(make_tiny_llama(rope_parameters=LONGROPE))
    changed = but(but(options, "model", model=model), "run", output=tmp_path / "run")
    folder = finetune(dataclasses.replace(changed, context=ContextOptions()), progress=False)
    assert read_adapter(folder).tensors
