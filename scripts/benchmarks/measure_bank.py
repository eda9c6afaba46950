"""Compile the product with a bank of adapters for devices that need not be attached: its bytes by number of slots.

    python scripts/benchmarks/measure_bank.py                                   H100, v5e and this CPU
    python scripts/benchmarks/measure_bank.py --devices v5p --slots 16 64 256   others

Four layers of LoRA of rank 16 on 4096 x 4096 in bfloat16 (float32 on a CPU), read in a scan as decoding reads them: 16 rows
of one token, and 8 rows of 512. `ragged` is `jax.lax.ragged_dot` over the rows in the order of their slots, for comparison.
The bytes are the least that one run reads and writes, counted in the compiled program. The last line is JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P

from qlora_jax import cli
from qlora_jax.peft.bank import bank_update
from qlora_jax.plan import machine_named
from qlora_jax.plan.compile import compile_program, place
from qlora_jax.plan.hlo import parse_program
from qlora_jax.plan.topology import context, machine_mesh
from qlora_jax.platforms import use_compilers_only
from qlora_jax.quant import IndexedSlots, SlotMatrices

LAYERS, FEATURES, RANK = 4, 4096, 16
SHAPES = ((16, 1), (8, 512))  # rows, tokens


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile the product with a bank."""

    devices: tuple[str, ...] = ("h100", "v5e", "cpu")
    """Devices, in the notation of scripts/plan.py, or cpu."""
    slots: tuple[int, ...] = (16, 256)
    """Numbers of slots."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print the bytes of each product on each device, by the number of slots."""
    use_compilers_only()
    found = []
    for device in arguments.devices:
        for rows, tokens in SHAPES:
            for name, product in {"bank": bank_product, "ragged": ragged_product}.items():
                traffic = [compiled_bytes(device, product, rows, tokens, slots) for slots in arguments.slots]
                found.append({"device": device, "rows": rows, "tokens": tokens, "product": name, "bytes": traffic})
                sizes = "  ".join(f"K={k} {b / 1e6:,.1f} MB" for k, b in zip(arguments.slots, traffic, strict=True))
                print(f"{device:6} {rows} x {tokens:<4} {name:7} {sizes}", flush=True)
    print(json.dumps({"slots": arguments.slots, "rows": found}))


def bank_product(x: Array, a: SlotMatrices, b: SlotMatrices, scale: Array, ids: Array, layer: Array) -> Array:
    """Return what one layer's bank adds, as the models compute it while decoding."""
    return bank_update(x, IndexedSlots(a, layer), IndexedSlots(b, layer), scale[layer], ids)


def ragged_product(x: Array, a: SlotMatrices, b: SlotMatrices, scale: Array, ids: Array, layer: Array) -> Array:
    """Return the same by a grouped product over rows that are in the order of their slots."""
    rows, tokens, features = x.shape
    sizes = tokens * jnp.bincount(ids, length=a.values.shape[1]).astype(jnp.int32)
    flat, own = x.reshape(-1, features), jnp.repeat(scale[layer][ids], tokens)
    inner = jax.lax.ragged_dot(flat, a.values[layer].swapaxes(1, 2), sizes, preferred_element_type=x.dtype)
    inner = inner * own[:, None].astype(x.dtype)
    return jax.lax.ragged_dot(inner, b.values[layer], sizes, preferred_element_type=x.dtype).reshape(rows, tokens, -1)


def compiled_bytes(device: str, product: Callable[..., Array], rows: int, tokens: int, slots: int) -> int:
    """Return the bytes that a scan over the layers reads and writes on a device."""

    @jax.jit
    def run(x: Array, a: SlotMatrices, b: SlotMatrices, scale: Array, ids: Array) -> Array:
        def layer(x: Array, index: Array) -> tuple[Array, None]:
            return x + product(x, a, b, scale, ids, index), None

        return jax.lax.scan(layer, x, jnp.arange(LAYERS))[0]

    dtype = jnp.float32 if device == "cpu" else jnp.bfloat16  # as the models compute there
    matrices = jax.ShapeDtypeStruct((LAYERS, slots, RANK, FEATURES), dtype)
    arguments: Any = (
        jax.ShapeDtypeStruct((rows, tokens, FEATURES), dtype),
        SlotMatrices(matrices),  # pyright: ignore[reportArgumentType]
        SlotMatrices(matrices),  # pyright: ignore[reportArgumentType]
        jax.ShapeDtypeStruct((LAYERS, slots), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    if device == "cpu":
        return parse_program(run.lower(*arguments).compile().as_text() or "").traffic()
    machine = machine_named(device)
    mesh = machine_mesh(machine)
    with context(mesh):
        return compile_program(run, place(arguments, mesh, P()), machine).traffic


if __name__ == "__main__":
    sys.exit(main())
