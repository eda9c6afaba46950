"""The token table, which also serves as the output head: one row of `features` numbers a token.

table' = table + delta          delta, if any: of all rows, or of a few

The table is dense, or in 8 or 4 bits (`quant.rows`): then only the rows that are looked up become dense, and as a head a
slice of it at a time. On it, a few rows can train, but not all: their float32 change would be many times the table.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from qlora_jax.nn.delta import Delta, changed
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
class Table:
    """A frozen table and what training adds to it.

    Attributes:
        weight: `[vocabulary, features]`, or the same packed.
        delta: float32, added to the rows; None for nothing.
        rows: which ones it is added to, all different; None: to all, which the weight is dense for.
    """

    weight: Array | PackedEmbedding
    delta: Array | None = None
    rows: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, features)."""
        return embedding_shape(self.weight)

    def __call__(self, tokens: Array) -> Array:
        """int32 `[...]` to rows `[..., features]` in the dtype of the table."""
        found = embedding_lookup(self.weight, tokens)
        if self.delta is None:
            return found
        if self.rows is None:
            change = self.delta[tokens]
        else:
            hit = tokens[..., None] == jnp.asarray(self.rows).reshape((1,) * tokens.ndim + (-1,))
            change = jnp.einsum("...r,rd->...d", hit.astype(jnp.float32), self.delta)
        return (found.astype(jnp.float32) + change).astype(found.dtype)

    def logits(self, hidden: Array, dtype: DTypeLike | None = None) -> Array:
        """`[..., features]` to `[..., vocabulary]` in `dtype`, that of hidden if None: the table as output head."""
        dtype = hidden.dtype if dtype is None else dtype
        folded = self.folded()
        flat = hidden.reshape(-1, hidden.shape[-1])
        if isinstance(folded.weight, PackedEmbedding):
            logits = embedding_matmul(flat, folded.weight, dtype)
        else:
            logits = einsum("nd,vd->nv", flat, folded.weight.astype(hidden.dtype), dtype)
        logits = logits.reshape(*hidden.shape[:-1], -1)
        if folded.delta is None:
            return logits
        change = jnp.einsum("...d,rd->...r", hidden, folded.delta.astype(hidden.dtype), preferred_element_type=dtype)
        return logits.at[..., jnp.asarray(self.rows)].add(change)

    def sums(self, share: Array, dtype: DTypeLike | None = None) -> Array:
        """share `[n, vocabulary]` times the table, `[n, features]` in `dtype`, that of share if None."""
        dtype = share.dtype if dtype is None else dtype
        folded = self.folded()
        if isinstance(folded.weight, PackedEmbedding):
            sums = embedding_rows_sum(share, folded.weight, dtype)
        else:
            sums = einsum("nv,vd->nd", share, folded.weight.astype(share.dtype), dtype)
        if folded.delta is None:
            return sums
        of_rows = share[:, jnp.asarray(self.rows)]
        return sums + jnp.einsum("nr,rd->nd", of_rows, folded.delta.astype(share.dtype), preferred_element_type=dtype)

    def folded(self) -> "Table":
        """The same table, with a change of all rows added up; one of a few rows stays apart, as that costs no copy.

        Raises:
            ValueError: a change of all rows of a table that is packed.
        """
        if self.delta is None or self.rows is not None:
            return self
        if isinstance(self.weight, PackedEmbedding):
            raise ValueError(f"table: expected a dense one where all rows change, found {type(self.weight).__name__}")
        return Table(changed(self.weight, self.delta))

    def by_rows(self, axis: str) -> tuple["Table", P]:
        """The table in a form that a mesh's axis can spread by rows, and how its leaves are spread so."""
        weight = with_single_scales(self.weight)
        return dataclasses.replace(self, weight=weight), P(None, axis) if isinstance(weight, QuantizedTensor) else P(axis)


class Embedding(nnx.Module):
    """A frozen table `[vocabulary, features]`.

    Attributes:
        weight: `nnx.Param` holding an array, or a packed table.
        weight_delta: float32 `Delta`, `[vocabulary, features]` or one row for each of `rows`; None: nothing of it trains.
        rows: the tokens whose rows train; None: all or none.
    """

    def __init__(
        self,
        vocabulary: int,
        features: int,
        *,
        rows: tuple[int, ...] | None = None,
        storage: EmbeddingStorage = "none",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A table of random numbers; `storage` and `dtype` are those of its rows.

        Raises:
            ValueError: a storage that there is not, or not for so many features.
        """
        table = jax.random.normal(rngs.params(), (vocabulary, features), dtype) * 0.02
        self.weight = nnx.Param(quantize_embedding(table, storage))
        self.weight_delta = None if rows is None else Delta(jnp.zeros((len(rows), features), jnp.float32))
        self.rows = rows

    @property
    def table(self) -> Table:
        delta = None if self.weight_delta is None else self.weight_delta[...]
        return Table(self.weight.get_value(), delta, None if delta is None else self.rows)

    def __call__(self, tokens: Array) -> Array:
        """int32 `[...]` to `[..., features]` in the dtype of the table."""
        return self.table(tokens)

    def logits(self, hidden: Array) -> Array:
        """`[..., features]` to `[..., vocabulary]`: the table as output head."""
        return self.table.logits(hidden)
