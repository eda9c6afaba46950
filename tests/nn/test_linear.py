"""Linear with its LoRA slots: against dense arithmetic, split by kind, and inside a Flax Linen module."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from qlora_jax.nn import Linear
from qlora_jax.peft import LoRA, LoRALinear, lora_update
from qlora_jax.quant import Quantization, QuantizedTensor, dequantize

LORA = LoRA(rank=4, alpha=6)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def linear(**options: Any) -> Linear:
    return Linear(64, 24, rngs=nnx.Rngs(0), **options)


def dense_weight(layer: Linear) -> np.ndarray:
    weight = layer.weight.get_value()
    return np.asarray(dequantize(weight) if isinstance(weight, QuantizedTensor) else weight)


@pytest.mark.optimised
@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["dense", "nf4"])
@pytest.mark.parametrize("use_bias", [False, True])
def test_equals_dense_arithmetic(quantization: Quantization | None, use_bias: bool) -> None:
    layer, x = linear(quantization=quantization, adapter=LORA, use_bias=use_bias), random(2, 3, 64)
    assert isinstance(layer.adapter, LoRALinear)
    if layer.bias is not None:
        layer.bias.set_value(jnp.asarray(random(24, seed=1)))
    base = x @ dense_weight(layer) + (0 if layer.bias is None else np.asarray(layer.bias[...]))
    np.testing.assert_allclose(layer(x), base, atol=1e-5, err_msg="a fresh adapter must change nothing")
    layer.adapter.lora_b.set_value(jnp.asarray(random(4, 24, seed=2)))
    update = 6 / 4 * x @ np.asarray(layer.adapter.lora_a[...]) @ np.asarray(layer.adapter.lora_b[...])
    np.testing.assert_allclose(layer(x), base + update, atol=1e-4)


def test_only_the_adapter_is_of_the_kind_that_trains() -> None:
    layer = linear(quantization=Quantization(), adapter=LORA, use_bias=True)
    graph, adapter, frozen = nnx.split(layer, nnx.LoRAParam, nnx.Param)
    assert {path[1] for path, _ in nnx.to_flat_state(adapter)} == {"lora_a", "lora_b"}
    assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"weight", "bias"}
    x = random(5, 64)
    gradient = jax.grad(lambda adapter: (nnx.merge(graph, adapter, frozen)(x) ** 2).sum())(adapter)
    found = {path[-1]: variable.get_value() for path, variable in nnx.to_flat_state(gradient)}
    assert np.abs(found["lora_b"]).max() > 0.1
    np.testing.assert_array_equal(found["lora_a"], 0)  # B is zero
    assert nnx.state(linear(), nnx.LoRAParam) == nnx.State({})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_computes_in_the_dtype_of_its_input(dtype: Any) -> None:
    layer = linear(quantization=Quantization(), adapter=LORA, use_bias=True, dtype=dtype)
    assert layer(jnp.asarray(random(3, 64), dtype)).dtype == dtype
    assert layer(jnp.asarray(random(3, 64))).dtype == jnp.float32
    assert isinstance(layer.adapter, LoRALinear)
    assert layer.adapter.lora_a.dtype == jnp.float32


def test_an_abstract_layer_has_its_slots() -> None:
    layer = nnx.eval_shape(lambda: linear(quantization=Quantization(), adapter=LORA))
    assert layer.adapter.lora_a.shape == (64, 4)
    assert layer.adapter.lora_b.shape == (4, 24)
    assert layer.weight.get_value().shape == (64, 24)


def test_dropout_zeroes_a_share_and_keeps_the_mean() -> None:
    x, a, b = np.ones((2000, 50), np.float32), np.eye(50, dtype=np.float32), np.eye(50, dtype=np.float32)
    y = np.asarray(lora_update(jnp.asarray(x), a, b, 2.0, 0.25, jax.random.key(0)))
    assert sorted(set(np.unique(y.round(5)))) == pytest.approx([0, 2 / 0.75], abs=1e-4)
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_array_equal(lora_update(jnp.asarray(x), a, b, 2.0, 0.25), 2 * x)


class Block(nn.Module):
    """A Linen module of one of ours and one of Linen's own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = bridge.to_linen(Linear, 64, 24, quantization=Quantization(), adapter=LORA, name="ours")(x)
        return nn.Dense(3, name="theirs")(nn.relu(x))


def test_inside_a_linen_module_only_the_adapter_is_trained() -> None:
    x, block = jnp.asarray(random(5, 64)), Block()
    variables = block.init(jax.random.key(0), x)
    adapter = variables["LoRAParam"]
    frozen = {name: value for name, value in variables.items() if name != "LoRAParam"}
    assert {"lora_a", "lora_b"} == adapter["ours"]["adapter"].keys()

    def loss(adapter: Any) -> jax.Array:
        return (block.apply({"LoRAParam": adapter, **frozen}, x) ** 2).sum()

    before, gradient = jax.value_and_grad(loss)(adapter)
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    stepped = jax.tree.map(lambda value, slope: value - 1e-3 * slope, adapter, gradient)
    assert loss(stepped) < before

    weights = [leaf for leaf in jax.tree.leaves(frozen["params"]["ours"]) if leaf.dtype == jnp.uint8]
    assert weights, "the frozen weight stays packed"
