"""Kernels for products with 4-bit matrices, which read only packed bytes from memory, and the choice of a kernel.

    tpu.py              Pallas (Mosaic TPU): any number of rows, and the gradient with respect to x
    tpu_dequantize.py   Pallas (Mosaic TPU): the dense matrix, for products of many rows, which XLA computes
    gpu.py              Pallas (Triton): few rows, on NVIDIA GPUs with compute capability 8.0 or higher
    hopper.py           Pallas (Mosaic GPU): many rows, and the gradient with respect to x, on NVIDIA's Hopper GPUs

A kernel takes one matrix, or a stack of matrices with the index of one (`StackedTensor`). XLA computes all other products.
"""

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from qlora_jax.quant.kernels import hopper, tpu, tpu_dequantize, trial
from qlora_jax.quant.stacked import StackedTensor
from qlora_jax.quant.targets import by_platform, has_hopper, is_for_hopper
from qlora_jax.quant.tensor import QuantizedTensor

# The most rows for which the fused product is used. It saves writing and reading the dense matrix, 4 bytes a value, which
# for an H100 is 29 % of the time that the product of 2048 rows takes at the peak rate.
MOST_FUSED_ROWS = 2048
FUSED = "QLORA_JAX_FUSED"  # the environment variable


Packed = QuantizedTensor | StackedTensor
Otherwise = Callable[[Array, Packed], Array]  # the product for platforms and matrices without a kernel
_BY_PLATFORM: dict[str, ModuleType] = {"tpu": tpu}
try:  # Pallas' Triton backend is deprecated; with a JAX without it, XLA computes all products on GPUs
    from qlora_jax.quant.kernels import gpu
except ImportError:
    pass
else:
    _BY_PLATFORM["cuda"] = gpu


def unsupported_reason(w: QuantizedTensor, dtype: DTypeLike) -> str | None:
    """Return why the platform's kernel does not support this matrix (or stack) with x of `dtype`, or None if it does.

    On a platform without a kernel this refers to the TPU kernel, which is then interpreted.
    """
    return _BY_PLATFORM.get(_platform(), tpu).unsupported_reason(w, dtype)


def exists(w: QuantizedTensor, dtype: DTypeLike) -> bool:
    """Return whether the kernel of any platform supports this matrix (or stack) with x of `dtype`."""
    return any(platform.unsupported_reason(w, dtype) is None for platform in _BY_PLATFORM.values())


def on_one_device() -> bool:
    """Return whether there is only one device; XLA cannot partition a kernel over several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.size == 1


def on_several_devices() -> bool:
    """Return whether the context has a mesh of several devices, over which XLA spreads the program."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and mesh.are_all_axes_auto


def matmul(x: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """Return x `[M, in]` times W, by the kernel of the platform or by the TPU kernel in interpret mode.

    `otherwise` computes the product if the program is compiled for a platform whose kernel does not support W.
    """
    interpreted = functools.partial(tpu.matmul, interpret=True)
    default = interpreted if tpu.unsupported_reason(_parts(w)[0], x.dtype) is None else _of_parts(otherwise)
    return by_platform(x, *_parts(w), **_kernels(w, x.dtype), default=default)


def matmul_transposed(dy: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """Return dy `[M, out]` times the transposed W, like `matmul`; on GPUs, which have no such kernel, use `otherwise`."""
    if tpu.transposed_unsupported_reason(_parts(w)[0], dy.dtype) is not None:
        return otherwise(dy, w)
    interpreted = functools.partial(tpu.matmul_transposed, interpret=True)
    return by_platform(dy, *_parts(w), tpu=tpu.matmul_transposed, cuda=_of_parts(otherwise), default=interpreted)


def matmul_where_chosen(x: Array, w: Packed, *, otherwise: Otherwise) -> Array:
    """Return x times W by the kernel, or by `otherwise` if the platform has no kernel or its compiler rejects it.

    A Hopper GPU takes the fused product where the kernel for few rows does not support W or is missing.
    """
    kernels = _kernels(w, x.dtype)
    if "cuda" not in kernels and fused(x, w) is not None:
        kernels["cuda"] = hopper.matmul
    kernel = kernels.get(_platform())
    if kernel is not None and not _compiles(kernel, *_shapes(x, *_parts(w))):
        return otherwise(x, w)
    return by_platform(x, *_parts(w), **kernels, default=_of_parts(otherwise))


def dequantizer(w: Packed, dtype: DTypeLike) -> Callable[[Packed], Array] | None:
    """Return the function by which TPUs dequantise a matrix like w to `[in, out]`.

    On several devices each of them dequantises the whole matrix, whose packed bytes it has gathered.

    None if the kernel does not support the matrix or, where a TPU is attached, if its compiler rejects the kernel.
    """
    kernel = _dequantizer(jnp.dtype(dtype), on_several_devices())
    if tpu_dequantize.unsupported_reason(_parts(w)[0], dtype) is not None:
        return None
    if _platform() == "tpu" and not _compiles(kernel, *_shapes(*_parts(w))):
        return None
    return lambda w: kernel(*_parts(w))


def fused(x: Array, w: Packed, *, transposed: bool = False) -> Callable[[Array, Packed], Array] | None:
    """Return the function by which Hopper GPUs multiply x with W, or with the transposed W, without a dense matrix.

    None if the program is for another device or for several, if the kernel does not support the operands, if x has too many
    rows, if the kernel failed on the attached device (`trial`), or if the device's compiler rejects it for these shapes.
    The environment variable `QLORA_JAX_FUSED` switches the kernel off if it is 0, and makes its trial needless if it is 1.
    """
    matrix, _ = _parts(w)
    if x.shape[0] > MOST_FUSED_ROWS or hopper.unsupported_reason(matrix, x.dtype) is not None or not _fused_allowed():
        return None
    kernel = hopper.matmul_transposed if transposed else hopper.matmul
    if has_hopper() and not _compiles(kernel, *_shapes(x, *_parts(w))):
        return None
    return lambda x, w: kernel(x, *_parts(w))


def try_fused(tree: Any) -> None:
    """Make the trial of the fused product now, if programs with these 4-bit matrices, leaves of a pytree, may use it.

    Otherwise it is made when the first program that multiplies many rows is traced.
    """
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    packed = [leaf for leaf in leaves if isinstance(leaf, QuantizedTensor)]
    if any(hopper.unsupported_reason(w, w.dtype) is None for w in packed):
        _fused_allowed()


def _fused_allowed() -> bool:
    """Return whether the program may use the fused product, after its trial on an attached Hopper GPU."""
    wanted = os.environ.get(FUSED)
    if wanted == "0" or not on_one_device() or not is_for_hopper():
        return False
    # A plan may be for a Hopper GPU where another GPU is attached, on which there is nothing to try.
    return wanted == "1" or not has_hopper() or trial.is_right(jax.devices()[0].device_kind)


@functools.cache
def _dequantizer(dtype: DTypeLike, replicated: bool) -> Callable[[QuantizedTensor, Array | None], Array]:
    kernel = functools.partial(tpu_dequantize.dequantize, dtype=dtype)
    if not replicated:
        return kernel
    return lambda *parts: jax.shard_map(kernel, in_specs=P(), out_specs=P(), check_vma=False)(*parts)


def _shapes(*arguments: Any) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Any]:
    leaves, tree = jax.tree.flatten(arguments)
    return tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves), tree


def _kernels(w: Packed, dtype: DTypeLike) -> dict[str, Callable[..., Array]]:
    """Return, by platform, the functions that multiply with W by a kernel."""
    matrix, _ = _parts(w)
    supported = {name: module.unsupported_reason(matrix, dtype) is None for name, module in _BY_PLATFORM.items()}
    return {name: module.matmul for name, module in _BY_PLATFORM.items() if supported[name]}


def _platform() -> str:
    """Return the platform that this process compiles for: "cpu", "tpu", "cuda" or "rocm"."""
    name = jax.default_backend()
    return name if name != "gpu" else "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _parts(w: Packed) -> tuple[QuantizedTensor, Array | None]:
    return (w.stack, w.index) if isinstance(w, StackedTensor) else (w, None)


def _of_parts(function: Otherwise) -> Callable[[Array, QuantizedTensor, Array | None], Array]:
    return lambda x, w, layer: function(x, w if layer is None else StackedTensor(w, layer))


@functools.cache
def _compiles(kernel: Callable[..., Array], leaves: tuple[jax.ShapeDtypeStruct, ...], tree: Any) -> bool:
    """Return whether the device's compiler accepts a kernel for these shapes; warn once if it does not.

    An error of the compiler cannot be caught inside a jitted program, so the kernel is compiled separately, once per shape.
    """
    try:
        jax.jit(kernel).lower(*jax.tree.unflatten(tree, leaves)).compile()
    except Exception as error:  # compilers raise various kinds of errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name, without = "kernel for", ""
        if kernel in (hopper.matmul, hopper.matmul_transposed):
            name, without = "fused product with", f" ({FUSED}=0 does without it)"
        warnings.warn(f"the {name} 4-bit matrices does not compile here, XLA does its work: {reason}{without}", stacklevel=2)
        return False
    return True
