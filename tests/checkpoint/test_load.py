"""Filling a model from a checkpoint: what is checked before and while its tensors are read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import default_dtype, load_model
from qlora_jax.errors import CheckpointError
from qlora_jax.models import CausalLM
from qlora_jax.models.llama import llama_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import (
    EmbeddingStorage,
    Quantization,
    QuantizedTensor,
    dequantize,
    embedding_lookup,
    quantize,
    quantize_embedding,
)

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def checkpoint_of(tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG) -> Checkpoint:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Checkpoint("memory", config, shapes, tensors.__getitem__)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """bfloat16 tensors under Hugging Face's names, in Hugging Face's orientation."""
    config = llama_config(CONFIG)
    model = CausalLM(config, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for key in config.parameter_mappings:
        value: Any = model
        for name in key.path:
            value = getattr(value, name)
        shape = value.shape[1:] if key.stacked else value.shape
        for name in key.names():
            tensor = generator.standard_normal(shape[::-1] if key.linear else shape, np.float32)
            found[name] = tensor.astype(ml_dtypes.bfloat16)
    return found


def load(tensors: dict[str, np.ndarray], **options: Any) -> CausalLM:
    return load_model(checkpoint_of(tensors), **({"progress": False} | options))


def test_every_tensor_lands_in_its_layer(tensors: dict[str, np.ndarray]) -> None:
    model = load(tensors, quantization=None, dtype=jnp.float32)
    for layer in range(2):
        for block, name in (("self_attn", "k_proj"), ("mlp", "down_proj")):
            ours = getattr(getattr(model.layers, block), name).weight[...][layer]
            np.testing.assert_array_equal(ours, tensors[f"model.layers.{layer}.{block}.{name}.weight"].T)
        ours = model.layers.input_layernorm.weight[...][layer]
        np.testing.assert_array_equal(ours, tensors[f"model.layers.{layer}.input_layernorm.weight"])
    np.testing.assert_array_equal(model.head.weight, tensors["lm_head.weight"])


@pytest.mark.parametrize("quantization", [Quantization(), Quantization("int4", 32, False)], ids=str)
def test_quantized_layers_equal_quantize(tensors: dict[str, np.ndarray], quantization: Quantization) -> None:
    model = load(tensors, quantization=quantization, dtype=jnp.float32)
    for name, inputs in (
        ("up_proj", 64),
        ("down_proj", 96),
    ):  # the column layout, and for blocks of 64 the flat one
        stacked = getattr(model.layers.mlp, name).weight.get_value()
        assert isinstance(stacked, QuantizedTensor)
        assert stacked.shape[1] == inputs
        for layer in range(2):
            expected = quantize(
                jnp.asarray(tensors[f"model.layers.{layer}.mlp.{name}.weight"]).T,
                quantization.data_type,
                quantization.block_size,
                quantization.double_quantization,
            )
            found = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            np.testing.assert_array_equal(dequantize(found, jnp.float32), dequantize(expected, jnp.float32))
    assert not isinstance(model.embed_tokens.weight.get_value(), QuantizedTensor)


def test_problems_of_all_kinds_come_in_one_message(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.experts.weight"] = np.zeros((2, 2), np.float32)
    del tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 96), np.float32)
    with pytest.raises(CheckpointError) as caught:
        load(tensors)
    for part in (
        "3 problems",
        "missing tensors (2): model.norm.weight, model.layers.0.self_attn.q_proj.weight",
        "no place for (1): model.layers.1.mlp.experts.weight",
        "wrong shapes (1): model.layers.1.mlp.up_proj.weight: expected (96, 64), found (64, 96)",
    ):
        assert part in str(caught.value)


def test_nothing_is_read_before_all_is_checked(tensors: dict[str, np.ndarray]) -> None:
    def read(name: str) -> np.ndarray:
        raise AssertionError(f"{name} was read")

    del tensors["model.norm.weight"]
    checkpoint = dataclasses.replace(checkpoint_of(tensors), read=read)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_model(checkpoint, progress=False)


def test_a_long_list_of_names_is_cut(tensors: dict[str, np.ndarray]) -> None:
    kept = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    with pytest.raises(CheckpointError, match=r"missing tensors \(18\): .* and 10 more"):
        load(kept)


def test_computed_and_tied_tensors_are_no_surplus(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    load_model(checkpoint_of(tensors, CONFIG | {"tie_word_embeddings": True}), progress=False)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate_proj.weight", "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_named(tensors: dict[str, np.ndarray], name: str, value: float) -> None:
    tensors[name] = tensors[name].copy()
    tensors[name].reshape(-1)[5] = value
    with pytest.raises(CheckpointError, match=f"tensors that hold NaN or infinite values: {name}$"):
        load(tensors)


def test_an_unsupported_architecture_lists_those_that_are(tensors: dict[str, np.ndarray]) -> None:
    other = CONFIG | {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    with pytest.raises(ValueError, match=r"'mamba' \(architectures \['MambaForCausalLM'\]\).* supported: .*llama"):
        load_model(checkpoint_of(tensors, other), progress=False)


def test_adapter_is_fresh_and_follows_the_seed(tensors: dict[str, np.ndarray]) -> None:
    def adapter(seed: int) -> Any:
        model = load(tensors, method=LoRA(rank=3, target_modules=("q_proj",)), seed=seed)
        assert model.layers.self_attn.k_proj.adapter is None
        return model.layers.self_attn.q_proj

    layer = adapter(0)
    assert layer.adapter.lora_a.shape == (2, 64, 3)
    assert layer.adapter.lora_b.shape == (2, 3, 64)
    assert not np.any(layer.adapter.lora_b[...])
    a = np.asarray(layer.adapter.lora_a[...])
    assert 0.9 < np.abs(a).max() * 64**0.5 <= 1
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(a, adapter(0).adapter.lora_a[...])
    assert not np.array_equal(a, adapter(1).adapter.lora_a[...])


@pytest.mark.parametrize(("platform", "dtype"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16), ("tpu", jnp.bfloat16)])
def test_default_dtype(platform: str, dtype: Callable[..., Any]) -> None:
    assert default_dtype(platform) == dtype


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_packed_tables_are_filled_by_parts(
    tensors: dict[str, np.ndarray], storage: EmbeddingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_jax.checkpoint.fill._EMBEDDING_ROWS", 10)
    model = load(tensors, embedding_storage=storage)
    for name, module in (("model.embed_tokens.weight", model.embed_tokens), ("lm_head.weight", model.lm_head)):
        assert module is not None
        whole = quantize_embedding(jnp.asarray(tensors[name]), storage, default_dtype())
        for found, expected in zip(jax.tree.leaves(module.weight.get_value()), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(found, expected)
    tokens = jnp.asarray([[1, 5, 36]])
    dense = load(
        tensors
        | {
            name: np.asarray(
                embedding_lookup(quantize_embedding(jnp.asarray(tensors[name], jnp.float32), storage), jnp.arange(37))
            )
            for name in ("model.embed_tokens.weight", "lm_head.weight")
        }
    )
    np.testing.assert_allclose(model(tokens), dense(tokens), atol=1e-4)


def test_a_packed_table_that_is_not_finite_is_an_error(tensors: dict[str, np.ndarray]) -> None:
    tensors["lm_head.weight"][36, 3] = np.nan
    with pytest.raises(CheckpointError, match=r"NaN or infinite values: lm_head\.weight"):
        load(tensors, embedding_storage="int8")


def test_all_of_a_packed_table_does_not_train(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="trains in full: expected embedding_storage none"):
        load(tensors, embedding_storage="nf4", method=LoRA(2, modules_to_save=("lm_head",)))
