"""Tables in fewer bits against NumPy and bitsandbytes, and their products over slices against the dense table."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import (
    EmbeddingStorage,
    Int8Embedding,
    QuantizedTensor,
    embedding_lookup,
    embedding_matmul,
    embedding_rows_sum,
    embedding_shape,
    empty_embedding,
    quantize_embedding,
    with_double_quantization,
    with_implementation,
    with_single_scales,
    write_embedding_rows,
)
from qlora_jax.quant import embedding as rows
from qlora_jax.quant.targets import tracing_for

STORAGES: tuple[EmbeddingStorage, ...] = ("int8", "nf4")


@pytest.fixture
def table() -> np.ndarray:
    """650 rows of very different sizes; one of zeros."""
    draws = np.random.default_rng(0)
    table = draws.standard_normal((650, 192), np.float32) * draws.uniform(0.01, 2, (650, 1)).astype(np.float32)
    table[7] = 0
    return table


def packed(table: Any, storage: EmbeddingStorage) -> Any:
    return quantize_embedding(jnp.asarray(table), storage)


@pytest.mark.optimised
def test_int8_codes_are_those_of_bitsandbytes(table: np.ndarray) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    found = packed(table, "int8")
    codes, absmax, _ = functional.int8_vectorwise_quant(torch.from_numpy(table))
    nonzero = np.arange(len(table)) != 7
    np.testing.assert_array_equal(np.asarray(found.codes)[nonzero], codes.numpy()[nonzero])
    np.testing.assert_allclose(found.scales, absmax.float().numpy() / 127, rtol=1e-6)


@pytest.mark.optimised
def test_int8_against_numpy(table: np.ndarray) -> None:
    dense = np.asarray(embedding_lookup(packed(table, "int8"), jnp.arange(len(table))), np.float64)
    step = np.abs(table.astype(np.float64)).max(1, keepdims=True) / 127
    assert (np.abs(dense - table) <= 0.5001 * step).all()
    assert (dense[7] == 0).all()


def test_nf4_values_are_those_of_bitsandbytes(table: np.ndarray) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    torch = pytest.importorskip("torch")
    codes, state = functional.quantize_4bit(
        torch.from_numpy(table), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    dense = embedding_lookup(packed(table, "nf4"), jnp.arange(len(table)))
    np.testing.assert_allclose(dense, functional.dequantize_4bit(codes, state).numpy(), atol=2e-6)  # their mean is rounded


@pytest.mark.optimised
@pytest.mark.parametrize("storage", STORAGES)
def test_rows_and_products_are_those_of_the_dense_table(
    table: np.ndarray, storage: EmbeddingStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over five slices of 128 rows and one of 10, eight times as many as `rows._SLICE` cuts such a table into."""
    monkeypatch.setattr(rows, "_SLICE", 1)
    found, draws = packed(table, storage), np.random.default_rng(1)
    assert embedding_shape(found) == table.shape
    dense = np.asarray(embedding_lookup(found, jnp.arange(len(table))))
    index = np.asarray([[0, 5, 649], [3, 3, 77]])
    x, share = (draws.standard_normal((9, side), np.float32) for side in table.shape[::-1])
    for one in (found, with_single_scales(found)):
        np.testing.assert_array_equal(embedding_lookup(one, jnp.asarray(index)), dense[index])
        wide = dense.astype(np.float64)
        np.testing.assert_allclose(embedding_matmul(jnp.asarray(x), one, jnp.float32), x @ wide.T, atol=2e-4)
        np.testing.assert_allclose(embedding_rows_sum(jnp.asarray(share), one, jnp.float32), share @ wide, atol=2e-4)


@pytest.mark.optimised
@pytest.mark.parametrize("storage", STORAGES)
def test_the_gradient_of_a_product_is_that_of_the_dense_table(table: np.ndarray, storage: EmbeddingStorage) -> None:
    found, draws = packed(table, storage), np.random.default_rng(2)
    x, dy = (draws.standard_normal((3, side), np.float32) for side in table.shape[::-1])
    _, pull_back = jax.vjp(lambda x: embedding_matmul(x, found, jnp.float32), jnp.asarray(x))
    dense = np.asarray(embedding_lookup(found, jnp.arange(len(table))), np.float64)
    np.testing.assert_allclose(pull_back(jnp.asarray(dy))[0], dy @ dense, atol=1e-4)


def test_a_table_in_4_bits_has_a_kernel_that_differentiates_and_can_be_turned_off() -> None:
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    w = jax.eval_shape(lambda w: quantize_embedding(w, "nf4"), jax.ShapeDtypeStruct((1024, 512), jnp.bfloat16))

    def lowered(w: Any) -> str:
        step = jax.value_and_grad(lambda x, w: embedding_matmul(x, w, x.dtype).astype(jnp.float32).sum())
        with tracing_for("every"):
            return jax.jit(step).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()

    assert "tpu_custom_call" in lowered(w)
    assert "tpu_custom_call" not in lowered(with_implementation(w, "xla"))


@pytest.mark.parametrize("storage", STORAGES)
def test_filled_by_parts_it_is_the_same(table: np.ndarray, storage: EmbeddingStorage) -> None:
    whole = packed(table, storage)
    filled: Any = empty_embedding(whole, jnp.zeros)
    for start in range(0, len(table), 200):
        filled = write_embedding_rows(filled, jnp.asarray(table[start : start + 200]), start)
    if isinstance(filled, QuantizedTensor):
        filled = with_double_quantization(filled)
    assert jax.tree.structure(filled) == jax.tree.structure(whole)
    for a, b in zip(jax.tree.leaves(filled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("storage", "bits"), [("int8", 8 + 32 / 192), ("nf4", 4.13)])
def test_bytes(table: np.ndarray, storage: EmbeddingStorage, bits: float) -> None:
    leaves = jax.tree.leaves(packed(table, storage))
    assert 8 * sum(leaf.nbytes for leaf in leaves) / table.size == pytest.approx(bits, rel=0.002)


def test_no_slice_makes_the_dense_table(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sizes of the compiled program's buffers."""
    monkeypatch.setattr(rows, "_SLICE", 1)
    structs = (jax.ShapeDtypeStruct((4, 192), jnp.float32), jax.ShapeDtypeStruct((6400, 192), jnp.float32))
    for storage in STORAGES:
        abstract = jax.eval_shape(lambda w, storage=storage: quantize_embedding(w, storage), structs[1])
        compiled = jax.jit(lambda x, w: embedding_matmul(x, w, jnp.float32)).lower(structs[0], abstract).compile()
        planned = compiled.memory_analysis()
        assert planned is not None
        assert planned.temp_size_in_bytes < 6400 * 192 * 4 / 8


def test_what_there_is_not_is_an_error() -> None:
    with pytest.raises(ValueError, match="embedding_storage: expected one of none, int8, nf4, found 'int4'"):
        quantize_embedding(jnp.ones((4, 64)), "int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embedding_storage nf4: expected a multiple of 64 features, found 48"):
        quantize_embedding(jnp.ones((4, 48)), "nf4")
    assert isinstance(quantize_embedding(jnp.ones((4, 48)), "int8"), Int8Embedding)
