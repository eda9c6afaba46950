"""One step of qlora_jax, compiled for a device that need not be there: the counterpart of qwix_compile.py.

Prints a JSON line with bytes of memory, operations of matrix products and bytes of memory traffic, on each device.
"""

import argparse
import dataclasses
import json
from typing import Any


def main() -> None:
    arguments = parser_of(__doc__).parse_args()

    from qlora_jax.peft import LoRA
    from qlora_jax.plan import DoesNotFit, Recipe, compile_decode_step, compile_train_step, machine_named
    from qlora_jax.plan.compile import versions
    from qlora_jax.platforms import use_compilers_only
    from scripts.benchmarks.model_sizes import config_of

    use_compilers_only()

    machine = machine_named(arguments.device)
    recipe = Recipe(
        config=config_of(arguments.model),
        method=LoRA(arguments.rank),
        batch_size=arguments.batch_size,
        length=arguments.length,
        packed=False,
        remat=arguments.remat,
    )
    try:
        if arguments.step == "decode":
            plan = compile_decode_step(recipe, machine, capacity=arguments.length)
        else:
            plan = compile_train_step(recipe, machine)
    except DoesNotFit as error:
        print(json.dumps({"peak": None, "needed": error.needed, "why": str(error), "versions": versions(machine)}))
        return
    print(json.dumps(metrics_of(plan.program, plan.packed_weights + plan.dense_weights, plan.versions)))


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The flags of both sides."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="size by name, as scripts/plan.py knows it")
    parser.add_argument("--device", required=True, help="as scripts/plan.py takes it")
    parser.add_argument("--step", choices=("train", "decode"), required=True)
    parser.add_argument("--remat", default="full")
    for name in ("batch-size", "length", "rank"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser


def metrics_of(program: Any, weights: int, versions: dict[str, str]) -> dict[str, Any]:
    """The values of the JSON line."""
    values = {field.name: getattr(program, field.name) for field in dataclasses.fields(program) if field.name != "text"}
    return {**values, "peak": program.peak, "weights": weights, "versions": versions}


if __name__ == "__main__":
    main()
