"""The product with frozen weights: its values, its gradient, what it keeps for the backward pass."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback

from qlora_jax.quant import QuantizedTensor, codebook, dequantize, matmul, quantize
from qlora_jax.quant import tensor as tensor_module
from qlora_jax.quant.targets import tracing_for


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.optimised
@pytest.mark.parametrize("rows", [128, 50])
@pytest.mark.parametrize("data_type", ["nf4", "fp4", "int4"])
def test_value_and_gradient_equal_those_of_the_dense_product(rows: int, data_type: Any) -> None:
    q, x = quantize(random(rows, 24), data_type), random(2, 5, rows, seed=1)
    dy, dense = random(2, 5, 24, seed=2), np.asarray(dequantize(q))
    y, (dx,) = value_and_pullback(matmul, (x,), lambda _: dy, q)
    np.testing.assert_allclose(y, x @ dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, dy @ dense.T, rtol=1e-5, atol=1e-5)


def test_a_dense_weight_is_an_ordinary_operand() -> None:
    x, w = random(3, 8), random(8, 5, seed=1)
    np.testing.assert_allclose(matmul(x, w), x @ w, rtol=1e-5)
    gradient = jax.grad(lambda w: matmul(x, w).sum())(w)
    np.testing.assert_allclose(gradient, np.repeat(x.sum(0)[:, None], 5, 1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_result_has_the_dtype_of_x(dtype: Any) -> None:
    x = jnp.asarray(random(3, 64), dtype)
    q = quantize(random(64, 8, seed=1))
    assert matmul(x, q).dtype == dtype
    assert matmul(x, jnp.asarray(random(64, 8))).dtype == dtype
    assert jax.grad(lambda x: matmul(x, q).astype(jnp.float32).sum())(x).dtype == dtype


@pytest.mark.parametrize("stacked", [False, True])
def test_residuals_hold_packed_bytes_and_no_dense_weight(stacked: bool) -> None:
    layers, size = 3, 256
    q = quantize(random(layers, size, size) / 16)

    def chain(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        if stacked:
            return jax.lax.scan(lambda x, one: (jnp.tanh(matmul(x, one)), None), x, q)[0]
        return jnp.tanh(matmul(x, jax.tree.map(lambda leaf: leaf[0], q)))

    # Known only at run time, so that nothing can be folded away.
    _, pullback = jax.jit(lambda x, q: jax.vjp(lambda x: chain(x, q), x))(random(4, size), q)
    residuals = [leaf for leaf in jax.tree.leaves(pullback) if isinstance(leaf, jax.Array)]
    assert residuals
    dense = size * size
    assert not [leaf.shape for leaf in residuals if leaf.size >= dense and leaf.dtype != jnp.uint8]
    activations = 4 * 4 * size * 4 * layers
    assert sum(leaf.nbytes for leaf in residuals) < q.nbytes + activations


def loop_operands(rows: int, columns: int) -> list[str]:
    """Types of the operands of all loops, as large as a matrix, of a differentiated scan lowered for a
    TPU."""
    layers = 3
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((layers, rows, columns), jnp.float32))

    def loss(x: jax.Array, q: QuantizedTensor) -> jax.Array:
        def layer(x: jax.Array, one: QuantizedTensor) -> tuple[jax.Array, None]:
            return jnp.tanh(matmul(x, one)) @ jnp.ones((columns, rows)), None

        return jax.lax.scan(layer, x, q)[0].sum()

    with tracing_for("every"):
        traced = jax.jit(jax.grad(loss)).trace(jax.ShapeDtypeStruct((4, rows), jnp.float32), q)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    loops = [line for line in text.splitlines() if "stablehlo.while(" in line]
    assert len(loops) == 2, "one forward, one backward"
    types = [kind for line in loops for kind in re.findall(r"tensor<([^>]+)>", line.rsplit(") :", 1)[1])]
    sizes = {kind: [int(size) for size in kind.split("x")[:-1]] for kind in types}
    # Stacked by layer are the packed weights themselves; the ones that this test multiplies by are not at
    # stake.
    return [
        kind
        for kind in types
        if np.prod(sizes[kind], dtype=int) >= rows * columns // 2
        and sizes[kind][:1] != [layers]
        and sizes[kind] != [columns, rows]
    ]


def test_no_constants_of_a_matrix_size_travel_through_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loop_operands(128, 96) == []

    def unanchored(codes: jax.Array, data_type: Any) -> jax.Array:
        leaves: list[Any] = [np.float32(value) for value in codebook(data_type)]
        for bit in range(4):
            is_set = ((codes >> bit) & 1) == 1
            leaves = [jnp.where(is_set, odd, even) for even, odd in zip(leaves[::2], leaves[1::2], strict=True)]
        return leaves[0]

    monkeypatch.setattr(tensor_module, "_lookup", unanchored)
    assert len(loop_operands(64, 160)) >= 16, "the trap that this test is about no longer springs: see DESIGN, section 4"


def test_shapes_that_do_not_match() -> None:
    q = quantize(random(64, 8))
    with pytest.raises(ValueError, match=r"cannot multiply x \(3, 32\) by w \(64, 8\)"):
        matmul(random(3, 32), q)
    with pytest.raises(ValueError, match=r"by w \(2, 64, 8\): expected x \[\.\.\., in\] and w \[in, out\]"):
        matmul(random(3, 64), quantize(random(2, 64, 8)))
