"""Worker: compile a step of qlora_jax for a device that need not be attached; qwix_compile.py does the same for Qwix.

It prints a JSON line with bytes of memory, operations of matrix products and bytes of memory traffic, on each device.
"""

import argparse
import dataclasses
import json
from typing import Any


def main() -> None:
    arguments = parser_of(__doc__).parse_args()

    from qlora_jax.errors import DoesNotFitError
    from qlora_jax.models import ModelSpec
    from qlora_jax.peft import LoRA
    from qlora_jax.plan import compile_decode_step, compile_train_step, machine_named
    from qlora_jax.plan.compile import versions
    from qlora_jax.platforms import use_compilers_only
    from qlora_jax.train import BatchSpec, StepSpec, language_model_objective
    from scripts.benchmarks.model_sizes import config_of

    use_compilers_only()

    machine = machine_named(arguments.device)
    spec = StepSpec(
        ModelSpec(config_of(arguments.model), method=LoRA(arguments.rank), remat=arguments.remat),
        language_model_objective(packed=False),
        BatchSpec(batch_size=arguments.batch_size, length=arguments.length),
    )
    try:
        if arguments.step == "decode":
            plan = compile_decode_step(spec, machine, capacity=arguments.length)
        else:
            plan = compile_train_step(spec, machine)
    except DoesNotFitError as error:
        print(json.dumps({"peak": None, "needed": error.needed, "why": str(error), "versions": versions(machine)}))
        return
    print(json.dumps(metrics_of(plan.program, plan.packed_weights + plan.dense_weights, plan.versions)))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the flags, which qwix_compile.py uses too."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="model by the name of its size, as in scripts/plan.py")
    parser.add_argument("--device", required=True, help="device, in the notation of scripts/plan.py")
    parser.add_argument("--step", choices=("train", "decode"), required=True)
    parser.add_argument("--remat", default="full")
    for name in ("batch-size", "length", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser


def metrics_of(program: Any, weights: int, versions: dict[str, str]) -> dict[str, Any]:
    """Return the values of the JSON line."""
    values = {field.name: getattr(program, field.name) for field in dataclasses.fields(program) if field.name != "text"}
    return {**values, "peak": program.peak, "weights": weights, "versions": versions}


if __name__ == "__main__":
    main()
