"""Values that a recomputing backward pass may keep, by the names that the policies of `models.stack` choose from.

A value in bfloat16 is named as the integers of its bits (`quant.moved`): XLA's CPU backend would stack those of all layers
as float32. Integers have no gradient, so a rule of its own passes that on.
"""

from functools import partial
from typing import Any

import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.quant.moved import moved


def keep(x: Array, name: str) -> Array:
    """x itself, which a policy of `jax.checkpoint` may keep by that name."""
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
