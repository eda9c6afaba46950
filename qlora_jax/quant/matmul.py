"""The product of activations with frozen weights; all products of the package with frozen matrices are computed here.

    forward   y  = x @ dequantize(w)
    backward  dx = dy @ dequantize(w)^T        w is frozen and gets no gradient

JAX's own differentiation rule would save the dense weight as a residual. The custom rule here saves the packed bytes, which
are in memory anyway, and dequantises them again.

There are two implementations of a product with a 4-bit matrix:

    xla      dequantises the matrix into a temporary array and multiplies; on every platform
    pallas   a kernel that reads only packed bytes (`kernels`); on TPUs and NVIDIA GPUs

"auto" uses the kernel if x has at most 64 rows (in decoding, reading the weights takes most of the time) and there is a
kernel for the platform and the matrix. For more rows, for other matrices, and for gradients XLA multiplies; on TPUs a second
kernel dequantises the matrix (`kernels.dequantizer`), because XLA takes several times as long, and on Hopper GPUs a kernel
multiplies without a dense matrix in memory (`kernels.fused`), up to 2048 rows. On several devices XLA multiplies; each TPU
dequantises the matrix that it has gathered by the kernel. On a mesh with a tensor axis XLA does all of it.

"pallas" always uses the kernel, except for the gradient on GPUs. On platforms without a kernel it runs the TPU kernel in
interpret mode, and it raises an error for matrices that the kernel does not support. The implementation is a property of the
weight (`QuantizedTensor.implementation`), so layers need no option for it; `with_implementation(model state, "xla")` changes
it.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from jax import Array
from jaxtyping import Float

from qlora_jax.errors import UnsupportedError
from qlora_jax.quant import kernels, tiles
from qlora_jax.quant.dense_matmul import dense_matmul, einsum
from qlora_jax.quant.mixed import MixedTensor
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.targets import by_platform, tensor_shards
from qlora_jax.quant.tensor import Implementation, QuantizedTensor, dequantize

FEW_ROWS = 64  # the most rows of x for which "auto" prefers the kernel
# The most rows of x for which XLA for GPUs dequantises a matrix in its stack. For more, the bytes that the copy would take
# are few among those of the activations, and two dense matrices at once would take more memory.
MOST_IN_PLACE = 2048

_PRODUCT, _TRANSPOSED = "nk,km->nm", "nm,km->nk"

# "dequantize": a product of many rows, by what the platform has: a kernel that dequantises the matrix, for XLA's product, or
# a fused product.
_Way = Implementation | Literal["dequantize"]
Packed = QuantizedTensor | StackedTensor


def matmul(
    x: Float[Array, "*rows k"],
    w: Float[Array, "k n"] | QuantizedTensor | StackedTensor | MixedTensor,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*rows n"]:
    """Return x @ w, `[..., out]` in the dtype of x.

    A dense w can be differentiated; a 4-bit w gets no gradient.

    Args:
        x: `[..., in]`.
        w: `[in, out]`, dense or 4-bit.
        implementation: "auto", "xla" or "pallas" (see the module's docstring); None: that of w.

    Raises:
        ValueError: the last axis of x and the first axis of w differ.
        UnsupportedError: "pallas" does not support this product.
    """
    if x.shape[-1] != w.shape[0] or w.ndim != 2:
        raise ValueError(f"cannot multiply x {x.shape} by w {w.shape}: expected x [..., in] and w [in, out]")
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, QuantizedTensor | StackedTensor):
        packed = w.stack if isinstance(w, StackedTensor) else w
        y: Array = _einsum(_chosen(rows, packed, implementation or packed.implementation), rows, w)
    elif isinstance(w, MixedTensor):
        packed = w.stack.packed
        y = _mixed(_chosen(rows, packed, implementation or packed.implementation), rows, w)
    else:
        y = dense_matmul(rows, w)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _chosen(x: Array, w: QuantizedTensor, wanted: Implementation) -> _Way:
    """Return how to multiply; "auto" is returned only if the kernel of the platform may be used."""
    if _is_split(w):
        if wanted == "pallas":
            raise UnsupportedError("implementation 'pallas': no kernel takes matrices that are split over a tensor axis")
        return "xla"
    if wanted == "pallas" and (reason := kernels.unsupported_reason(w, x.dtype)) is not None:
        raise UnsupportedError(f"implementation 'pallas': no kernel takes {reason}; 'auto' falls back to XLA")
    if wanted != "auto":
        return wanted
    if not kernels.on_one_device():
        return "dequantize" if kernels.on_several_devices() else "xla"
    return "dequantize" if x.shape[0] > FEW_ROWS or not kernels.exists(w, x.dtype) else "auto"


def _is_split(w: QuantizedTensor) -> bool:
    """Return whether the devices have parts of the matrix, by rows or by columns."""
    return w.parts > 1 or tensor_shards() > 1


def with_implementation(tree: Any, implementation: Implementation) -> Any:
    """Return a tree, e.g. a model's state, with the implementation of its 4-bit matrices changed."""

    def change(leaf: Any) -> Any:
        return dataclasses.replace(leaf, implementation=implementation) if isinstance(leaf, QuantizedTensor) else leaf

    return jax.tree.map(change, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))


def _xla(x: Array, w: Packed, *, by_kernel: bool = False) -> Array:
    matrix = w.stack if isinstance(w, StackedTensor) else w
    few = x.shape[0] <= FEW_ROWS and matrix.flat_shape is None and not _is_split(matrix)
    return _dense_product(_PRODUCT, x, w, by_kernel, few)


def _xla_transposed(dy: Array, w: Packed, *, by_kernel: bool = False) -> Array:
    return _dense_product(_TRANSPOSED, dy, w, by_kernel, few=False)


def _dense_product(equation: str, x: Array, w: Packed, by_kernel: bool, few: bool) -> Array:
    """Return the einsum of x and the dense matrix.

    If `by_kernel`, TPUs make the dense matrix by a kernel, and one Hopper GPU multiplies without one in memory. On CPUs the
    product of few rows is computed in tiles.
    """

    def with_copy(x: Array, w: Packed) -> Array:
        x, matrix = _ordered(x, _matrix(w))  # the barrier is for the packed bytes of the layer, which are copied before it
        return einsum(equation, x, dequantize(matrix, x.dtype))

    def in_place(x: Array, w: Packed) -> Array:
        # The dequantisation itself slices the stack. XLA may then dequantise two matrices that have the same x at once.
        x, w = _ordered(x, w)
        return einsum(equation, x, dequantize(_matrix(w), x.dtype))

    def in_tiles(x: Array, w: Packed) -> Array:
        x, w = _ordered(x, w)
        return tiles.matmul(x, _matrix(w))

    fused = kernels.fused(x, w, transposed=equation == _TRANSPOSED) if by_kernel else None
    forms: dict[str, Callable[..., Array]] = {"cpu": in_tiles} if few else {}
    forms["cuda"] = fused or (in_place if x.shape[0] <= MOST_IN_PLACE else with_copy)
    if by_kernel and (dequantizer := kernels.dequantizer(w, x.dtype)) is not None:

        def with_kernel(x: Array, w: Packed) -> Array:
            x, w = _ordered(x, w)
            return einsum(equation, x, dequantizer(w))

        forms["tpu"] = with_kernel
    return by_platform(x, w, **forms, default=in_place if few else with_copy)


def _matrix(w: Packed) -> QuantizedTensor:
    return w.matrix() if isinstance(w, StackedTensor) else w


def _ordered(x: Array, w: Packed) -> tuple[Array, Any]:
    """Return (x, w) such that the matrix cannot be dequantised before x is computed.

    Without this barrier XLA may hold several dense matrices in memory at once. For a matrix that is not in a stack, the
    barrier costs a copy of the packed bytes, which is a quarter of the dense matrix's size.
    """
    if isinstance(w, StackedTensor):
        x, index = jax.lax.optimization_barrier((x, w.index))
        return x, StackedTensor(w.stack, index)
    return jax.lax.optimization_barrier((x, w))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsum(way: _Way, x: Array, w: Packed) -> Array:
    match way:
        case "xla":
            return _xla(x, w)
        case "dequantize":
            return _xla(x, w, by_kernel=True)
        case "auto":
            return kernels.matmul_where_chosen(x, w, otherwise=partial(_xla, by_kernel=True))
        case "pallas":
            return kernels.matmul(x, w, otherwise=_xla)


def _forward(way: _Way, x: Array, w: Any) -> tuple[Array, Any]:
    return _einsum(way, x, w), w


def _backward(way: _Way, w: Any, dy: Array) -> tuple[Array, None]:
    return _transposed(way, dy, w), None


def _transposed(way: _Way, dy: Array, w: Packed) -> Array:
    if way == "pallas":
        return kernels.matmul_transposed(dy, w, otherwise=_xla_transposed)
    return _xla_transposed(dy, w, by_kernel=way != "xla")


_einsum.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixed(way: _Way, x: Array, w: MixedTensor) -> Array:
    """Return x times the matrix, of whose two kinds the one that the layer has is chosen at run time."""
    return _of_kind(w, x, partial(_einsum, way), "nk,km->nm")


def _mixed_forward(way: _Way, x: Array, w: MixedTensor) -> tuple[Array, MixedTensor]:
    return _mixed(way, x, w), w


def _mixed_backward(way: _Way, w: MixedTensor, dy: Array) -> tuple[Array, None]:
    return _of_kind(w, dy, partial(_transposed, way), "nm,km->nk"), None


_mixed.defvjp(_mixed_forward, _mixed_backward)


def _of_kind(w: MixedTensor, x: Array, packed_product: Callable[[Array, Packed], Array], equation: str) -> Array:
    def packed(x: Array, w: MixedTensor) -> Array:
        return packed_product(x, StackedTensor(w.stack.packed, w.place()))

    def dense(x: Array, w: MixedTensor) -> Array:
        x, matrix = jax.lax.optimization_barrier((x, w.stack.dense[-1 - w.place()]))
        return einsum(equation, x, matrix.astype(x.dtype))

    y: Array = jax.lax.cond(w.place() >= 0, packed, dense, x, w)
    return y
