"""The lookup of 4-bit codes in GPU kernels, as PTX.

PRMT, the byte permutation, selects four of eight bytes by four selectors of three bits, and a packed byte is two selectors.
The 16 values in bfloat16 are in four registers of low bytes and four registers of high bytes. For four codes, two PRMT
select from the values 0-7 and 8-15, a third one selects between these by the codes' top bits (all for low and for high
bytes), and two more combine the bytes to numbers. This takes 2.75 instructions per value; a tree of selects takes 20, and a
table in memory a load and the computation of its address.
"""

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qlora_jax.quant.codebooks import DataType, codebook


def tables(data_type: DataType, dtype: DTypeLike) -> list[np.ndarray]:
    """Return the 16 values in bfloat16 or, for float32, three bfloat16 tables that sum to the values, the largest first."""
    rest = np.asarray(codebook(data_type), np.float32)
    parts = [rest.astype(jnp.bfloat16)]
    while jnp.dtype(dtype) == jnp.float32 and len(parts) < 3:  # each holds 8 of the 24 bits
        rest = rest - parts[-1].astype(np.float32)
        parts.append(rest.astype(jnp.bfloat16))
    return parts


def lookup_ptx(values: np.ndarray, *, by_nibble: bool = False) -> str:
    """Return PTX that looks up four packed bytes $4 and sets the words $0-$3.

    A word has the values of one byte, the high nibble's bfloat16 above the low one's. With `by_nibble`, $0 and $1 have those
    of the four high nibbles, and $2 and $3 those of the four low ones, in the order of the bytes.
    """
    bits = values.view(np.uint16)

    def table(plane: int, first: int) -> str:
        """Return a register with the low bytes (plane 0) or the high bytes (plane 1) of four values."""
        return f"0x{int.from_bytes(bytes((bits[first : first + 4] >> (8 * plane) & 255).tolist()), 'little'):08x}"

    lines = [
        "and.b32 s0, $4, 0x77777777",  # selectors among eight values; PRMT reads the lower four selectors
        "and.b32 t0, $4, 0x88888888",
        "shr.u32 t0, t0, 1",
        "add.u32 t0, t0, 0x32103210",  # byte i of the first selection, or of the second one
        "shr.u32 s1, s0, 16",
        "shr.u32 t1, t0, 16",
    ]
    for half in range(2):
        for plane in range(2):
            lines += [
                f"prmt.b32 a, {table(plane, 0)}, {table(plane, 4)}, s{half}",
                f"prmt.b32 b, {table(plane, 8)}, {table(plane, 12)}, s{half}",
                f"prmt.b32 p{plane}, a, b, t{half}",
            ]
        # p0 and p1 have the bytes of four nibbles: low and high of one packed byte, low and high of the next one.
        words = {half: 0x7351, 2 + half: 0x6240} if by_nibble else {2 * half: 0x5140, 2 * half + 1: 0x7362}
        lines += [f"prmt.b32 ${word}, p0, p1, {selector:#06x}" for word, selector in words.items()]
    return "{\n.reg .b32 a, b, p0, p1, s0, s1, t0, t1;\n" + "".join(line + ";\n" for line in lines) + "}"
