"""PiSSA (Meng et al. 2024): the adapter starts as the main part of the weight, the base keeps the rest.

    W = U S V'                                        [in, out], singular values from large to small
    A = U_r sqrt(S_r / s)    B = sqrt(S_r / s) V_r'   s A B is the best approximation of W by rank r
    base = 4 bits of (W - s A B)

The rest has smaller values than W, so 4 bits lose less of it. Exact singular values take memory for some more matrices like
W; `iterations` finds r + 8 of them by subspace iteration (Halko et al. 2011), within a few products with W.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

_MORE = 8  # vectors beyond r that a subspace iteration carries


@partial(jax.jit, static_argnames=("rank", "iterations"))
def principal(w: Array, scaling: float, *, rank: int, iterations: int | None = None) -> tuple[Array, Array]:
    """Float32 A `[in, r]` and B `[r, out]` with scaling A B the best approximation of w `[in, out]` of that rank.

    Raises:
        ValueError: w has no such rank.
    """
    if rank > min(w.shape):
        raise ValueError(f"expected a rank of at most {min(w.shape)} for singular values of {w.shape}, found {rank}")
    w = w.astype(jnp.float32)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False) if iterations is None else _approximate(w, rank, iterations)
    root = jnp.sqrt(s[:rank] / scaling)
    return u[:, :rank] * root[None, :], root[:, None] * vt[:rank]


@jax.jit
def without(w: Array, a: Array, b: Array, scaling: float) -> Array:
    """Float32 w - scaling a b, `[in, out]`. Loading a trained adapter repeats it, to the bit."""
    return w.astype(jnp.float32) - scaling * jnp.matmul(a, b, precision="highest")


def _approximate(w: Array, rank: int, iterations: int) -> tuple[Array, Array, Array]:
    # The same draws for every matrix of a shape: what comes of it is the matrix's, not theirs.
    q = jax.random.normal(jax.random.key(0), (w.shape[1], min(rank + _MORE, *w.shape)))
    for _ in range(iterations + 1):
        q, _ = jnp.linalg.qr(w @ q)
        q, _ = jnp.linalg.qr(w.T @ q)
    u, s, vt = jnp.linalg.svd(w @ q, full_matrices=False)
    return u, s, vt @ q.T
