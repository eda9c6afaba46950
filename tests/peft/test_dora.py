"""DoRA against PEFT's in both directions of file exchange, and against its formula; what a fresh one changes: nothing."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from peft_peer import VOCABULARY, Peer, largest, random_tokens, randomised, run
from tiers import tiered

from qlora_jax.adapters.bind import load_adapter, save_adapter
from qlora_jax.adapters.files import read_adapter
from qlora_jax.adapters.peft_config import read_adapter_method
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM, ModelSpec
from qlora_jax.models.llama import llama_config
from qlora_jax.nn import LayerContext, Linear
from qlora_jax.peft import DoRALinear, LoRA
from qlora_jax.peft.dora import column_norms
from qlora_jax.peft.lora_linear import apply_dropout
from qlora_jax.plan import SIZES, quick_plan
from qlora_jax.quant import Quantization, dequantize, quantize
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.train import StepSpec, language_model_objective

TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CASES: dict[str, tuple[str, dict[str, Any]]] = {  # (family, fields of PEFT's LoraConfig)
    "ranks that differ, layers without": (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj", "model.layers.1.mlp.up_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7},
            "exclude_modules": ["model.layers.2.mlp.down_proj"],
        },
    ),
    "biases": ("qwen2", {"use_rslora": True}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi_0", "wo"]}),
}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Peer]:
    made: dict[str, Peer] = {}

    def peer(family: str) -> Peer:
        if family not in made:
            made[family] = Peer(tmp_path_factory.mktemp(family), family)
        return made[family]

    return peer


@pytest.mark.parametrize("case", tiered(CASES, quick=["ranks that differ, layers without"]))
def test_there_and_back(peers: Callable[[str], Peer], tmp_path: Path, case: str) -> None:
    """An adapter of PEFT's computes the same here, merged too; noise on it, saved from here, the same there."""
    family, fields = CASES[case]
    peer = peers(family)
    expected = peer.logits(peer.random_adapter(tmp_path / "theirs", use_dora=True, **fields))
    lora = read_adapter_method(tmp_path / "theirs")
    assert isinstance(lora, LoRA)
    assert lora.use_dora
    model = load_adapter(peer.ours(lora), tmp_path / "theirs")
    assert largest(run(model), expected) < TOLERANCE
    assert largest(peer.logits(peer.base()), expected) > 1000 * TOLERANCE, "the adapter has to be seen"

    moved = randomised(model)
    save_adapter(moved, tmp_path / "ours", base_model_name_or_path=str(peer.folder))
    theirs = peer.logits(peer.peft.PeftModel.from_pretrained(peer.base(), tmp_path / "ours"))
    assert largest(theirs, expected) > 1000 * TOLERANCE
    assert largest(run(moved), theirs) < TOLERANCE
    files = [safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert {name: tensor.shape for name, tensor in files[0].items()} == {n: t.shape for n, t in files[1].items()}

    merge(
        open_checkpoint(str(peer.folder)),
        read_adapter(tmp_path / "ours"),
        tmp_path / "merged",
        dtype="float32",
        progress=False,
    )
    merged = load_model(open_checkpoint(str(tmp_path / "merged")), quantization=None, progress=False)
    assert largest(run(merged), theirs) < TOLERANCE


@pytest.mark.parametrize("family", tiered(["llama", "t5"], quick=["llama"]))
def test_a_fresh_one_changes_nothing_of_a_quantised_model(peers: Callable[[str], Peer], tmp_path: Path, family: str) -> None:
    """It holds the lengths of the columns as they are stored in 4 bits; zeros for it are the base, too."""
    peer, lora = peers(family), LoRA(rank=4, use_dora=True)
    checkpoint = open_checkpoint(str(peer.folder))
    load = partial(load_model, checkpoint, quantization=Quantization(), dtype=jnp.float32, progress=False)
    bare, fresh = run(load(method=None)), load(method=lora)
    assert largest(bare, peer.logits(peer.base())) > 0.01, "4 bits have to be seen"
    assert largest(run(fresh), bare) < 1e-5
    graph, adapter, frozen = nnx.split(fresh, nnx.LoRAParam, ...)
    assert largest(run(nnx.merge(graph, jax.tree.map(jnp.zeros_like, adapter), frozen)), bare) < 1e-5

    save_adapter(fresh, tmp_path)
    name = "model.layers.1.mlp.down_proj" if family == "llama" else "encoder.block.1.layer.1.DenseReluDense.wo"
    stored = dequantize(quantize(jnp.asarray(checkpoint.read(f"{name}.weight"), jnp.float32).T))
    magnitude = read_adapter(tmp_path).tensors[f"base_model.model.{name}.lora_magnitude_vector"]
    np.testing.assert_allclose(magnitude, np.linalg.norm(np.asarray(stored), axis=0), rtol=1e-6)


def test_decoding_computes_the_same(peers: Callable[[str], Peer]) -> None:
    """A token at a time, where a layer's weight is named within its stack, against all at once."""
    checkpoint = open_checkpoint(str(peers("llama").folder))
    model = randomised(load_model(checkpoint, method=LoRA(rank=4, use_dora=True), dtype=jnp.float32, progress=False))
    assert isinstance(model, CausalLM)
    tokens = jnp.asarray(random_tokens(6))
    graph, state = nnx.split(model)

    @jax.jit
    def decode(state: Any, tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return nnx.merge(graph, state).decode(tokens, positions, cache)

    cache, expected = model.init_cache(2, 6), run_on(model, tokens)
    for position in range(6):
        positions = jnp.full((2, 1), position, jnp.int32)
        logits, cache = decode(state, tokens[:, position : position + 1], positions, cache)
        assert largest(logits, expected[:, position]) < TOLERANCE
    assert expected.shape == (2, 6, VOCABULARY)


def run_on(model: CausalLM, tokens: jax.Array) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state))


def a_layer(inputs: int, outputs: int, *, dropout: float = 0.0, **fields: Any) -> Linear:
    """A layer whose every trained value is random."""
    lora = LoRA(rank=3, alpha=5.0, dropout=dropout, use_dora=True)
    layer = Linear(inputs, outputs, adapter=lora, rngs=nnx.Rngs(0), **fields)
    adapter = layer.adapter
    assert isinstance(adapter, DoRALinear)
    for number, parameter in enumerate((adapter.lora_a, adapter.lora_b, adapter.lora_magnitude)):
        parameter.set_value(jax.random.normal(jax.random.key(number), parameter.shape) * 0.2)
    if layer.bias is not None:
        layer.bias.set_value(jnp.linspace(-1.0, 1.0, outputs))
    return layer


@pytest.mark.parametrize("quantization", [None, Quantization(), Quantization(double_quantization=False)])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_formula_and_its_gradient(quantization: Quantization | None, dropout: float) -> None:
    layer = a_layer(128, 24, dropout=dropout, quantization=quantization, use_bias=True)
    adapter = layer.adapter
    assert isinstance(adapter, DoRALinear)
    assert layer.bias is not None
    weight, bias, key = layer.weight.get_value(), layer.bias[...], jax.random.key(5)
    dense = weight if quantization is None else dequantize(weight)
    x, probe = (jax.random.normal(jax.random.key(n), (2, 7, size)) for n, size in ((8, 128), (9, 24)))

    def plain(x: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array) -> jax.Array:
        dropped, update = apply_dropout(x, dropout, key), 5 / 3 * (a @ b)
        norm = jax.lax.stop_gradient(jnp.linalg.norm(dense + update, axis=0))
        m = ((jnp.linalg.norm(dense, axis=0) + magnitude) / norm)[None, None]
        plus = (m - 1) * (dropped @ dense) + m * (dropped @ update)
        return (probe * (x @ dense + bias[None, None] + plus)).sum()

    def ours(x: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array) -> jax.Array:
        graph, trained, rest = nnx.split(layer, nnx.LoRAParam, ...)
        leaves = {"lora_a": a, "lora_b": b, "lora_magnitude": magnitude}
        nnx.replace_by_pure_dict(trained, {"adapter": leaves})
        return (probe * nnx.merge(graph, trained, rest)(x, LayerContext(key))).sum()

    values = (x, adapter.lora_a[...], adapter.lora_b[...], adapter.lora_magnitude[...])
    expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1, 2, 3)))(*values)
    found, found_gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*values)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for one, other in zip(found_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_lengths_of_stacks_and_a_matrix_in_its_stack() -> None:
    stack = jax.random.normal(jax.random.key(0), (3, 128, 10))
    packed = quantize(stack)
    np.testing.assert_allclose(column_norms(stack), np.linalg.norm(stack, axis=1), rtol=1e-6)
    np.testing.assert_allclose(column_norms(packed), np.linalg.norm(dequantize(packed), axis=1), rtol=1e-6)
    layer, x = a_layer(128, 10, quantization=Quantization()), jax.random.normal(jax.random.key(1), (4, 128))
    expected = layer(x)
    own = layer.weight.get_value()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), packed_at(packed, 0), own)
    layer.weight.set_value(StackedTensor(stacked, jnp.int32(1)))
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)


def packed_at(packed: Any, layer: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[layer], packed)


def test_a_column_of_zeros_stays_one_and_has_gradients() -> None:
    layer = a_layer(64, 8)
    assert isinstance(layer.adapter, DoRALinear)
    layer.weight.set_value(layer.weight[...].at[:, 3].set(0.0))
    layer.adapter.read_weight(layer.weight.get_value())
    layer.adapter.lora_b.set_value(jnp.zeros((3, 8)))
    graph, trained, rest = nnx.split(layer, nnx.LoRAParam, ...)
    x = jnp.ones((2, 64))
    value, gradient = jax.jit(jax.value_and_grad(lambda t: (nnx.merge(graph, t, rest)(x) ** 2).sum()))(trained)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(layer(x)[:, 3], 0)


def test_no_more_than_one_dense_matrix_is_held() -> None:
    """The compiled layer's temporary memory, forward and backward, against that of LoRA's."""
    inputs, outputs, rows = 1024, 1024, 4

    def temporary(lora: LoRA) -> int:
        layer = nnx.eval_shape(
            lambda: Linear(inputs, outputs, quantization=Quantization(), adapter=lora, dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
        graph, trained, rest = nnx.split(layer, nnx.LoRAParam, ...)

        def loss(trained: Any, rest: Any, x: jax.Array) -> jax.Array:
            return (nnx.merge(graph, trained, rest)(x) ** 2).sum()

        x = jax.ShapeDtypeStruct((rows * 32, inputs), jnp.float32)
        analysis = jax.jit(jax.grad(loss)).lower(trained, rest, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    dense = inputs * outputs * 4
    plain, dora = temporary(LoRA(rank=8)), temporary(LoRA(rank=8, use_dora=True))
    assert plain > dense / 2, "a product in 4 bits makes the matrix dense"
    assert dora < plain + dense / 2


def test_its_plan_counts_the_magnitudes() -> None:
    """Of seven layers of Llama-3-8B, in float32, with Adam's moments, and what the backward pass keeps of their results."""
    model = ModelSpec(llama_config(SIZES["llama-3-8b"]), method=LoRA(16), remat="dots")
    spec = StepSpec(model, language_model_objective(packed=False))
    dora = dataclasses.replace(spec, model=dataclasses.replace(model, method=LoRA(16, use_dora=True)))
    outputs = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    one, other = quick_plan(spec, "cuda"), quick_plan(dora, "cuda")
    assert other.adapter - one.adapter == 4 * outputs
    assert other.optimizer - one.optimizer == 8 * outputs
    assert other.dense_weights - one.dense_weights == 4 * outputs
    assert other.residuals - one.residuals == 2 * spec.tokens * outputs
