"""AdamW with moments of 8 bits a value (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization").

    m = beta1 m' + (1 - beta1) g           m' and v' are read from 8 bits, and all of this is float32
    v = beta2 v' + (1 - beta2) g²
    update = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)
    m, v are written in 8 bits             after the update, which sees them unrounded

m is stored with the signed dynamic map, and v, which is never negative, with the unsigned one, each in blocks of 256 values
that
share a float32 absmax: 2.03 bytes a parameter for both, where float32 takes 8. Arrays below 4096 values, a few percent of an
adapter and the ones that rounding hurts most, stay in float32. The state is a pytree of plain arrays: it can be donated,
moved to host memory and saved like any other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qlora_jax.quant import BlockwiseArray, dequantize_blockwise, quantize_blockwise

LEAST_SIZE = 4096  # the number of values from which on an array's moments are quantised


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adam8bitState:
    """The moments of Adam.

    Attributes:
        count: the number of updates done, an int32 scalar.
        first, second: the moments, trees like the parameters of `BlockwiseArray`s or, for small parameters, float32 arrays.
    """

    count: Array
    first: Any
    second: Any


def scale_by_adam8bit(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Return the update rule of Adam without learning rate and weight decay, as `optax.scale_by_adam` has it."""

    def init(params: optax.Params) -> Any:
        def zeros(signed: bool) -> Any:
            return jax.tree.map(lambda leaf: _store(jnp.zeros(leaf.shape, jnp.float32), signed=signed), params)

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

    def update(updates: Any, state: Any, params: optax.Params | None = None) -> tuple[Any, Any]:
        count = state.count + 1
        correction1, correction2 = 1 - jnp.float32(beta1) ** count, 1 - jnp.float32(beta2) ** count

        def one(gradient: Array, first: Any, second: Any) -> tuple[Array, Any, Any]:
            g = gradient.astype(jnp.float32)
            m = beta1 * _read(first) + (1 - beta1) * g
            v = beta2 * _read(second) + (1 - beta2) * g**2
            scaled = (m / correction1) / (jnp.sqrt(v / correction2) + epsilon)
            return scaled.astype(gradient.dtype), _store(m, signed=True), _store(v, signed=False)

        leaves, tree = jax.tree.flatten(updates)
        done = [one(*x) for x in zip(leaves, *map(tree.flatten_up_to, (state.first, state.second)), strict=True)]
        updates, first, second = (tree.unflatten(column) for column in zip(*done, strict=True))
        return updates, Adam8bitState(count, first, second)

    return optax.GradientTransformation(init, update)


def _store(x: Array, *, signed: bool) -> BlockwiseArray | Array:
    return x if x.size < LEAST_SIZE else quantize_blockwise(x, signed=signed)


def _read(stored: BlockwiseArray | Array) -> Array:
    return dequantize_blockwise(stored) if isinstance(stored, BlockwiseArray) else stored
