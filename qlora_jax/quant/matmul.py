"""The one place where activations meet frozen weights.

    forward   y  = x @ dequantize(w)
    backward  dx = dy @ dequantize(w)^T        w itself is frozen and gets no gradient

Left to autodiff, the product would save the dense weight for the backward pass; the rule below saves the packed bytes, which
are in memory anyway, and dequantises them again.
"""

import jax
from jax import Array

from qlora_jax.quant.tensor import QuantizedTensor, dequantize


def matmul(x: Array, w: Array | QuantizedTensor) -> Array:
    """`x @ w` for x `[..., in]` and a frozen or dense w `[in, out]`, in the dtype of x.

    A dense `w` is an ordinary operand (its gradient flows if someone asks for it); a `QuantizedTensor` is a constant to
    differentiation.

    Raises:
        ValueError: the last axis of x is not the first of w.
    """
    if x.shape[-1] != w.shape[0] or w.ndim != 2:
        raise ValueError(f"cannot multiply x {x.shape} by w {w.shape}: expected x [..., in] and w [in, out]")
    rows = x.reshape(-1, x.shape[-1])
    y = _quantized_matmul(rows, w) if isinstance(w, QuantizedTensor) else rows @ w.astype(x.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


@jax.custom_vjp
def _quantized_matmul(x: Array, w: QuantizedTensor) -> Array:
    x, w = jax.lax.optimization_barrier((x, w))
    return x @ dequantize(w, x.dtype)


def _forward(x: Array, w: QuantizedTensor) -> tuple[Array, QuantizedTensor]:
    return _quantized_matmul(x, w), w


def _backward(w: QuantizedTensor, dy: Array) -> tuple[Array, None]:
    dy, w = jax.lax.optimization_barrier((dy, w))
    return dy @ dequantize(w, dy.dtype).T, None


_quantized_matmul.defvjp(_forward, _backward)
