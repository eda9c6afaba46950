"""Compile the state of many tenants and their step for devices that need not be attached.

    python scripts/benchmarks/measure_tenant_memory.py                     bytes of the state by the number of tenants
    python scripts/benchmarks/measure_tenant_memory.py --step llama-3-8b   a step of 8 tenants against one of a single tenant

State: tenants of rank 4 on SmolLM2-135M. `device` is what the compiled update takes on the device, with every tenant in a
slot and, with `turns`, with 8 slots in which they take turns; `host` is what the states of all tenants then take in pinned
host memory; the program that puts one into a slot is compiled too. Step: the bytes of device memory that a step reads and
writes at least, and its operations, of 8 tenants with one row against one tenant with 8 rows. The last line is JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from qlora_jax import cli
from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec, family_of
from qlora_jax.peft import LoRA
from qlora_jax.plan import SIZES, Machine, compile_tenants_step, compile_train_step, machine_named
from qlora_jax.plan.tenants import compile_turn
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import BatchSpec, StepSpec, language_model_objective

RANK, SLOTS, ROWS = 4, 8, 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compile the state and the step of tenants."""

    devices: tuple[str, ...] = ("h100", "v5e")
    """Devices, in the notation of scripts/plan.py."""
    tenants: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of tenants."""
    step: str | None = None
    """Size of a model whose step is compiled, instead of the state of tenants."""
    length: int = 512
    """Tokens of a row of the step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print a line for each compiled state or step."""
    use_compilers_only()
    machines = [machine_named(name) for name in arguments.devices]
    found: list[dict[str, Any]] = []
    for machine in machines:
        if arguments.step is None:
            found += states(machine, arguments.tenants)
        else:
            found.append(step(machine, arguments.step, arguments.length))
    print(json.dumps(found))


def spec_of(size: str, rank: int, length: int) -> StepSpec[ModelSpec]:
    """Return the step of one tenant with all rows."""
    config = family_of(SIZES[size]).config(SIZES[size])
    return StepSpec(ModelSpec(config, method=LoRA(rank)), language_model_objective(), BatchSpec(ROWS, length=length))


def states(machine: Machine, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Print and return the bytes of the state by the number of tenants."""
    spec, found = spec_of("smollm2-135m", RANK, 256), []
    for tenants in numbers:
        row: dict[str, Any] = {"device_name": machine.name, "tenants": tenants, "device": None}
        try:
            update, _, _ = compile_turn(spec, machine, slots=tenants, rank=RANK)
            row |= {"device": update.peak, "arguments": update.arguments}
        except DoesNotFitError as error:
            row["device"] = f"does not fit ({error.needed or 0:,})"
        update, _, of_tenant = compile_turn(spec, machine, slots=min(tenants, SLOTS), rank=RANK)
        row |= {"device_turns": update.peak, "host_turns": tenants * of_tenant}
        found.append(row)
        words = f"{row['device'] / 1e6:,.1f} MB" if isinstance(row["device"], int) else row["device"]
        print(
            f"{machine.name} {tenants} tenants: device {words}; turns: device {row['device_turns'] / 1e6:,.1f} MB, host "
            f"{row['host_turns'] / 1e6:,.1f} MB",
            flush=True,
        )
    return found


def step(machine: Machine, size: str, length: int) -> dict[str, Any]:
    """Print and return the traffic and the operations of a step."""
    spec = spec_of(size, 16, length)
    many = compile_tenants_step(spec, machine, tenants=ROWS, rank=16)
    one = compile_train_step(spec, machine).program
    ratios = {"traffic": many.traffic / one.traffic, "flops": many.flops / one.flops}
    print(
        f"{machine.name} {size}: {ROWS} tenants of 1 x {length} {many.traffic / 1e9:.1f} GB, {many.flops / 1e12:.2f} TFLOP; "
        f"one of {ROWS} x {length} {one.traffic / 1e9:.1f} GB, {one.flops / 1e12:.2f} TFLOP; ratios "
        f"{ratios['traffic']:.3f}, {ratios['flops']:.3f}",
        flush=True,
    )
    return {"device_name": machine.name, "size": size, "length": length, **ratios}


if __name__ == "__main__":
    sys.exit(main())
