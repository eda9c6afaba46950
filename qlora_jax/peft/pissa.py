"""PiSSA (Meng et al. 2024): the adapter is initialized with the principal part of the weight, which the base then lacks.

    W = U S V'                                        [in, out], singular values in descending order
    A = U_r sqrt(S_r / s)    B = sqrt(S_r / s) V_r'   s A B is the best approximation of W by rank r
    base = quantised (W - s A B)

W - s A B has smaller values than W, so its quantisation error is smaller. The exact singular value decomposition needs the
memory of several more matrices of the size of W. With `iterations`, subspace iteration (Halko et al. 2011) finds r + 8
singular values in a few products with W.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.errors import OptionError

_OVERSAMPLING = 8  # vectors in addition to r in the subspace iteration


@partial(jax.jit, static_argnames=("rank", "iterations"))
def best_update(w: Array, scaling: float, *, rank: int, iterations: int | None = None) -> tuple[Array, Array]:
    """Return float32 A `[in, r]` and B `[r, out]` such that scaling A B is the best approximation of w by rank r.

    Args:
        w: `[in, out]`, of any float dtype.
        scaling: the factor s.
        rank: r.
        iterations: number of subspace iterations; None: exact singular value decomposition.

    Raises:
        OptionError: the rank is larger than a side of w.
    """
    if rank > min(w.shape):
        raise OptionError(f"expected a rank of at most {min(w.shape)} for singular values of {w.shape}, found {rank}")
    w = w.astype(jnp.float32)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False) if iterations is None else _approximate(w, rank, iterations)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]


@jax.jit
def subtract_update(w: Array, a: Array, b: Array, scaling: float) -> Array:
    """Return w - scaling a b, float32 `[in, out]`. Loading a trained adapter computes the same bits again."""
    return w.astype(jnp.float32) - scaling * jnp.matmul(a, b, precision="highest")


def _approximate(w: Array, rank: int, iterations: int) -> tuple[Array, Array, Array]:
    # The same random start for every matrix of a shape is fine: the result depends on the matrix.
    q = jax.random.normal(jax.random.key(0), (w.shape[1], min(rank + _OVERSAMPLING, *w.shape)))
    for _ in range(iterations + 1):
        q, _ = jnp.linalg.qr(w @ q)
        q, _ = jnp.linalg.qr(w.T @ q)
    u, s, vt = jnp.linalg.svd(w @ q, full_matrices=False)
    return u, s, vt @ q.T
