"""Normalization layers, computed in float32: RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from qlora_jax.nn.delta import Delta, value_of


class RMSNorm(nnx.Module):
    """RMSNorm: x / sqrt(mean(x²) + eps) * weight over the last axis; the result has the dtype of x.

    With `offset` the factor is 1 + weight, and it is applied before the result is rounded to the dtype of x (Gemma).
    """

    def __init__(self, features: int, *, eps: float, offset: bool = False, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.zeros((features,), dtype) if offset else jnp.ones((features,), dtype))
        self.weight_delta: Delta | None = None
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        exact = x.astype(jnp.float32)
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.eps)
        weight = value_of(self.weight, self.weight_delta)
        if self.offset:
            return (exact * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
        return exact.astype(x.dtype) * weight.astype(x.dtype)


class LayerNorm(nnx.Module):
    """LayerNorm: (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis; the result has the dtype of x."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.weight_delta: Delta | None = None
        self.bias_delta: Delta | None = None
        self.eps = eps

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        exact = x.astype(jnp.float32)
        exact = exact - jnp.mean(exact, axis=-1, keepdims=True)
        exact = exact * jax.lax.rsqrt(jnp.mean(exact * exact, axis=-1, keepdims=True) + self.eps)
        weight, bias = value_of(self.weight, self.weight_delta), value_of(self.bias, self.bias_delta)
        return (exact * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
