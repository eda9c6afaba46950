"""The initializations of LoRA's A and B, by PEFT's names (`init_lora_weights`).

    True             A is uniform in ±1/sqrt(in), B is zero
    gaussian         A is normal with standard deviation 1/r, B is zero
    orthogonal       A and B are random, each from half of the rows of one orthogonal matrix [r, r], so that A B = 0; r is
                     even
    pissa            A B holds the r largest singular values of the original weight; they are subtracted from the base
                     (pissa.py)
    pissa_niter_N    as pissa, with the singular values approximated by N subspace iterations
    olora            A B holds the first r columns of Q and rows of R of the original weight's QR decomposition (of W as
                     [out, in]: B' = Q_r, A' = R_r); they are subtracted from the base (Büyükakyüz 2024)
    loftq            A B approximates the quantisation error of the original weight by r singular values, in alternating
                     steps (loftq.py)
    eva              A holds the r principal directions of the layer's inputs on the training data, B is zero (eva.py)

The first three need only a random key. pissa, pissa_niter_N, olora and loftq read the original weights while these are
loaded (checkpoint/initialize.py).
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.errors import OptionError, shortened

_NAMES = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")
_PISSA = re.compile(r"pissa(_niter_(?P<iterations>[1-9]\d*))?")


def initialization_error(name: object) -> str | None:
    """Return what is wrong with a value of `init_lora_weights`, or None if it is valid."""
    if name is True or (isinstance(name, str) and (name in _NAMES or _PISSA.fullmatch(name))):
        return None
    return f"expected true, {', '.join(_NAMES)} or pissa_niter_N, found {shortened(name, 200)}"


def reads_weights(name: bool | str) -> bool:
    """Return whether this initialization is computed from the original weights."""
    return isinstance(name, str) and (name in ("loftq", "olora") or _PISSA.fullmatch(name) is not None)


def pissa_iterations(name: str) -> int | None:
    """Return N of pissa_niter_N, or None for exact singular values."""
    match = _PISSA.fullmatch(name)
    return int(match["iterations"]) if match and match["iterations"] else None


@partial(jax.jit, static_argnames="rank")
def qr_update(w: Array, *, rank: int) -> tuple[Array, Array]:
    """Return float32 A `[in, r]` and B `[r, out]` of OLoRA for a weight `[in, out]`.

    Raises:
        OptionError: the rank is larger than a side of w.
    """
    if rank > min(w.shape):
        raise OptionError(f"expected a rank of at most {min(w.shape)} for {w.shape}, found {rank}")
    q, r = jnp.linalg.qr(w.astype(jnp.float32).T)
    return r[:rank].T, q[:, :rank].T


def orthogonal(key: Array, in_features: int, out_features: int, rank: int) -> tuple[Array, Array]:
    """Return random float32 A `[in, r]` and B `[r, out]`, neither of them zero, with A B = 0."""
    keys = jax.random.split(key, 3)
    rows, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
    a = jax.random.normal(keys[1], (in_features, rank // 2)) @ rows[0::2] / 10
    b = rows[1::2].T @ jax.random.normal(keys[2], (rank // 2, out_features)) / 10
    return a, b
