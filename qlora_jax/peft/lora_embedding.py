"""LoRA in the token embedding and in the output head.

    embedding    x = W[token] + s A[token] B          A [vocabulary, r], B [r, features]     A starts as zero, B normal
    head         logits = h Wᵀ + s (h A) B            A [features, r], B [r, vocabulary]     as in a linear layer

Both are a change of rank r of the vocabulary matrix `[vocabulary, features]`, of which only the looked-up rows, or products
with r columns, are computed (`nn.VocabularyMatrix.low_rank`); the matrix itself may be packed. PEFT's dropout of the head's
inputs is not applied: the chunked loss reads them several times.

An output head that is tied to the embedding has its own change, and is not tied any more once that is merged. With PEFT's
`ensure_weight_tying` the embedding's change is that of the head too.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.peft.lora_linear import LoRASpec, init_lora_a
from qlora_jax.peft.method import FilePart

__all__ = ["EMBEDDING_A", "EMBEDDING_B", "EmbeddingSpec", "LoRAEmbedding"]

EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"  # the suffixes of the tensors' names; without `.weight`


@dataclasses.dataclass(frozen=True)
class EmbeddingSpec:
    """The LoRA adapter of the token embedding, or of the output head.

    Attributes:
        spec: its rank and scaling, as those of a stack of one layer.
        head: whether it is that of the output head.
    """

    spec: LoRASpec
    head: bool

    def make(self, vocabulary: int, features: int, *, rngs: nnx.Rngs) -> "LoRAEmbedding":
        """Return a new adapter, which changes nothing yet."""
        return LoRAEmbedding(vocabulary, features, spec=self.spec, head=self.head, rngs=rngs)


class LoRAEmbedding(nnx.Module):
    """The LoRA adapter of a vocabulary matrix `[vocabulary, features]`.

    Attributes:
        lora_a, lora_b: float32 `nnx.LoRAParam`; of the embedding `[vocabulary, r]` and `[r, features]`, of the head
            `[features, r]` and `[r, vocabulary]`.
        spec, head: see `EmbeddingSpec`.
    """

    def __init__(self, vocabulary: int, features: int, *, spec: LoRASpec, head: bool, rngs: nnx.Rngs) -> None:
        self.spec, self.head, rank, key = spec, head, spec.rank, rngs.params()
        if head:
            gaussian = jax.random.normal(key, (features, rank)) / rank
            a = gaussian if spec.initialization == "gaussian" else init_lora_a(key, features, rank)
            b = jnp.zeros((rank, vocabulary), jnp.float32)
        else:
            a, b = jnp.zeros((vocabulary, rank), jnp.float32), jax.random.normal(key, (rank, features))
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)

    def low_rank(self) -> tuple[Array, Array]:
        """Return (down `[features, r]`, up `[r, vocabulary]`) such that the matrix changes by (down up) transposed."""
        down, up = (self.lora_a[...], self.lora_b[...]) if self.head else (self.lora_b[...].T, self.lora_a[...].T)
        return down * self.spec.scalings[0], up

    def file_parts(self) -> Iterator[FilePart]:
        """See `method.AdapterModule`. Files hold A and B of the embedding transposed too, under names of their own."""
        a, b = ("lora_A.weight", "lora_B.weight") if self.head else (EMBEDDING_A, EMBEDDING_B)
        yield FilePart(0, a, "lora_a", transposed=True)
        yield FilePart(0, b, "lora_b", transposed=True)
