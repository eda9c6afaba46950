"""Values that a recomputing backward pass may keep, by the names that the policies of `models.stack` choose from.

A value in bfloat16 is named as the integers of its bits (`quant.bitcast`): XLA's CPU backend would stack those of all layers
as float32. Integers have no gradient, so a rule of its own passes that on.
"""

from functools import partial
from typing import Any

import jax
from jax import Array, ad_checkpoint

from qlora_jax.quant.bitcast import via_bitcast


def checkpoint_name(x: Array, name: str) -> Array:
    """x itself, which a policy of `jax.checkpoint` may keep by that name."""
    named: Any = _named(x, name)
    return named


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _named(x: Array, name: str) -> Array:
    return via_bitcast(partial(ad_checkpoint.checkpoint_name, name=name), x)


def _forward(x: Array, name: str) -> tuple[Array, None]:
    return via_bitcast(partial(ad_checkpoint.checkpoint_name, name=name), x), None


def _backward(_name: str, _residual: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


_named.defvjp(_forward, _backward)
