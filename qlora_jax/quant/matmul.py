"""The one place where activations meet frozen weights.

    forward   y  = x @ dequantize(w)
    backward  dx = dy @ dequantize(w)^T        w itself is frozen and gets no gradient

Left to autodiff, the product would save the dense weight for the backward pass; the rule below saves the packed bytes, which
are in memory anyway, and dequantises them again.

Two implementations of a 4-bit product:

    xla      dequantises into a temporary and multiplies; everywhere
    pallas   a kernel that reads packed bytes only (`kernels`); on TPUs and NVIDIA GPUs

"auto" takes the kernel for at most 64 rows of x (decoding, where the weights' bytes are the time), on a platform and for a
matrix that it exists for, on one device; XLA otherwise, and for every gradient. "pallas" takes the kernel for all of it but
the gradient on GPUs, that of TPU in interpret mode where there is no such chip, and refuses what it does not support. It is
a property of the weight (`QuantizedTensor.implementation`), so that a model's layers need not know:
`with_implementation(model state, "xla")`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
from jax import Array

from qlora_jax.quant import kernels, tiles
from qlora_jax.quant.dense_matmul import dense_matmul, einsum
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.tensor import Implementation, QuantizedTensor, dequantize

FEW_ROWS = 64  # of x, up to which "auto" prefers the kernel


def matmul(x: Array, w: Array | QuantizedTensor | StackedTensor, *, implementation: Implementation | None = None) -> Array:
    """`x @ w` for x `[..., in]` and a frozen or dense w `[in, out]`, in the dtype of x.

    A dense `w` is an ordinary operand (its gradient flows if someone asks for it); one in 4 bits is a constant to
    differentiation.

    Args:
        implementation: "auto", "xla" or "pallas", as the module describes; that of `w` if None.

    Raises:
        ValueError: the last axis of x is not the first of w; or "pallas" does not support this product.
    """
    if x.shape[-1] != w.shape[0] or w.ndim != 2:
        raise ValueError(f"cannot multiply x {x.shape} by w {w.shape}: expected x [..., in] and w [in, out]")
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, QuantizedTensor | StackedTensor):
        packed = w.stack if isinstance(w, StackedTensor) else w
        y: Array = _einsum(_chosen(rows, packed, implementation or packed.implementation), rows, w)
    else:
        y = dense_matmul(rows, w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _chosen(x: Array, w: QuantizedTensor, wanted: Implementation) -> Implementation:
    """What to do with the rows x: "auto" stays only where the kernel is to be taken by the platform."""
    if wanted == "pallas" and (problem := kernels.problem(w, x.dtype)) is not None:
        raise ValueError(f"implementation 'pallas': no kernel takes {problem}; 'auto' falls back to XLA")
    if wanted == "auto" and (x.shape[0] > FEW_ROWS or not kernels.exists(w, x.dtype) or not kernels.on_one_device()):
        return "xla"
    return wanted


def with_implementation(tree: Any, implementation: Implementation) -> Any:
    """A tree (a model's state, say) whose 4-bit matrices ask for `implementation`."""

    def change(leaf: Any) -> Any:
        return dataclasses.replace(leaf, implementation=implementation) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(change, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def _xla(x: Array, w: QuantizedTensor | StackedTensor) -> Array:
    x, matrix = _in_turn(x, w)

    def whole(x: Array, w: QuantizedTensor) -> Array:
        return einsum("nk,km->nm", x, dequantize(w, x.dtype))

    if x.shape[0] > FEW_ROWS or matrix.flat_shape is not None:
        return whole(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=tiles.matmul, default=whole)


def _xla_transposed(dy: Array, w: QuantizedTensor | StackedTensor) -> Array:
    dy, matrix = _in_turn(dy, w)
    return einsum("nm,km->nk", dy, dequantize(matrix, dy.dtype))


def _in_turn(x: Array, w: QuantizedTensor | StackedTensor) -> tuple[Array, QuantizedTensor]:
    """(x, the matrix), which cannot be dequantised before x is there: else XLA holds several dense matrices at once.

    The packed bytes of the layer are copied for that, a quarter of what the dense matrix takes.
    """
    if isinstance(w, StackedTensor):
        x, index = jax.lax.optimization_barrier((x, w.index))
        return x, StackedTensor(w.stack, index).matrix()
    return jax.lax.optimization_barrier((x, w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(implementation: Implementation, x: Array, w: QuantizedTensor | StackedTensor) -> Array:
    match implementation:
        case "xla":
            return _xla(x, w)
        case "auto":
            return kernels.matmul_where_chosen(x, w, otherwise=_xla)
        case "pallas":
            return kernels.matmul(x, w, otherwise=_xla)


def _forward(implementation: Implementation, x: Array, w: Any) -> tuple[Array, Any]:
    return _einsum(implementation, x, w), w


def _backward(implementation: Implementation, w: Any, dy: Array) -> tuple[Array, None]:
    if implementation == "pallas":
        return kernels.matmul_transposed(dy, w, otherwise=_xla_transposed), None
    return _xla_transposed(dy, w), None


_einsum.defvjp(_forward, _backward)
