"""The vocabulary matrix, `[vocabulary, features]` with one row for each token: the input embedding and the output head.

    used matrix = weight + delta + (down up)ᵀ     delta: the trainable difference of all rows, of some rows, or absent
                                                  down, up: a trainable difference of low rank (LoRA), or absent

The weight is dense, or quantised to 8 or 4 bits (`quant.embedding`). A quantised weight is dequantised only in the rows that
are looked up; as output head, slice by slice. Some rows of a quantised weight can train, but not all rows, because the
float32 difference would take many times the memory of the weight.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from qlora_jax.errors import OptionError
from qlora_jax.nn.delta import Delta, add_delta
from qlora_jax.nn.parallel import with_whole_features
from qlora_jax.quant import (
    EmbeddingStorage,
    PackedEmbedding,
    QuantizedTensor,
    embedding_lookup,
    embedding_matmul,
    embedding_rows_sum,
    embedding_shape,
    quantize_embedding,
    with_single_scales,
)
from qlora_jax.quant.dense_matmul import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VocabularyMatrix:
    """The value of an embedding or output head: a frozen matrix plus a trainable difference.

    Attributes:
        weight: `[vocabulary, features]`, dense or quantised.
        delta: float32 difference, `[vocabulary, features]` or one row for each of `rows`; None: no row trains.
        rows: indices of the rows that delta is added to, all different; None: all rows, which requires a dense weight.
        low_rank: (down `[features, r]`, up `[r, vocabulary]`), float32, whose product is added transposed; None: absent.
    """

    weight: Array | PackedEmbedding
    delta: Array | None = None
    rows: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    low_rank: tuple[Array, Array] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, features)."""
        return embedding_shape(self.weight)

    def __call__(self, tokens: Int[Array, "*tokens"]) -> Float[Array, "*tokens d"]:
        """Look token ids up: int32 `[...]` to `[..., features]` in the dtype of the weight."""
        found = embedding_lookup(self.weight, tokens)
        if self.delta is None and self.low_rank is None:
            return found
        result = found.astype(jnp.float32)
        if self.delta is not None and self.rows is None:
            result = result + self.delta[tokens]
        elif self.delta is not None:
            hit = tokens[..., None] == jnp.asarray(self.rows).reshape((1,) * tokens.ndim + (-1,))
            result = result + jnp.einsum("...r,rd->...d", hit.astype(jnp.float32), self.delta)
        if self.low_rank is not None:
            down, up = self.low_rank
            result = result + jnp.einsum("...r,dr->...d", jnp.moveaxis(up[:, tokens], 0, -1), down)
        return result.astype(found.dtype)

    def logits(self, hidden: Float[Array, "*rows d"], dtype: DTypeLike | None = None) -> Float[Array, "*rows v"]:
        """Return hidden `[..., features]` times the transposed matrix, `[..., vocabulary]`: the output head.

        Args:
            hidden: `[..., features]`.
            dtype: dtype of the result; None: that of hidden.
        """
        dtype = hidden.dtype if dtype is None else dtype
        matrix = self.with_delta()
        flat = hidden.reshape(-1, hidden.shape[-1])
        if isinstance(matrix.weight, PackedEmbedding):
            logits = embedding_matmul(flat, matrix.weight, dtype)
        else:
            logits = einsum("nd,vd->nv", flat, matrix.weight.astype(hidden.dtype), dtype)
        if matrix.low_rank is not None:
            down, up = (part.astype(hidden.dtype) for part in matrix.low_rank)
            logits = logits + einsum("nr,rv->nv", flat @ down, up, dtype)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        if matrix.delta is None:
            return logits
        change = jnp.einsum("...d,rd->...r", hidden, matrix.delta.astype(hidden.dtype), preferred_element_type=dtype)
        return logits.at[..., jnp.asarray(self.rows)].add(change)

    def weighted_sums(self, share: Float[Array, "n v"], dtype: DTypeLike | None = None) -> Float[Array, "n d"]:
        """Return share `[n, vocabulary]` times the matrix, `[n, features]`: weighted sums of its rows.

        Args:
            share: `[n, vocabulary]`, the weights.
            dtype: dtype of the result; None: that of share.
        """
        dtype = share.dtype if dtype is None else dtype
        matrix = self.with_delta()
        if isinstance(matrix.weight, PackedEmbedding):
            sums = embedding_rows_sum(share, matrix.weight, dtype)
        else:
            sums = einsum("nv,vd->nd", share, matrix.weight.astype(share.dtype), dtype)
        if matrix.low_rank is not None:
            down, up = (part.astype(share.dtype) for part in matrix.low_rank)
            sums = sums + einsum("nr,dr->nd", einsum("nv,rv->nr", share, up, share.dtype), down, dtype)
        if matrix.delta is None:
            return sums
        of_rows = share[:, jnp.asarray(self.rows)]
        return sums + jnp.einsum("nr,rd->nd", of_rows, matrix.delta.astype(share.dtype), preferred_element_type=dtype)

    def with_delta(self) -> "VocabularyMatrix":
        """Return the matrix with a delta of all rows added to its weight; a delta of some rows remains, which saves a copy.

        Raises:
            OptionError: all rows train but the weight is quantised.
        """
        if self.delta is None or self.rows is not None:
            return self
        if isinstance(self.weight, PackedEmbedding):
            found = type(self.weight).__name__
            raise OptionError(f"embedding: expected a dense one if all its rows train, found {found}")
        return VocabularyMatrix(add_delta(self.weight, self.delta), low_rank=self.low_rank)

    def split_rows(self, axes: tuple[str, ...]) -> tuple["VocabularyMatrix", P]:
        """Return the matrix in a form whose rows can be split over mesh axes, and the partition spec of its leaves."""
        weight = with_single_scales(self.weight)
        return dataclasses.replace(self, weight=weight), P(None, axes) if isinstance(weight, QuantizedTensor) else P(axes)


class LowRank(Protocol):
    """An `nnx.Module` with a trainable difference of low rank from a vocabulary matrix."""

    def low_rank(self) -> tuple[Array, Array]:
        """Return (down `[features, r]`, up `[r, vocabulary]`), float32; see `VocabularyMatrix`."""
        ...


class MakesLowRank(Protocol):
    """The configuration of a difference of low rank."""

    def make(self, vocabulary: int, features: int, *, rngs: nnx.Rngs) -> LowRank:
        """Return a new difference, which changes nothing yet."""
        ...


class Embedding(nnx.Module):
    """An embedding `[vocabulary, features]` with a frozen weight.

    Attributes:
        weight: `nnx.Param` holding a dense array or a quantised matrix.
        weight_delta: float32 `Delta`, `[vocabulary, features]` or one row for each of `rows`; None: no row trains.
        rows: the token ids whose rows train; None: all or none.
        adapter: the trainable difference of low rank, or None.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        rows: tuple[int, ...] | None = None,
        adapter: MakesLowRank | None = None,
        storage: EmbeddingStorage = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Create an embedding with random weights.

        Args:
            vocabulary: number of tokens.
            features: features of an embedding.
            rows: token ids whose rows train; None: none.
            adapter: the configuration of a difference of low rank; None: there is none.
            storage: how the weight is stored: "none" (dense), "int8" or "nf4".
            dtype: dtype of a dense weight, and of the looked-up rows of a quantised one.
            rngs: random number generators; the stream `params` is used.

        Raises:
            OptionError: an unknown storage, or a number of features that the storage does not support.
        """
        weight = jax.random.normal(rngs.params(), (vocabulary, features), dtype) * 0.02
        self.weight = nnx.Param(quantize_embedding(weight, storage))
        self.weight_delta = None if rows is None else Delta(jnp.zeros((len(rows), features), jnp.float32))
        self.rows = rows
        self.adapter: LowRank | None = None if adapter is None else adapter.make(vocabulary, features, rngs=rngs)

    @property
    def matrix(self) -> VocabularyMatrix:
        """The weight with its trainable difference."""
        delta = None if self.weight_delta is None else self.weight_delta[...]
        low_rank = None if self.adapter is None else self.adapter.low_rank()
        return VocabularyMatrix(self.weight.get_value(), delta, None if delta is None else self.rows, low_rank)

    def __call__(self, tokens: Int[Array, "*tokens"]) -> Float[Array, "*tokens d"]:
        """Look token ids up: int32 `[...]` to `[..., features]` in the dtype of the weight."""
        return with_whole_features(self.matrix(tokens))

    def logits(self, hidden: Float[Array, "*rows d"]) -> Float[Array, "*rows v"]:
        """Return the logits `[..., vocabulary]` of hidden `[..., features]`, with the embedding as output head."""
        return self.matrix.logits(hidden)
