"""The activation functions of feed-forward layers, and the gated linear unit (GLU, Shazeer 2020)."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def activate(name: Activation, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Apply an activation: silu, gelu (x Φ(x) exactly), gelu_tanh (its approximation by tanh) or relu."""
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def glu(name: Activation, gate: Float[Array, "*shape"], up: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the gated linear unit activate(gate) * up, computed in float32 and rounded once, to the dtype of gate.

    The saved residuals of the backward pass are gate and up; no float32 array is saved.

    Args:
        name: the activation.
        gate: `[..., inner]`.
        up: `[..., inner]`.
    """
    result: Any = _glu(name, gate, up)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _glu(name: Activation, gate: Array, up: Array) -> Array:
    return _glu_float32(name, gate, up).astype(gate.dtype)


def _glu_float32(name: Activation, gate: Array, up: Array) -> Array:
    return activate(name, gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _forward(name: Activation, gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    result: Any = _glu(name, gate, up)
    return result, (gate, up)


def _backward(name: Activation, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, vjp = jax.vjp(partial(_glu_float32, name), *residuals)
    return vjp(gradient.astype(jnp.float32))


_glu.defvjp(_forward, _backward)
