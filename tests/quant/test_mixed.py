"""Stacks of mixed storage: their products and gradients against the dense matrices that they stand for."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import (
    MixedStack,
    MixedTensor,
    dequantize,
    index_in_stack,
    matmul,
    mixed_stack,
    quantize,
    tracing_for,
)


@pytest.mark.optimised
def test_products_and_gradients_of_each_layer() -> None:
    draws = np.random.default_rng(0)
    w = jnp.asarray(draws.standard_normal((4, 64, 48), np.float32))
    x, y = (jnp.asarray(draws.standard_normal((3, n), np.float32)) for n in (64, 48))
    packed = quantize(w)
    stack = mixed_stack(packed, [1, 3])
    assert (stack.places, stack.shape, stack.packed.shape, stack.dense.shape) == (
        (0, -1, 1, -2),
        (4, 64, 48),
        (2, 64, 48),
        (2, 64, 48),
    )
    stack = MixedStack(stack.packed, w[jnp.asarray([1, 3])], stack.places)
    rounded = dequantize(packed)
    expected = [w[layer] if layer in (1, 3) else rounded[layer] for layer in range(4)]

    @jax.jit
    def run(stack: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        scanned, layer_of = index_in_stack({"w": stack, "other": jnp.arange(4.0)}, packed=False)

        def body(carry: None, inputs: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            part, layer = inputs
            matrix = layer_of(part, layer)["w"]
            product, backward = jax.vjp(lambda x: matmul(x, matrix), x)
            return carry, (product, backward(y)[0])

        return jax.lax.scan(body, None, (scanned, jnp.arange(4)))[1]

    products, gradients = run(stack, x, y)
    for layer, matrix in enumerate(expected):
        np.testing.assert_allclose(products[layer], x @ matrix, atol=1e-4)
        np.testing.assert_allclose(gradients[layer], y @ matrix.T, atol=1e-4)
        own = stack.matrix(layer)
        np.testing.assert_array_equal(own if isinstance(own, jax.Array) else dequantize(own), matrix)


@pytest.mark.parametrize(("count", "called"), [(2, "matmul_4bit"), (70, "dequantize_4bit")])
def test_on_a_tpu_the_kernels_read_the_packed_stack(count: int, called: str) -> None:
    """The packed bytes are an operand of the kernel as the whole stack, beside the index of a matrix."""
    stack = jax.eval_shape(lambda w: mixed_stack(quantize(w), [1]), jax.ShapeDtypeStruct((3, 256, 128), jnp.bfloat16))
    matrix = jax.eval_shape(MixedTensor, stack, jax.ShapeDtypeStruct((), jnp.int32))
    with tracing_for("tpu"):
        traced = jax.jit(matmul).trace(jax.ShapeDtypeStruct((count, 256), jnp.bfloat16), matrix)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    (call,) = (line for line in text.splitlines() if "@tpu_custom_call" in line)
    assert re.findall(r'kernel_name = "(\w+)"', call) == [called]
    assert "tensor<2x128x128xui8>" in call
