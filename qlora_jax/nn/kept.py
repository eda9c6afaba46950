"""Values that a recomputing backward pass may keep, by name."""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.quant.moved import moved


def keep(x: Array, name: str) -> Array:
    """x, which a policy of `jax.checkpoint` may keep by that name: `checkpoint_name`, but for the move into a stack."""
    kept: Any = _keep(x, name)
    return kept


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _keep(x: Array, name: str) -> Array:
    return moved(partial(checkpoint_name, name=name), x)


def _forward(x: Array, name: str) -> tuple[Array, None]:
    return moved(partial(checkpoint_name, name=name), x), None


def _backward(_name: str, _kept: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


_keep.defvjp(_forward, _backward)
