"""Names for values that `jax.checkpoint` may save as residuals; the policies in `models.stack` select them by name.

A bfloat16 value is bitcast to integers before it is named (`quant.bitcast`), because XLA's CPU backend would stack the saved
residuals of all layers in float32. Integers have no gradient, so a custom differentiation rule passes the gradient through.
A policy does not look into a custom rule that is called by the forward rule of another one. Values there, which JAX does not
differentiate, are named by `name_in_rule`.
"""

from functools import partial
from typing import Any

import jax
from jax import Array, ad_checkpoint
from jaxtyping import Shaped

from qlora_jax.quant.bitcast import via_bitcast


def checkpoint_name(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """Return x, which a policy of `jax.checkpoint` may save as a residual by this name."""
    named: Any = _named(x, name)
    return named


def name_in_rule(x: Shaped[Array, "*shape"], name: str) -> Shaped[Array, "*shape"]:
    """Return x as `checkpoint_name` does, in the forward rule of a `jax.custom_vjp`; in bfloat16, it has no gradient."""
    return via_bitcast(partial(ad_checkpoint.checkpoint_name, name=name), x)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _named(x: Array, name: str) -> Array:
    return name_in_rule(x, name)


def _forward(x: Array, name: str) -> tuple[Array, None]:
    return name_in_rule(x, name), None


def _backward(_name: str, _residual: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


_named.defvjp(_forward, _backward)
