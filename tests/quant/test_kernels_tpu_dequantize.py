"""The TPU kernel that dequantises, in interpret mode, against float64 products with the matrix that the codes represent."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import value_and_pullback
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from kernel_checks import LIMITS, dense_matrix, random, relative_error

from qlora_jax.quant import QuantizedTensor, StackedTensor, kernels, matmul, quantize, tracing_for
from qlora_jax.quant.kernels import tpu_dequantize


@pytest.mark.parametrize(
    ("rows", "columns", "data_type", "block_size", "double", "dtype"),
    [
        (576, 192, "nf3", 64, True, "bfloat16"),  # the lower half begins within a block; the last tile of columns is cut
        (1152, 128, "nf2", 128, True, "float32"),
        (256, 384, "nf4", 64, True, "bfloat16"),  # tiles of 256 columns, the last of which is cut
        (288, 130, "int4", 32, True, "bfloat16"),
        (1440, 128, "fp4", 32, False, "float32"),  # the last tile of rows is cut
        (512, 128, "fp4-e2m1", 512, True, "float32"),
        (4096, 128, "fp4-e3m0", 4096, True, "bfloat16"),
    ],
)
def test_the_matrix_is_that_of_its_codes(
    rows: int, columns: int, data_type: Any, block_size: int, double: bool, dtype: str
) -> None:
    q = quantize(random(rows, columns), data_type, block_size, double)
    dense = tpu_dequantize.dequantize(q, dtype=jnp.dtype(dtype), interpret=True)
    assert (dense.dtype, dense.shape) == (dtype, (rows, columns))
    assert relative_error(dense, dense_matrix(q)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_and_gradient_of_a_layer(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """The TPU's branch of a product of many rows, which a CPU runs here."""
    monkeypatch.setattr(tpu_dequantize, "dequantize", partial(tpu_dequantize.dequantize, interpret=True))
    monkeypatch.setattr(kernels, "_dequantizer", lambda dtype, _: partial(tpu_dequantize.dequantize, dtype=dtype))
    q = quantize(random(3, 576, 256))
    x, dy = (jnp.asarray(random(70, size, seed=1), dtype) for size in (576, 256))

    def run(x: jax.Array, q: QuantizedTensor, index: jax.Array) -> jax.Array:
        return matmul(x, StackedTensor(q, index))

    with tracing_for("tpu"):
        y, (dx,) = value_and_pullback(run, (x,), lambda _: dy, q, jnp.int32(2))
    dense = dense_matrix(jax.tree.map(lambda leaf: leaf[2], q))
    assert relative_error(y, np.asarray(x, np.float64) @ dense) < LIMITS[dtype]
    assert relative_error(dx, np.asarray(dy, np.float64) @ dense.T) < LIMITS[dtype]


@pytest.mark.parametrize(("shape", "block_size", "dtype"), [((600, 128), 64, "float32"), ((256, 128), 64, "float16")])
def test_xla_dequantises_what_the_kernel_does_not_support(shape: Any, block_size: int, dtype: str) -> None:
    q = quantize(random(*shape), "nf4", block_size)
    assert tpu_dequantize.unsupported_reason(q, dtype) is not None
    x = jnp.ones((70, shape[0]), dtype)
    with tracing_for("tpu"):
        traced = jax.jit(matmul).trace(x, q)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_on_several_devices_each_dequantises_the_gathered_matrix() -> None:
    """XLA cannot distribute a kernel, so the program maps it over the devices; the product remains XLA's to distribute."""
    q = jax.eval_shape(quantize, jax.ShapeDtypeStruct((256, 128), jnp.float32))
    x = jax.ShapeDtypeStruct((70, 256), jnp.bfloat16)
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with tracing_for("tpu"), jax.sharding.use_abstract_mesh(mesh):
        jaxpr = jax.make_jaxpr(matmul)(x, q)
    (mapped,) = (equation for equation in equations(jaxpr.jaxpr) if equation.primitive.name == "shard_map")
    assert "dequantize_4bit" in str(mapped.params["jaxpr"])
    assert [value.aval.shape for value in mapped.outvars] == [(256, 128)]
    assert all(spec == P() for spec in mapped.params["out_specs"])


def equations(jaxpr: Any) -> list[Any]:
    """Return the equations of a program and of those within it, except of what is mapped over devices."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr") or hasattr(value, "eqns")]
        for value in inner if equation.primitive.name != "shard_map" else ():
            found += equations(getattr(value, "jaxpr", value))
    return found
