"""Compare layouts of 4-bit codes: compile `x @ dequantize(w)` for each layout. No TPU or GPU is needed.

    python scripts/benchmarks/layouts.py --device v5e v5p v6e h100
    python scripts/benchmarks/layouts.py --device v5e --shape 8192 28672 --rows 8

A layout says which codes share a byte. It is a pair of functions, from codes `[in, out]` to the stored array and back. The
lookup of codes and the scales are those of the package, so that nothing else differs. The values v are multiplied with x in
two forms:

    matrix    x [rows, in] @ v [in, out]                                as in the package
    blocks    x [rows, blocks, 64] by v [blocks, 64, out], summed over both axes; values stay beside their scale

For each compiled program, the table has these columns, read from its text (qlora_jax/plan/hlo.py):

    moved         MB that it reads and writes in the memory of the device, without the on-chip memory of a TPU
    kcycles       the TPU compiler's own estimate for the instructions of the entry, in thousands; not a measurement
    temporaries   MB, by the compiler's own memory analysis, including on-chip memory
    steps         instructions of the entry that do work; on a GPU these are kernels, as far as XLA's text shows
    arithmetic    elements per weight made by arithmetic, selects, casts and gathers outside the product
    shuffles      elements per weight made by concatenate, transpose, copy, pad and slice

"equal" says that, on the CPU, the layout returns the codes and the matrix of the package bit for bit, and therefore the
product; in the form "blocks" the product is summed in another order and equal up to the rounding of bfloat16. The last line
is JSON.
"""

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax import cli
from qlora_jax.errors import OptionError
from qlora_jax.plan import DEVICES, Machine, machine_mesh, machine_named
from qlora_jax.plan.compile import COMPILER_OPTIONS, place, versions
from qlora_jax.plan.hlo import Program, parse_program
from qlora_jax.plan.topology import context
from qlora_jax.platforms import use_compilers_only
from qlora_jax.quant import QuantizedTensor, dequantize, matmul, quantize
from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.tensor import _lookup, _times_scales, block_scales, unpack

Form = Literal["matrix", "blocks"]
BLOCK, SHARDS = 64, 4
UNIT = 8 * BLOCK  # a number of rows that every layout accepts: eighths and shards are whole blocks
KERNEL = "the kernel, on row halves"
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "copy-done", "slice-done", "async-done"}
_SHUFFLES = {"concatenate", "transpose", "copy", "pad", "slice", "dynamic-slice", "dynamic-update-slice", "reverse"}
_PRODUCTS = {"dot", "convolution", "custom-call", "fusion", "call", "conditional", "while"}
_NO_WORK = {*_FREE, "reshape", "broadcast", "iota", "copy-start", "slice-start", "async-start", "after-all"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Costs of layouts of 4-bit codes on a TPU or a GPU."""

    device: tuple[str, ...] = ("v5e", "v5p", "v6e", "h100")
    """Devices to compile for (see qlora_jax/plan/devices.py), each of them one device."""
    shape: tuple[int, int] = (4096, 14336)
    """[in, out] of the matrix; `in` must be a multiple of 512."""
    rows: tuple[int, ...] = (8, 2048)
    """Numbers of rows of x."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pair of functions: `pack` stores uint8 codes `[in, out]`, and `unpack` returns them.

    Attributes:
        of_blocks: whether no byte has two rows of a block, so that `unpack` also works on stored `[..., 64, out]`.
    """

    name: str
    pack: Callable[[Array], Array]
    unpack: Callable[[Array], Array]
    of_blocks: bool = True

    def unpack_blocks(self, stored: Array) -> Array:
        """Return the codes `[in/64, 64, out]`."""
        if self.of_blocks:
            return self.unpack(stored.reshape(-1, BLOCK, stored.shape[1]))
        codes = self.unpack(stored)
        return codes.reshape(-1, BLOCK, codes.shape[1])


@dataclasses.dataclass(frozen=True)
class Cost:
    """One compiled product; its metrics are None if the compiler refuses it, for `unsupported_reason`."""

    device: str
    rows: int
    layout: str
    form: str
    equal: bool | None
    moved: int | None = None
    temporaries: int | None = None
    cycles: int | None = None
    steps: int | None = None
    arithmetic: float | None = None
    shuffles: float | None = None
    compile_seconds: float = 0.0
    unsupported_reason: str | None = None


def _halves(name: str, runs: Callable[[int], int], of_columns: bool = False, of_blocks: bool = True) -> Layout:
    """Return a layout that divides n rows or columns into `runs(n)` runs; the halves of each run share bytes.

    The first half of a run is in the high nibbles, the second half in the low ones.
    """

    def in_runs(array: Array, nibbles: int) -> tuple[Array, int]:
        axis = array.ndim - 1 if of_columns else 0
        shape = array.shape
        return array.reshape(*shape[:axis], runs(nibbles * shape[axis]), -1, *shape[axis + 1 :]), axis

    def joined(array: Array, axis: int) -> Array:
        return array.reshape(*array.shape[:axis], -1, *array.shape[axis + 2 :])

    def pack(codes: Array) -> Array:
        split, axis = in_runs(codes, 1)
        high, low = jnp.split(split, 2, axis=axis + 1)
        return joined((high << 4) | low, axis)

    def unpack(packed: Array) -> Array:
        split, axis = in_runs(packed, 2)
        return joined(jnp.concatenate([split >> 4, split & 15], axis=axis + 1), axis)

    return Layout(name, pack, unpack, of_blocks)


def _neighbours_pack(codes: Array) -> Array:
    return (codes[0::2] << 4) | codes[1::2]


def _neighbours_unpack(packed: Array) -> Array:
    return jnp.stack([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[1])


def _words_pack(codes: Array) -> Array:
    """Store row j + i·in/8 in nibble i of a 32-bit word, which is the width of the lanes of a TPU."""
    parts = codes.astype(jnp.uint32).reshape(8, -1, codes.shape[1])
    return jnp.sum(parts << (4 * jnp.arange(8, dtype=jnp.uint32))[:, None, None], axis=0, dtype=jnp.uint32)


def _words_unpack(words: Array) -> Array:
    return jnp.concatenate([((words >> (4 * i)) & 15).astype(jnp.uint8) for i in range(8)], axis=0)


LAYOUTS = (
    _halves("rows j, j+32 of a block of 64", lambda rows: rows // BLOCK, of_blocks=False),
    _halves("row halves j, j+in/2 (the package's)", lambda rows: 1),
    _halves("row halves of each of 4 shards", lambda rows: SHARDS),
    _halves("columns n, n+out/2", lambda columns: 1, of_columns=True),
    Layout("neighbours in rows", _neighbours_pack, _neighbours_unpack, of_blocks=False),
    Layout("row eighths in 32-bit words", _words_pack, _words_unpack),
    Layout("XLA's uint4", lambda codes: codes.astype(jnp.uint4), lambda stored: stored.astype(jnp.uint8)),
)


def dense(layout: Layout, stored: Array, w: QuantizedTensor, dtype: Any) -> Array:
    """Return the matrix whose codes are `stored`; only the scales and the data type of w are used."""
    return _times_scales(_lookup(layout.unpack(stored), w.data_type), block_scales(w)).astype(dtype)


def multiply(layout: Layout, form: Form, x: Array, stored: Array, w: QuantizedTensor) -> Array:
    """Return x `[rows, in]` times that matrix."""
    if form == "matrix":
        return einsum("nk,km->nm", x, dense(layout, stored, w, x.dtype))
    values = _lookup(layout.unpack_blocks(stored), w.data_type) * block_scales(w)[:, None, :]
    blocks = x.reshape(x.shape[0], -1, BLOCK)
    return jnp.einsum("nbk,bkm->nm", blocks, values.astype(x.dtype), preferred_element_type=x.dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Compile all layouts for all devices and print what each costs."""
    if arguments.shape[0] % UNIT or arguments.shape[1] % 2 or min(arguments.shape) < 1:
        raise OptionError(f"--shape: expected in a multiple of {UNIT} and an even out, found {arguments.shape}")
    if min(arguments.rows, default=0) < 1:
        raise OptionError(f"--rows: expected one or more numbers of at least 1, found {arguments.rows}")
    targets = [(machine, machine_mesh(machine)) for machine in map(_machine, arguments.device)]
    if not targets:
        raise OptionError(f"--device: expected one or more of {', '.join(DEVICES)}, found none")
    forms: tuple[Form, ...] = get_args(Form)
    candidates: list[tuple[Layout | None, Form, bool | None]] = [
        (layout, form, is_equal(layout, form)) for form in forms for layout in LAYOUTS
    ]
    candidates.append((None, "matrix", None))
    costs: list[Cost] = []
    columns = "device | rows | layout | form | MB moved | temporaries MB | kcycles | steps | arithmetic | shuffles"
    print(f"| {columns} | compiled in s | equal |\n|{' --- |' * 12}")
    for machine, mesh in targets:
        for rows in arguments.rows:
            for layout, form, equal in candidates:
                costs.append(cost(layout, form, equal, arguments.shape, rows, machine, mesh))
                print(line(costs[-1]), flush=True)
    result = {"run": dataclasses.asdict(arguments), "versions": [versions(machine) for machine, _ in targets]}
    print(json.dumps({**result, "costs": [dataclasses.asdict(c) for c in costs]}))


def _machine(name: str) -> Machine:
    machine = machine_named(name)
    if machine.count > 1:
        raise OptionError(f"--device: expected one of {', '.join(DEVICES)}, found {name!r}")
    return machine


def is_equal(layout: Layout, form: Form) -> bool:
    """Return whether codes, matrix and product are equal to those of the package, for a small matrix on the CPU."""
    w = quantize(jax.random.normal(jax.random.key(0), (512, 128)))
    codes, x = unpack(w), jax.random.normal(jax.random.key(1), (8, 512), jnp.bfloat16)
    stored = layout.pack(codes)
    ours = jax.jit(dequantize, static_argnums=1)(w, jnp.bfloat16)
    theirs = jax.jit(lambda stored, w: dense(layout, stored, w, jnp.bfloat16))(stored, w)
    in_blocks = layout.unpack_blocks(stored).reshape(codes.shape)
    pairs = (layout.unpack(stored), codes), (in_blocks, codes), (theirs, ours)
    if not all(np.array_equal(a, b) for a, b in pairs):
        return False
    y, z = multiply(layout, form, x, stored, w), einsum("nk,km->nm", x, ours)
    if form == "matrix":
        return np.array_equal(y, z)
    y, z = np.asarray(y, np.float32), np.asarray(z, np.float32)
    return bool(np.abs(y - z).max() <= np.abs(z).max() / 128)


def cost(
    layout: Layout | None, form: Form, equal: bool | None, shape: tuple[int, int], rows: int, machine: Machine, mesh: Mesh
) -> Cost:
    """Compile one product and return its cost; without a layout, compile the kernel."""
    platform = machine.device.platform
    w = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((rows, shape[0]), jnp.bfloat16)
    stored = w.codes if layout is None else jax.eval_shape(layout.pack, jax.ShapeDtypeStruct(shape, jnp.uint8))

    def run(x: Array, w: QuantizedTensor) -> Array:
        return matmul(x, w, implementation="pallas") if layout is None else multiply(layout, form, x, w.codes, w)

    names = (machine.name, rows, KERNEL, "") if layout is None else (machine.name, rows, layout.name, form)
    start = time.perf_counter()
    try:
        with context(mesh):
            traced = jax.jit(run).trace(*place((x, dataclasses.replace(w, codes=stored)), mesh, P()))
            lowered = traced.lower(lowering_platforms=(platform,))
        compiled: Any = lowered.compile(COMPILER_OPTIONS[platform])
    except Exception as error:  # compilers raise errors of many types; the table shows them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Cost(*names, equal, unsupported_reason=reason)
    seconds, text = time.perf_counter() - start, compiled.as_text()
    program = parse_program(text)
    arithmetic, shuffles = work(program)
    expected = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("ENTRY ") :])
    return Cost(
        *names,
        equal,
        moved=program.traffic(),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        cycles=None if layout is None or not expected else sum(map(int, expected)),
        steps=sum(x.opcode not in _FREE for x in program.computations[program.entry].values()),
        arithmetic=None if layout is None else arithmetic / math.prod(shape),
        shuffles=None if layout is None else shuffles / math.prod(shape),
        compile_seconds=seconds,
    )


def work(program: Program) -> tuple[int, int]:
    """Return the numbers of elements made by arithmetic and by shuffles, in all computations; bodies of loops count once."""
    arithmetic = shuffles = 0
    for computation in program.computations.values():
        for instruction in computation.values():
            elements = max((math.prod(shape) for shape in instruction.shapes), default=0)
            if instruction.opcode in _SHUFFLES:
                shuffles += elements
            elif instruction.opcode not in _NO_WORK | _PRODUCTS:
                arithmetic += elements
    return arithmetic, shuffles


def line(c: Cost) -> str:
    """Return the row of the table for one product."""
    equal = {True: "yes", False: "NO", None: "–"}[c.equal]
    head = f"| {c.device} | {c.rows} | {c.layout} | {c.form}"
    if c.moved is None or c.temporaries is None:
        return f"{head} | {c.unsupported_reason} | | | | | | | {equal} |"
    cycles = "–" if c.cycles is None else f"{c.cycles / 1000:.0f}"
    counts = " | ".join("–" if n is None else f"{n:.1f}" for n in (c.arithmetic, c.shuffles))
    return (
        f"{head} | {c.moved / 1e6:.1f} | {c.temporaries / 1e6:.1f} | {cycles} | {c.steps} | {counts} | "
        f"{c.compile_seconds:.1f} | {equal} |"
    )


if __name__ == "__main__":
    sys.exit(main())
