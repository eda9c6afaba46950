"""The lookup of 4-bit codes in the Mosaic GPU kernel, four packed bytes at a time.

    [32, 128] packed bytes -> [32, 128] bfloat16 values of the high nibbles, and [32, 128] of the low ones

`gpu` is the module `jax.experimental.pallas.mosaic_gpu`, which callers import when they need the kernel.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qlora_jax.quant.codebooks import DataType, codebook
from qlora_jax.quant.kernels.lookup_ptx import lookup_ptx, tables


def word_layout(gpu: Any) -> Any:
    """Return the distribution of `[32, 128]` values among the 128 threads of a warpgroup.

    A thread has four successive columns, which are a word of codes. Sixteen threads have the 64 columns, or 128 bytes, of a
    row of the swizzled dense tiles, so that their stores meet no bank twice.
    """
    tiling = gpu.Tiling(((8, 64), (2, 64), (4,)))
    return gpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def looked_up_values(packed: Array, data_type: DataType, gpu: Any) -> tuple[Array, Array]:
    """Return the bfloat16 values of the (high, low) nibbles of packed bytes, by PTX instructions."""
    from jax.experimental.mosaic import gpu as mosaic
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    program = lookup_ptx(tables(data_type, jnp.bfloat16)[0], by_nibble=True)
    layout = word_layout(gpu)
    result = gpu.ShapeDtypeStruct(packed.shape, jnp.bfloat16, layout=layout)

    @gpu.inline_mgpu(arg_types=(layout,), return_type=(result, result))
    def look_up(_: Any, codes: Any) -> tuple[Any, Any]:
        word = ir.IntegerType.get_signless(32)
        four_values = ir.VectorType.get((4,), ir.BF16Type.get())
        two_words = ir.VectorType.get((2,), word)
        four_words = llvm.StructType.get_literal([word] * 4)
        halves = [np.empty_like(codes.registers) for _ in range(2)]
        for place, register in np.ndenumerate(codes.registers):
            source = mosaic.utils.bitcast(register, word)
            found: Any = llvm.inline_asm(four_words, [source], program, "=r,=r,=r,=r,r", has_side_effects=False)
            for half, registers in enumerate(halves):
                pair = llvm.mlir_undef(two_words)
                for number in range(2):
                    part = llvm.extractvalue(word, found, [2 * half + number])
                    pair = llvm.insertelement(pair, part, mosaic.utils.c(number, word))
                registers[place] = mosaic.utils.bitcast(pair, four_values)
        high, low = (
            mosaic.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None) for registers in halves
        )
        return high, low

    high, low = look_up(packed)
    return high, low


def selected_values(packed: Array, data_type: DataType) -> tuple[Array, Array]:
    """Compute `looked_up_values` by selects, in interpret mode."""
    packed = packed.astype(jnp.int32)

    def values(codes: Array) -> Array:
        found = lax.full(codes.shape, 0, jnp.float32)
        for code, value in enumerate(codebook(data_type)):
            found = lax.select(codes == code, lax.full(codes.shape, value, jnp.float32), found)
        return found.astype(jnp.bfloat16)

    return values(packed >> 4), values(packed & 15)
