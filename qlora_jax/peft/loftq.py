"""LoftQ (Li et al. 2023): an initialization in which base and adapter together approximate the original weight.

    R = W
    repeat   Q = quantised R                          as the base is stored, including double quantisation
             s A B = best rank-r approximation of (W - Q)        by singular values (pissa.py)
             R = W - s A B

The base is the last Q. With one step it is the quantised W, that is, the usual quantised base. PEFT's version omits s, so
that its initialization is correct only for alpha = r.
"""

from collections.abc import Callable

from jax import Array

from qlora_jax.peft.pissa import best_update, subtract_update


def loftq(
    w: Array, scaling: float, *, rank: int, iterations: int, rounded: Callable[[Array], Array]
) -> tuple[tuple[Array, Array] | None, tuple[Array, Array]]:
    """Return two pairs (A, B): the one to subtract from w before w is quantised (or None), and the initialization.

    Args:
        w: float32 `[in, out]`, the original weight.
        scaling: s.
        rank: r.
        iterations: number of alternating steps, at least 1.
        rounded: function that quantises a float32 matrix and returns it dequantised.
    """
    subtracted, rest = None, w
    for iteration in range(iterations):
        a, b = best_update(w - rounded(rest), scaling, rank=rank)
        if iteration + 1 == iterations:
            break
        subtracted, rest = (a, b), subtract_update(w, a, b, scaling)
    return subtracted, (a, b)  # pyright: ignore[reportPossiblyUnboundVariable]
