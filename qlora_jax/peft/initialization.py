"""The initializations of LoRA's A and B, by PEFT's names (`init_lora_weights`).

    True             A is uniform in ±1/sqrt(in), B is zero
    gaussian         A is normal with standard deviation 1/r, B is zero
    orthogonal       A and B are random, each from half of the rows of one orthogonal matrix [r, r], so that A B = 0; r is
                     even
    pissa            A B holds the r largest singular values of the original weight; they are subtracted from the base
                     (pissa.py)
    pissa_niter_N    as pissa, with the singular values approximated by N subspace iterations
    loftq            A B approximates the quantisation error of the original weight by r singular values, in alternating
                     steps (loftq.py)
    eva              A holds the r principal directions of the layer's inputs on the training data, B is zero (eva.py)

The first three need only a random key. pissa, pissa_niter_N and loftq read the original weights while these are loaded
(checkpoint/initialize.py).
"""

import re

import jax
import jax.numpy as jnp
from jax import Array

_NAMES = ("gaussian", "orthogonal", "pissa", "loftq", "eva")
_PISSA = re.compile(r"pissa(_niter_(?P<iterations>[1-9]\d*))?")


def initialization_error(name: object) -> str | None:
    """Return what is wrong with a value of `init_lora_weights`, or None if it is valid."""
    if name is True or (isinstance(name, str) and (name in _NAMES or _PISSA.fullmatch(name))):
        return None
    return f"expected true, {', '.join(_NAMES)} or pissa_niter_N, found {name!r}"


def reads_weights(name: bool | str) -> bool:
    """Return whether this initialization is computed from the original weights."""
    return isinstance(name, str) and (name == "loftq" or _PISSA.fullmatch(name) is not None)


def pissa_iterations(name: str) -> int | None:
    """Return N of pissa_niter_N, or None for exact singular values."""
    match = _PISSA.fullmatch(name)
    return int(match["iterations"]) if match and match["iterations"] else None


def orthogonal(key: Array, in_features: int, out_features: int, rank: int) -> tuple[Array, Array]:
    """Return random float32 A `[in, r]` and B `[r, out]`, neither of them zero, with A B = 0."""
    keys = jax.random.split(key, 3)
    rows, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
    a = jax.random.normal(keys[1], (in_features, rank // 2)) @ rows[0::2] / 10
    b = rows[1::2].T @ jax.random.normal(keys[2], (rank // 2, out_features)) / 10
    return a, b
