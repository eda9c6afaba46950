"""Products with 4-bit matrices that read packed bytes only, and the choice among them.

    tpu.py      Pallas (Mosaic TPU): any number of rows, and the input gradient

A kernel takes one matrix, or a stack of them with a number (`StackedTensor`). What no kernel takes is XLA's.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.quant.kernels import tpu
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.tensor import QuantizedTensor

Packed = QuantizedTensor | StackedTensor


def problem(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Why no kernel multiplies x of `dtype` with a matrix (or those of a stack); None where one does."""
    return tpu.problem(w, dtype)


def on_one_device() -> bool:
    """Whether a kernel would see whole operands: XLA cannot spread one over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1


def matmul(x: Array, w: Packed) -> Array:
    """x `[M, in]` times W by the kernel of the platform, or by that of TPU in interpret mode."""
    interpreted = functools.partial(tpu.matmul, interpret=True)
    return jax.lax.platform_dependent(x, *_parts(w), tpu=tpu.matmul, default=interpreted)


def matmul_transposed(dy: Array, w: Packed) -> Array:
    """dy `[M, out]` times the transpose of W, likewise."""
    interpreted = functools.partial(tpu.matmul_transposed, interpret=True)
    return jax.lax.platform_dependent(dy, *_parts(w), tpu=tpu.matmul_transposed, default=interpreted)


def matmul_where_chosen(x: Array, w: Packed, *, otherwise: Callable[[Array, Packed], Array]) -> Array:
    """`matmul` on platforms that have a kernel; elsewhere, and where its compiler refuses the kernel, `otherwise`."""

    def fall_back(x: Array, w: QuantizedTensor, layer: Array | None) -> Array:
        return otherwise(x, w if layer is None else StackedTensor(w, layer))

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, *_parts(w)))
    leaves, tree = jax.tree.flatten(shapes)
    if jax.default_backend() == "tpu" and not _compiles(tpu.matmul, tuple(leaves), tree):
        return otherwise(x, w)
    return jax.lax.platform_dependent(x, *_parts(w), tpu=tpu.matmul, default=fall_back)


def _parts(w: Packed) -> tuple[QuantizedTensor, Array | None]:
    return (w.stack, w.index) if isinstance(w, StackedTensor) else (w, None)


@functools.cache
def _compiles(kernel: Callable[..., Array], leaves: tuple[jax.ShapeDtypeStruct, ...], tree: Any) -> bool:
    """Whether the attached device's compiler takes a kernel for these shapes; says so once where it does not.

    Inside a jitted program a refusal could not be caught. It costs a compilation of the kernel alone, once per shape.
    """
    try:
        jax.jit(kernel).lower(*jax.tree.unflatten(tree, leaves)).compile()
    except Exception as error:  # of whatever kind the compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"the kernel for 4-bit matrices does not compile here, XLA multiplies instead: {reason}", stacklevel=2)
        return False
    return True
