"""Compile the product with a 4-bit matrix, by XLA and by the kernel, and show its costs. No TPU or GPU is needed.

    python scripts/benchmarks/matmul_kernels.py --device v5e --model llama-3-8b --rows 1 8 64 2048
    python scripts/benchmarks/matmul_kernels.py --device h100 --model llama-3-8b --rows 1 8 64
    python scripts/benchmarks/matmul_kernels.py --device v6e --model llama-2-70b --rows 2048 --gradient
    python scripts/benchmarks/matmul_kernels.py --device l4 --model llama-3-8b --step

For each matrix of the model, one layer of a stack, the table has the bytes that the compiled program moves, FLOPs,
temporaries, the least time by the roofline model, and the time to compile. For XLA's programs, the bytes are those of its
own cost analysis on TPU, which also counts data that stays on the chip; on GPU there is no cost analysis without the device,
and the bytes are those of the operands and results of its instructions (qlora_jax/plan/hlo.py). For the kernel, they are the
bytes that the kernel copies, and the operands and results of every other instruction of the compiled program; so a copy of
the packed bytes before the kernel, or sums after it, are counted. Products of more than 64 rows and gradients are also
compiled as "auto" chooses: on TPU a kernel dequantises the matrix and XLA multiplies, and on Hopper GPUs the fused product
does both. XLA's kilocycles are the compiler's own
estimate for TPUs; it knows no kernels, whose time is at least that of their bytes.

With --step, the whole decode step of the model for one row is compiled instead; the weights that kernels read are counted in
it, and the instructions that make arrays of packed bytes, those in fusions included. The last line is JSON.
"""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from qlora_jax import cli
from qlora_jax.errors import OptionError, UnsupportedError
from qlora_jax.models import CausalLM, DecoderConfig, causal_family_of
from qlora_jax.peft import LoRA
from qlora_jax.plan import DEVICES, SIZES, Machine, machine_mesh, machine_named
from qlora_jax.plan.compile import COMPILER_OPTIONS, place, versions
from qlora_jax.plan.devices import Platform
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.topology import context
from qlora_jax.plan.tree_bytes import weight_bytes
from qlora_jax.platforms import use_compilers_only
from qlora_jax.quant import (
    Implementation,
    Quantization,
    QuantizedTensor,
    StackedTensor,
    matmul,
    quantize,
    with_implementation,
)
from qlora_jax.quant.codebooks import SCALE_BLOCK_SIZE
from qlora_jax.quant.kernels import gpu, tpu, tpu_dequantize
from qlora_jax.quant.kernels.tpu_scales import spans_of
from qlora_jax.quant.matmul import FEW_ROWS
from qlora_jax.quant.targets import is_for_hopper

_KERNELS = {"tpu": tpu, "cuda": gpu}
LAYERS = 32  # layers in the stack: too many for XLA to move all of them on chip before the kernel
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "custom-call", "copy-start", "copy-done"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Costs of the product with a 4-bit matrix on a TPU or a GPU."""

    device: str = "v5e"
    """Device to compile for (see qlora_jax/plan/devices.py); one, not several."""
    model: str = "llama-3-8b"
    """Model by the name of its size (see qlora_jax/plan/sizes.py)."""
    rows: tuple[int, ...] = (1, 8, 64, 2048)
    """Numbers of rows of x."""
    gradient: bool = False
    """Compile the gradient of the input instead of the product."""
    step: bool = False
    """Compile the decode step of the model with a cache of 512 tokens, instead of single matrices."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """One compiled product.

    Attributes:
        packed: bytes of the matrix as stored, including scales.
        bytes: bytes that the program moves; None if the compiler refuses it.
        cycles: cycles that a TPU's compiler expects of everything but kernels; None on GPUs.
        floor_us: microseconds for the bytes or for the FLOPs, whichever is longer.
        unsupported_reason: why the product could not be compiled; None if it could.
    """

    matrix: str
    rows: int
    implementation: Implementation
    packed: int
    bytes: int | None
    flops: int
    temporaries: int | None
    floor_us: float | None
    compile_seconds: float
    unsupported_reason: str | None = None
    cycles: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Compile and print what the options ask for."""
    if arguments.model not in SIZES:
        raise OptionError(f"--model: expected one of {', '.join(SIZES)}, found {arguments.model!r}")
    if not arguments.rows or min(arguments.rows) < 1:
        raise OptionError(f"--rows: expected numbers from 1 on, found {' '.join(map(str, arguments.rows))}")
    machine = machine_named(arguments.device)
    if machine.count > 1:
        raise OptionError(f"--device: expected one of {', '.join(DEVICES)}, found {arguments.device!r}")
    mesh = machine_mesh(machine)
    if arguments.step:
        print(json.dumps({"run": dataclasses.asdict(arguments), "steps": steps(arguments.model, machine, mesh)}))
        return
    with context(mesh):
        hopper = machine.device.platform == "cuda" and is_for_hopper()
    costs = [
        cost(name, shape, rows, implementation, arguments.gradient, machine, mesh)
        for name, shape in matrices(arguments.model).items()
        for rows in arguments.rows
        for implementation in implementations(machine.device.platform, rows, arguments.gradient, hopper=hopper)
    ]
    print(table(costs))
    result = {"run": dataclasses.asdict(arguments), "versions": versions(machine)}
    print(json.dumps({**result, "costs": [dataclasses.asdict(c) for c in costs]}))


def implementations(platform: Platform, rows: int, gradient: bool, *, hopper: bool = False) -> tuple[Implementation, ...]:
    """Return the implementations to compare; "auto" only where it is neither of the others."""
    third = hopper or platform == "tpu"  # a kernel for many rows, besides that for few
    return ("xla", "auto", "pallas") if third and (gradient or rows > FEW_ROWS) else ("xla", "pallas")


def matrices(model: str) -> dict[str, tuple[int, int]]:
    """Return [in, out] of the linear layers; those of equal shape are one entry."""
    fields = SIZES[model]
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    pairs = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    shapes = {"q, o": (hidden, hidden), "k, v": (hidden, pairs), "gate, up": (hidden, inner), "down": (inner, hidden)}
    if pairs == hidden:
        shapes = {"q, k, v, o": (hidden, hidden), **{name: shapes[name] for name in ("gate, up", "down")}}
    return shapes


def cost(
    name: str,
    shape: tuple[int, int],
    rows: int,
    implementation: Implementation,
    gradient: bool,
    machine: Machine,
    mesh: Mesh,
) -> Cost:
    """Compile one product with a matrix of a stack and return its cost."""
    device, (inputs, outputs) = machine.device, shape
    stack = jax.eval_shape(quantize, jax.ShapeDtypeStruct((LAYERS, inputs, outputs), jnp.float32))
    x = jax.ShapeDtypeStruct((rows, outputs if gradient else inputs), jnp.bfloat16)
    matrix = jax.eval_shape(StackedTensor, stack, jax.ShapeDtypeStruct((), jnp.int32))

    def product(x: jax.Array, w: StackedTensor) -> jax.Array:
        if not gradient:
            return matmul(x, w, implementation=implementation)
        like = jnp.zeros((rows, inputs), x.dtype)
        return jax.vjp(lambda x: matmul(x, w, implementation=implementation), like)[1](x)[0]

    packed, flops = stack.nbytes // LAYERS, 2 * rows * inputs * outputs
    label = f"{name} {inputs}×{outputs}"
    start = time.perf_counter()
    try:
        reason = _KERNELS[device.platform].unsupported_reason(stack, x.dtype) if implementation == "pallas" else None
        if reason is None and implementation == "pallas" and gradient and device.platform == "cuda":
            reason = "no kernel: XLA's product on GPUs"
        if reason is not None:
            raise UnsupportedError(reason)
        compiled = _compile(jax.jit(product), (x, matrix), machine, mesh)
    except Exception as error:  # compilers raise errors of many types; the table shows them
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        seconds = time.perf_counter() - start
        return Cost(label, rows, implementation, packed, None, flops, None, None, seconds, reason)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if implementation == "pallas":
        moved = kernel_bytes(stack, rows, gradient, device.platform) + other_bytes(text)
    elif implementation == "auto" and device.platform == "tpu":
        moved = tpu_dequantize.moved_bytes(stack, x.dtype) + other_bytes(text)
    elif device.platform == "tpu":
        moved = int(compiled.cost_analysis()["bytes accessed"])
    else:
        moved = parse_program(text).traffic()
    floor = max(moved / device.bandwidth, flops / device.flops) * 1e6
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    expected = re.findall(r'"estimated_cycles":"(\d+)"', text[text.index("ENTRY ") :])
    cycles = sum(map(int, expected)) if device.platform == "tpu" else None
    return Cost(label, rows, implementation, packed, moved, flops, temporaries, floor, seconds, cycles=cycles)


def _compile(function: Any, arguments: tuple[Any, ...], machine: Machine, mesh: Mesh) -> Any:
    platform = machine.device.platform
    with context(mesh):
        lowered = function.trace(*place(arguments, mesh, P())).lower(lowering_platforms=(platform,))
    return lowered.compile(COMPILER_OPTIONS[platform])


def kernel_bytes(stack: QuantizedTensor, rows: int, gradient: bool, platform: Platform) -> int:
    """Return the bytes that the kernel copies from and to memory, for bfloat16 x.

    What several programs read at the same time is counted once.
    """
    _, inputs, outputs = stack.shape
    scales, codes = inputs // stack.block_size * outputs, inputs // 2 * outputs
    if platform == "cuda":
        grid = gpu.grid_of(rows, stack, jnp.bfloat16)
        matrix = codes + scales + 4 * -(-scales // SCALE_BLOCK_SIZE)
        parts = 4 * grid.parts if grid.parts > 1 else 2
        return -(-rows // grid.rows) * matrix + rows * (2 * inputs + parts * outputs)
    spread = 4 * spans_of(inputs // stack.block_size) * outputs
    if gradient:
        tiles = tpu.gradient_tiles(rows, stack, jnp.bfloat16)
        one_block = rows <= tiles.rows  # then dy stays on the chip; else it is read again for every tile of W
        reads = 1 if one_block else inputs // tiles.tile
        return 2 * codes + scales + spread + 2 * rows * (outputs * reads + inputs)
    tiles = tpu.forward_tiles(rows, stack, jnp.bfloat16)
    reads = 1 if rows <= tiles.rows else -(-outputs // tiles.tile)
    return codes + scales + spread + 2 * rows * (inputs * reads + outputs)


def other_bytes(hlo: str) -> int:
    """Return the bytes of operands and results of the entry computation, without the kernel and free instructions."""
    total = 0
    entry = hlo[hlo.index("ENTRY ") :]
    sizes: dict[str, int] = {}
    instruction = r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*?)\)"
    for name, types, opcode, operands in re.findall(instruction, entry, re.MULTILINE):
        sizes[name] = sum(
            WIDTHS.get(kind, 4) * int(np.prod([int(size) for size in dims.split(",") if size], dtype=np.int64))
            for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", types)
        )
        if opcode not in FREE:
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
    return total


def steps(model: str, machine: Machine, mesh: Mesh) -> list[dict[str, Any]]:
    """Compile the decode step of a model with the default implementation and with XLA alone; print and return the costs."""
    config = causal_family_of(SIZES[model]).config(SIZES[model])
    assert isinstance(config, DecoderConfig)

    def build() -> CausalLM:
        return CausalLM(config, quantization=Quantization(), method=LoRA(rank=16), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    abstract = nnx.eval_shape(build)
    graph, state = nnx.split(abstract)
    cache, token = jax.eval_shape(lambda: abstract.init_cache(1, 512)), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def decode(state: Any, token: jax.Array, position: jax.Array, cache: Any) -> Any:
        return nnx.merge(graph, state).decode(token, position, cache)

    found = []
    for implementation in ("auto", "xla"):
        operands = (with_implementation(state, implementation), token, token, cache)
        start = time.perf_counter()
        compiled = _compile(jax.jit(decode, donate_argnums=3), operands, machine, mesh)
        seconds, text = time.perf_counter() - start, compiled.as_text()
        program = parse_program(text)
        called = [x for computation in program.computations.values() for x in computation.values() if x.of_stacks]
        found.append(
            {
                "implementation": implementation,
                "kernels": len(called),
                "kernels_read": program.stack_reads(),
                "packed": weight_bytes(state)[0],
                "packed_copies": packed_copies(text),
                "temporaries": compiled.memory_analysis().temp_size_in_bytes,
                "compile_seconds": seconds,
            }
        )
        print(found[-1])
    return found


def packed_copies(hlo: str) -> int:
    """Return how many instructions of a program make an array of at least one MiB of uint8."""
    made = re.findall(r"^\s*(?:ROOT )?%?[\w.-]+ = \(*u8\[([\d,]+)\]\S* ([\w-]+)\(", hlo, re.MULTILINE)
    sizes = [int(np.prod([int(size) for size in dims.split(",")])) for dims, opcode in made if opcode not in FREE]
    return sum(size >= 2**20 for size in sizes)


def table(costs: list[Cost]) -> str:
    """Return a Markdown table with one row per product."""
    head = (
        "matrix",
        "rows",
        "by",
        "MB moved",
        "of packed",
        "temporaries MB",
        "floor µs",
        "XLA's kilocycles",
        "compiled in s",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for c in costs:
        if c.bytes is None or c.temporaries is None or c.floor_us is None:
            lines.append(f"| {c.matrix} | {c.rows} | {c.implementation} | {c.unsupported_reason} | | | | | |")
            continue
        lines.append(
            f"| {c.matrix} | {c.rows} | {c.implementation} | {c.bytes / 1e6:.2f} | {c.bytes / c.packed:.2f} | "
            f"{c.temporaries / 1e6:.2f} | {c.floor_us:.1f} | {'–' if c.cycles is None else f'{c.cycles / 1e3:.0f}'} | "
            f"{c.compile_seconds:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
