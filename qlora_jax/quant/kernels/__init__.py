"""Products with 4-bit matrices that read packed bytes only, and the choice among them.

    tpu.py      Pallas (Mosaic TPU): any number of rows, and the input gradient
    gpu.py      Pallas (Triton): few rows, on NVIDIA GPUs from compute capability 8.0 on

A kernel takes one matrix, or a stack of them with a number (`StackedTensor`). What no kernel takes is XLA's.
"""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.quant.kernels import tpu
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.tensor import QuantizedTensor

Packed = QuantizedTensor | StackedTensor
Otherwise = Callable[[Array, Packed], Array]
_BY_PLATFORM: dict[str, ModuleType] = {"tpu": tpu}
try:  # Pallas calls its Triton backend deprecated: a JAX without it leaves GPUs to XLA
    from qlora_jax.quant.kernels import gpu
except ImportError:
    pass
else:
    _BY_PLATFORM["cuda"] = gpu


def problem(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Why the kernel of this process's platform does not multiply x of `dtype` with a matrix (or those of a stack).

    None where it does. Where the platform has none, it is that of TPU, which is interpreted there.
    """
    return _BY_PLATFORM.get(_platform(), tpu).problem(w, dtype)


def exists(w: QuantizedTensor, dtype: DTypeLike) -> bool:
    """Whether the kernel of some platform multiplies x of `dtype` with a matrix (or those of a stack)."""
    return any(platform.problem(w, dtype) is None for platform in _BY_PLATFORM.values())


def on_one_device() -> bool:
    """Whether a kernel would see whole operands: XLA cannot spread one over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1


def matmul(x: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """x `[M, in]` times W by the kernel of the platform, or by that of TPU in interpret mode.

    `otherwise` is for platforms whose kernel does not take W, if the program is compiled for one.
    """
    interpreted = functools.partial(tpu.matmul, interpret=True)
    default = interpreted if tpu.problem(_parts(w)[0], x.dtype) is None else _of_parts(otherwise)
    return jax.lax.platform_dependent(x, *_parts(w), **_kernels(w, x.dtype), default=default)


def matmul_transposed(dy: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """dy `[M, out]` times the transpose of W, likewise; by `otherwise` on GPUs, for which there is no such kernel."""
    if tpu.problem(_parts(w)[0], dy.dtype) is not None:
        return otherwise(dy, w)
    interpreted = functools.partial(tpu.matmul_transposed, interpret=True)
    return jax.lax.platform_dependent(
        dy, *_parts(w), tpu=tpu.matmul_transposed, cuda=_of_parts(otherwise), default=interpreted
    )


def matmul_where_chosen(x: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """`matmul` on platforms that have a kernel; elsewhere, and where its compiler refuses the kernel, `otherwise`."""
    kernels = _kernels(w, x.dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, *_parts(w)))
    leaves, tree = jax.tree.flatten(shapes)
    kernel = kernels.get(_platform())
    if kernel is not None and not _compiles(kernel, tuple(leaves), tree):
        return otherwise(x, w)
    return jax.lax.platform_dependent(x, *_parts(w), **kernels, default=_of_parts(otherwise))


def _kernels(w: Packed, dtype: DTypeLike) -> dict[str, Callable[..., Array]]:
    """The products by kernel, of the platforms that have one for W."""
    matrix, _ = _parts(w)
    return {name: module.matmul for name, module in _BY_PLATFORM.items() if module.problem(matrix, dtype) is None}


def _platform() -> str:
    """Of this process, as programs are compiled for it."""
    name = jax.default_backend()
    return name if name != "gpu" else "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _parts(w: Packed) -> tuple[QuantizedTensor, Array | None]:
    return (w.stack, w.index) if isinstance(w, StackedTensor) else (w, None)


def _of_parts(function: Otherwise) -> Callable[[Array, QuantizedTensor, Array | None], Array]:
    return lambda x, w, layer: function(x, w if layer is None else StackedTensor(w, layer))


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
