"""LoftQ (Li et al. 2023): base and adapter together come close to the original weight, by turns.

    R = W
    repeat   Q = 4 bits of R              as the base is stored, double quantisation included
             s A B = rank r of (W - Q)    by singular values (pissa.py)
             R = W - s A B

The base is the last Q, which is 4 bits of the R before it: W itself with one turn, when the base is a plain quantised one.
PEFT's version leaves s out, so that its start is right for alpha = r alone.
"""

from collections.abc import Callable

from jax import Array

from qlora_jax.peft.pissa import principal, without


def loftq(
    w: Array, scaling: float, *, rank: int, turns: int, rounded: Callable[[Array], Array]
) -> tuple[tuple[Array, Array] | None, tuple[Array, Array]]:
    """(A and B that are taken off w before it is stored, None for nothing; A and B that training starts from).

    Args:
        w: float32 `[in, out]`.
        rounded: a float32 matrix as its 4 bits stand for it.
    """
    taken, rest = None, w
    for turn in range(turns):
        a, b = principal(w - rounded(rest), scaling, rank=rank)
        if turn + 1 == turns:
            break
        taken, rest = (a, b), without(w, a, b, scaling)
    return taken, (a, b)  # pyright: ignore[reportPossiblyUnboundVariable]
