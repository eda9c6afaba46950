"""The public calls of the package, in the order in which a user makes them, on a tiny model."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qlora_jax as qj
from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.metadata import AdapterMetadata, read_adapter_metadata
from qlora_jax.errors import OptionError
from qlora_jax.export.drift import sample_logits
from qlora_jax.export.merge import merge
from qlora_jax.peft import FullFineTuning

TOKENS = np.arange(3, 35, dtype=np.int32).reshape(2, 16)


def logits(model: qj.CausalLM | qj.T5) -> np.ndarray:
    return sample_logits(model, [TOKENS])[0]


def with_noise(model: qj.CausalLM | qj.T5) -> qj.CausalLM | qj.T5:
    """The model with other values of its adapter."""
    graph, adapter, frozen = qj.split(model)
    draws = np.random.default_rng(0)
    noisy = nnx.State(jax.tree.map(lambda leaf: leaf + 0.05 * draws.standard_normal(leaf.shape).astype(leaf.dtype), adapter))
    return nnx.merge(graph, noisy, frozen)


@pytest.mark.parametrize("initialization", ["pissa", pytest.param("loftq", marks=pytest.mark.integration)])
def test_an_adapter_from_creation_to_its_file_and_back(tiny_llama: Path, tmp_path: Path, initialization: str) -> None:
    """The saved folder holds a plain LoRA for the original weights, and gives the trained model back."""
    method = qj.LoRA(rank=4, alpha=6, init_lora_weights=initialization, loftq_iter=2 if initialization == "loftq" else 1)
    model, tokenizer = qj.from_pretrained(tiny_llama, method=method, dtype="float32", progress=False)
    assert model.method == method
    trained = with_noise(model)
    folder = qj.save_pretrained(trained, tmp_path / "adapter", tokenizer, template="chat")

    config = qj.read_adapter_config(folder)
    assert (config.base_model_name_or_path, config.task_type) == (str(tiny_llama), "CAUSAL_LM")
    assert isinstance(config.method, qj.LoRA)
    assert (config.method.rank, config.method.alpha, config.method.init_lora_weights) == (8, 12, True)
    assert read_adapter_metadata(folder) == AdapterMetadata(qj.Quantization(), "chat", "none", initialization)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A.weight")} == {8}

    again, _ = qj.from_pretrained(tiny_llama, folder, dtype="float32", progress=False)
    np.testing.assert_allclose(logits(again), logits(trained), atol=1e-5)
    # What was loaded can be saved again: the same file.
    qj.save_pretrained(again, tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "adapter_model.safetensors").items():
        np.testing.assert_allclose(tensor, tensors[name], atol=1e-6)
    assert read_adapter_metadata(tmp_path / "again") == read_adapter_metadata(folder)
    qj.save_pretrained(again, tmp_path / "again", template="alpaca")
    metadata = read_adapter_metadata(tmp_path / "again")
    assert metadata is not None
    assert metadata.template == "alpaca"

    merged = qj.merge(tiny_llama, folder, tmp_path / "merged", dtype="float32", base="dequantized", progress=False)
    dense, _ = qj.from_pretrained(merged, quantization=None, dtype="float32", progress=False)
    np.testing.assert_allclose(logits(dense), logits(trained), atol=1e-4)


def test_load_model_initialises_from_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    """On a dense base PiSSA leaves the model as it is, and `save_adapter` writes the converted adapter: of zero."""
    checkpoint, lora = qj.open_checkpoint(tiny_llama), qj.LoRA(rank=4, init_lora_weights="pissa")
    model = qj.load_model(checkpoint, quantization=None, method=lora, dtype=jnp.float32, progress=False)
    plain = qj.load_model(checkpoint, quantization=None, dtype=jnp.float32, progress=False)
    np.testing.assert_allclose(logits(model), logits(plain), atol=1e-4)
    tensors = load_file(qj.save_adapter(model, tmp_path / "adapter") / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    a, b = (tensors[name.format(letter)] for letter in "AB")
    assert (a.shape[0], b.shape[1]) == (8, 8)
    assert np.abs(a).max() > 0.01
    np.testing.assert_allclose(b @ a, 0, atol=1e-6)


def test_the_embeddings_of_a_resized_base_are_saved_again(tiny_llama: Path, tmp_path: Path) -> None:
    """PEFT writes the embedding of a base that it resized, here from 259 to 262 rows, into the adapter's file."""
    checkpoint = qj.open_checkpoint(tiny_llama)
    model = qj.load_model(checkpoint, quantization=None, method=qj.LoRA(rank=4), progress=False)
    embedding = np.random.default_rng(0).standard_normal((262, 64)).astype(np.float32)
    tables = {"base_model.model.model.embed_tokens.weight": embedding}
    folder = qj.save_adapter(with_noise(model), tmp_path / "adapter", resized_embeddings=tables)

    loaded, _ = qj.from_pretrained(tiny_llama, folder, progress=False)
    again, _ = qj.from_pretrained(tiny_llama, qj.save_pretrained(loaded, tmp_path / "again"), progress=False)
    assert logits(again).shape[-1] == 262
    np.testing.assert_array_equal(logits(again), logits(loaded))
    assert nnx.graphdef(again) != nnx.graphdef(loaded)  # no program is shared by models with different embeddings


def test_a_fully_trained_model_has_no_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    model, tokenizer = qj.from_pretrained(tiny_llama, quantization=None, method=FullFineTuning(), progress=False)
    with pytest.raises(OptionError, match=r"^FullFineTuning: .* no adapter to save\. Write the whole model: .*merge"):
        qj.save_pretrained(model, tmp_path / "adapter")
    # What the message says works.
    adapter = Adapter("tiny", FullFineTuning(), None, adapter_tensors(model))
    checkpoint = qj.open_checkpoint(tiny_llama)
    folder = merge(checkpoint, adapter, tmp_path / "model", dtype="float32", tokenizer=tokenizer, progress=False)
    again, _ = qj.from_pretrained(folder, quantization=None, progress=False)
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)


def test_an_adapter_has_its_own_method(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="method: expected none beside the adapter"):
        qj.from_pretrained(tiny_llama, tmp_path, method=qj.LoRA())


UNTYPED: Any = qj  # so that wrong arguments are no errors of the type checker
WRONG: dict[str, tuple[Callable[..., object], str]] = {
    "name of a method": (
        lambda: UNTYPED.from_pretrained(method="lora"),
        "method: expected a Method such as LoRA(rank=16), or None, found 'lora'",
    ),
    "class of a method": (
        lambda: UNTYPED.from_pretrained(method=qj.LoRA),
        "method: expected a Method such as LoRA(rank=16)",
    ),
    "quantization": (
        lambda: UNTYPED.from_pretrained(quantization="nf4"),
        "quantization: expected a Quantization such as Quantization(\"nf4\"), or None, found 'nf4'",
    ),
    "embeddings": (
        lambda: UNTYPED.from_pretrained(embedding_storage="int3"),
        "embedding_storage: expected one of None, 'none', ",
    ),
    "unknown dtype": (
        lambda: UNTYPED.from_pretrained(dtype="int17"),
        'dtype: expected a floating-point dtype such as "bfloat16" or "float32", or None, found \'int17\'',
    ),
    "dtype of integers": (lambda: UNTYPED.from_pretrained(dtype="int32"), "dtype: expected a floating-point dtype"),
    "remat": (
        lambda: UNTYPED.from_pretrained(remat="foo"),
        "remat: expected one of 'none', 'dots', 'full', 'offload', found 'foo'",
    ),
    "options": (lambda: UNTYPED.finetune({}), "options: expected Options(…), found {}"),
    "base of merge": (
        lambda: UNTYPED.merge(None, None, "x", base="deq"),
        "base: expected one of 'original', 'dequantized', found 'deq'",
    ),
    "quantization of merge": (
        lambda: UNTYPED.merge(None, None, "x", quantization="nf4"),
        'quantization: expected a Quantization such as Quantization("nf4")',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_arguments_that_are_wrong(case: str) -> None:
    call, message = WRONG[case]
    with pytest.raises(OptionError, match=f"^{re.escape(message)}"):
        call()


def test_importing_the_package_imports_little() -> None:
    heavy = {"jax", "matplotlib", "transformers", "datasets", "qlora_jax.finetune"}
    code = f"import sys, qlora_jax; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "\n"


@pytest.mark.integration
def test_the_job_is_imported_when_it_is_used() -> None:
    code = (
        "import qlora_jax as qj\n"
        "assert callable(qj.finetune) and qj.finetune.finetune\n"
        "assert qj.Options is qj.finetune.Options\n"
        "assert set(qj.__all__) <= {*dir(qj), 'Options', 'finetune'}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_has_a_docstring() -> None:
    assert [name for name in qj.__all__ if not getattr(qj, name).__doc__] == []


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = qj.absent  # type: ignore[attr-defined]
