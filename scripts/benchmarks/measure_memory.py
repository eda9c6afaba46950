"""Compile the training steps of well-known runs and write a table of their memory, as in docs/memory.md.

    python scripts/benchmarks/measure_memory.py --output docs/memory.md
    python scripts/benchmarks/measure_memory.py --devices v5p --models llama-3-8b

Each run is compiled four times, with more and more in host memory:

    device     nothing: weights, adapter, optimizer and the inputs of the layers are on the device
    optimizer  the moments of Adam (--host-offload)
    most       moments, adapter, its gradient and the inputs of the layers (--host-adapter --remat offload)
    most, NF4  the same, with token embedding and output head in NF4 (--embedding-storage nf4)

Layers are recomputed in the backward pass in all of them. The numbers are those of XLA's buffer assignment; GEMMs are not
autotuned. The last line is JSON.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.errors import DoesNotFitError
from qlora_jax.models import ModelSpec
from qlora_jax.peft import LoRA
from qlora_jax.plan import Plan, check_compiler, compile_train_step, machine_named
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import BatchSpec, OptimizerSpec, StepSpec, language_model_objective
from scripts.benchmarks.model_sizes import check_names, config_of

GIB = 2**30
# (model, rank, rows, tokens in a row): the runs of the QLoRA paper, and longer ones.
RUNS = (
    ("llama-7b", 64, 1, 512),
    ("llama-13b", 64, 1, 512),
    ("llama-33b", 64, 1, 512),
    ("llama-65b", 64, 1, 512),
    ("llama-2-7b", 64, 4, 2048),
    ("llama-3-8b", 16, 4, 2048),
    ("llama-3-70b", 16, 1, 2048),
)
# What is in host memory: the values that differ of the model and of the optimizer.
_MOST = {"host_optimizer": True, "host_adapter": True}
OFFLOADED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "device": ({}, {}),
    "optimizer": ({}, {"host_optimizer": True}),
    "most": ({"remat": "offload"}, _MOST),
    "most, NF4": ({"remat": "offload", "embedding_storage": "nf4"}, _MOST),
}
# Columns of the table, and the metric that each column shows.
SHOWN = (
    ("peak", "peak"),
    ("frozen weights", "weights"),
    ("adapter", "adapter"),
    ("temporaries", "temporaries"),
    ("host memory", "host"),
)

HEAD = """\
# Memory of well-known runs

The peak memory of one training step on each device, in GiB, as XLA compiles it: NF4 with double quantisation, LoRA on
all linear layers, bfloat16 activations, float32 adapter and AdamW, layers recomputed in the backward pass. Made by
`python scripts/benchmarks/measure_memory.py --output docs/memory.md`. The column "stored in host memory" says what is
stored there instead of on the device:

- `device`: nothing;
- `optimizer`: the optimizer state (`--host-offload`);
- `most`: the optimizer state, the adapter and its gradient, and the inputs of the layers (`--host-offload --host-adapter
  --remat offload`);
- `most, NF4`: the same as `most`, with the embedding and the output head in NF4 (`--embedding-storage nf4`)."""
FLOOR = """\
In the rows `most`, everything that the options can store in host memory is stored there. What remains on the device is

- the frozen weights, which each step reads completely: 4.127 bits per value, and the embedding and the output head in
  bfloat16 or, in the rows `most, NF4`, in 4 bits too. Only fewer bits per value or more devices reduce them;
- the memory of one layer while it is recomputed and differentiated (the activations of a micro-batch and one dense
  matrix at a time), or the memory of a chunk of logits with the output head, whichever is larger. Fewer tokens per
  micro-batch reduce it."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the table."""

    devices: tuple[str, ...] = ("h100", "v5e:2x2")
    """Devices, in the notation of scripts/plan.py; the rows of a run are distributed over several devices."""
    models: tuple[str, ...] | None = None
    """Models of the tables; if left out, all of them for one device and Llama-3-8B for several."""
    output: Path | None = None
    """Markdown file to write; if left out, the page is only printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Compile all runs, then print and write the page."""
    if arguments.models is not None:
        check_names("models", arguments.models, (model for model, *_ in RUNS))
    machines = [machine_named(name) for name in arguments.devices]
    for machine in machines:
        check_compiler(machine)
    chosen = [
        (machine, one, name)
        for machine in machines
        for one in RUNS
        for name in OFFLOADED
        if one[0] in ((one[0] if machine.count == 1 else "llama-3-8b",) if arguments.models is None else arguments.models)
    ]
    rows = []
    for machine, (model, rank, batch, length), name in tqdm(chosen, unit="program", desc="compiling"):
        of_model, of_optimizer = OFFLOADED[name]
        spec = StepSpec(
            ModelSpec(config_of(model), method=LoRA(rank), **of_model),
            language_model_objective(packed=False),
            BatchSpec(batch_size=max(batch // machine.count, 1), length=length),
            OptimizerSpec(**of_optimizer),
        )
        row = {"device": machine.name, "model": model, "rank": rank, "batch": batch, "length": length, "offloaded": name}
        try:
            rows.append(row | metrics_of(compile_train_step(spec, machine)))
        except DoesNotFitError as error:
            rows.append(row | {"peak": None, "why": str(error)})
    text = markdown(rows)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    method = "XLA buffer assignment of compiled train steps; GEMMs not autotuned"
    print(json.dumps({"method": method, "devices": arguments.devices, "rows": rows}))


def metrics_of(plan: Plan) -> dict[str, Any]:
    """Return the bytes and seconds of a plan by the names that the table uses."""
    return {
        "peak": plan.peak,
        "weights": plan.packed_weights + plan.dense_weights,
        "adapter": plan.adapter + plan.host_adapter,
        "temporaries": plan.program.temporaries,
        "host": plan.program.host_arguments + plan.program.host_temporaries,
        "compile_seconds": plan.program.compile_seconds,
        "versions": plan.versions,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the page docs/memory.md."""
    lines = [HEAD]
    for device in dict.fromkeys(row["device"] for row in rows):
        lines += table(device, [row for row in rows if row["device"] == device])
    return "\n".join([*lines, "", "## What remains on the device", "", *floor(rows), ""])


def table(device: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of one device."""
    versions = next((row["versions"] for row in rows if row["peak"] is not None), {})
    columns = ("model", "rank", "batch", "stored in host memory", *(name for name, _ in SHOWN), "compiled in s")
    lines = [
        "",
        f"## {device}",
        "",
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{' --- |' * len(columns)}",
    ]
    for row in rows:
        start = f"| {row['model']} | {row['rank']} | {row['batch']} × {row['length']} | {row['offloaded']} |"
        if row["peak"] is None:
            lines.append(f"{start} does not fit |{' |' * len(SHOWN)}")
            continue
        sizes = " | ".join(f"{row[name] / GIB:.2f}" for _, name in SHOWN)
        lines.append(f"{start} {sizes} | {row['compile_seconds']:.0f} |")
    return lines


def floor(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines about the memory that no option removes from the device."""
    lines = [FLOOR]
    least = [row for row in rows if row["offloaded"] == "most" and row["peak"] is not None]
    if not least:
        return lines
    shares = {row["model"] + " on " + row["device"]: row["weights"] / row["peak"] for row in least}
    text = ", ".join(f"{share:.0%} for {name}" for name, share in shares.items())
    return [*lines, "", f"The share of the frozen weights in the peak of `most` is {text}."]


if __name__ == "__main__":
    sys.exit(main())
