"""The functions of feed-forward layers."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def activate(name: Activation, x: Array) -> Array:
    """silu; gelu: x Φ(x) exactly; gelu_tanh: its approximation by tanh; relu."""
    match name:
        case "silu":
            return jax.nn.silu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def gated(name: Activation, gate: Array, up: Array) -> Array:
    """activate(gate) * up, computed in float32 and rounded once, to the dtype of gate.

    The backward pass keeps gate and up alone, and nothing in float32.
    """
    result: Any = _gated(name, gate, up)
    return result


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(name: Activation, gate: Array, up: Array) -> Array:
    return _exactly(name, gate, up).astype(gate.dtype)


def _exactly(name: Activation, gate: Array, up: Array) -> Array:
    return activate(name, gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _forward(name: Activation, gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    result: Any = _gated(name, gate, up)
    return result, (gate, up)


def _backward(name: Activation, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    _, pull = jax.vjp(partial(_exactly, name), *kept)
    return pull(gradient.astype(jnp.float32))


_gated.defvjp(_forward, _backward)
