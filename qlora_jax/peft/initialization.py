"""How LoRA's A and B start, by PEFT's names (`init_lora_weights`).

    True             A uniform in ±1/sqrt(in), B zero
    gaussian         A normal with deviation 1/r, B zero
    orthogonal       both random, by halves of the rows of one orthogonal [r, r], so that A B = 0; r even
    pissa            the r largest singular values of the original weight, which are taken off the base (pissa.py)
    pissa_niter_N    the same, approximately, by N subspace iterations
    loftq            what 4 bits lose of the original weight, in r singular values, by turns (loftq.py)
    eva              A the r main directions of the layer's inputs on the training data, B zero (eva.py)

The first three need a random key alone. The next three read the original weights, while these are loaded
(checkpoint/initialize.py).
"""

import re

import jax
import jax.numpy as jnp
from jax import Array

_NAMES = ("gaussian", "orthogonal", "pissa", "loftq", "eva")
_PISSA = re.compile(r"pissa(_niter_(?P<iterations>[1-9]\d*))?")


def check_start(name: object) -> str | None:
    """What is wrong with a value of `init_lora_weights`; None: nothing."""
    if name is True or (isinstance(name, str) and (name in _NAMES or _PISSA.fullmatch(name))):
        return None
    return f"expected true, {', '.join(_NAMES)} or pissa_niter_N, found {name!r}"


def reads_weights(name: bool | str) -> bool:
    """Whether it follows from the original weights."""
    return isinstance(name, str) and (name == "loftq" or _PISSA.fullmatch(name) is not None)


def pissa_iterations(name: str) -> int | None:
    """N of pissa_niter_N; None for exact singular values."""
    match = _PISSA.fullmatch(name)
    return int(match["iterations"]) if match and match["iterations"] else None


def orthogonal(key: Array, in_features: int, out_features: int, rank: int) -> tuple[Array, Array]:
    """Float32 A `[in, r]` and B `[r, out]`, neither of them zero, with A B = 0."""
    keys = jax.random.split(key, 3)
    rows, _ = jnp.linalg.qr(jax.random.normal(keys[0], (rank, rank)))
    a = jax.random.normal(keys[1], (in_features, rank // 2)) @ rows[0::2] / 10
    b = rows[1::2].T @ jax.random.normal(keys[2], (rank // 2, out_features)) / 10
    return a, b
