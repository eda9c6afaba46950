"""The loss through a head with a trainable change of low rank, against autodiff of the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.nn import VocabularyMatrix
from qlora_jax.quant import embedding_lookup, quantize_embedding
from qlora_jax.train.cross_entropy import chunked_cross_entropy, token_losses_and_hits


@pytest.mark.parametrize("storage", ["none", "int8"])
def test_losses_and_gradients(storage: str) -> None:
    draws = np.random.default_rng(0)
    weight, hidden, down, up, weights = (
        jnp.asarray(draws.standard_normal(shape, np.float32)) for shape in ((32, 16), (10, 16), (16, 3), (3, 32), (10,))
    )
    targets = jnp.asarray(draws.integers(0, 32, 10))
    stored = quantize_embedding(weight, storage)  # type: ignore[arg-type]
    dense = embedding_lookup(stored, jnp.arange(32))

    @jax.jit
    def chunked(hidden: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        head = VocabularyMatrix(stored, low_rank=(down, up))
        return chunked_cross_entropy(hidden, head, targets, weights, chunk=4, cap=20.0)

    @jax.jit
    def whole(hidden: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
        logits = 20 * jnp.tanh(hidden @ (dense + (down @ up).T).T / 20)
        return -(weights * jax.nn.log_softmax(logits)[jnp.arange(10), targets]).sum()

    for found, expected in zip(
        *(jax.value_and_grad(loss, (0, 1, 2))(hidden, down, up) for loss in (chunked, whole)), strict=True
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), found, expected)
    head = VocabularyMatrix(stored, low_rank=(down, up))
    np.testing.assert_allclose(head(targets), (dense + (down @ up).T)[targets], atol=1e-5)
    losses = token_losses_and_hits(hidden, head, targets, weights, 20.0)
    np.testing.assert_allclose(losses[:, 0].sum(), whole(hidden, down, up), atol=1e-3)
