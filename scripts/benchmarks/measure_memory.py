"""What well-known runs need in memory: a table of compiled training steps, as docs/memory.md shows it.

    python scripts/measure_memory.py --output docs/memory.md
    python scripts/measure_memory.py --devices v5p --models llama-3-8b

Each run is compiled four times, by how much it leaves to host memory:

    device     nothing: weights, adapter, optimizer and the layers' inputs are on the device
    optimizer  Adam's moments (--host-offload)
    most       moments, adapter, its gradient and the layers' inputs (--host-adapter --remat offload)
    most, NF4  the same, with token table and output head in NF4 (--embedding-storage nf4)

Layers are recomputed in the backward pass in all of them. The figures are those of XLA's buffer assignment, GEMMs not
autotuned. The last line is JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_jax.peft import LoRA
from qlora_jax.plan import DoesNotFit, Plan, Recipe, check_compiler, compile_train_step, machine_named
from scripts.benchmarks.ahead import check_names, config_of, main_of  # before JAX

GIB = 2**30
# (model, rank, rows a device, tokens a row): the paper's runs, and longer ones.
RUNS = (
    ("llama-7b", 64, 1, 512),
    ("llama-13b", 64, 1, 512),
    ("llama-33b", 64, 1, 512),
    ("llama-65b", 64, 1, 512),
    ("llama-2-7b", 64, 4, 2048),
    ("llama-3-8b", 16, 4, 2048),
    ("llama-3-70b", 16, 1, 2048),
)
OFFLOADED: dict[str, dict[str, Any]] = {
    "device": {},
    "optimizer": {"host_optimizer": True},
    "most": {"host_optimizer": True, "host_adapter": True, "remat": "offload"},
    "most, NF4": {"host_optimizer": True, "host_adapter": True, "remat": "offload", "embedding_storage": "nf4"},
}
# Columns of the table, and what of `figures` they show.
SHOWN = (
    ("peak", "peak"),
    ("frozen weights", "weights"),
    ("adapter", "adapter"),
    ("temporaries", "temporaries"),
    ("host memory", "host"),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which runs, on what."""

    devices: tuple[str, ...] = ("h100", "v5e:2x2")
    """Devices as scripts/plan.py takes them; on several, the rows of a run are spread over them."""
    models: tuple[str, ...] | None = None
    """Models of the tables; if left out, all of them on one device and Llama-3-8B on several."""
    output: Path | None = None
    """Markdown file to write; standard output alone if left out."""


def run(arguments: Arguments) -> None:
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
        recipe = Recipe(
            config=config_of(model),
            method=LoRA(rank),
            batch_size=max(batch // machine.count, 1),
            length=length,
            packed=False,
            **OFFLOADED[name],
        )
        row = {"device": machine.name, "model": model, "rank": rank, "batch": batch, "length": length, "offloaded": name}
        try:
            rows.append(row | figures(compile_train_step(recipe, machine)))
        except DoesNotFit as error:
            rows.append(row | {"peak": None, "why": str(error)})
    text = markdown(rows)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    method = "XLA buffer assignment of compiled train steps; GEMMs not autotuned"
    print(json.dumps({"method": method, "devices": arguments.devices, "rows": rows}))


def figures(plan: Plan) -> dict[str, Any]:
    """Bytes and seconds of a plan."""
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
    """The page docs/memory.md."""
    lines = [
        "# Memory of well-known runs",
        "",
        "GiB of one training step on each device, as XLA compiles it: NF4 with double quantisation, LoRA on all linear",
        "layers, bfloat16 activations, float32 adapter and AdamW, layers recomputed in the backward pass. Made by",
        "`python scripts/measure_memory.py --output docs/memory.md`, whose head says what is left to the host in each line.",
    ]
    for device in dict.fromkeys(row["device"] for row in rows):
        lines += table(device, [row for row in rows if row["device"] == device])
    return "\n".join([*lines, "", "## The floor", "", *floor(rows), ""])


def table(device: str, rows: list[dict[str, Any]]) -> list[str]:
    """The lines of one device."""
    versions = next((row["versions"] for row in rows if row["peak"] is not None), {})
    columns = ("model", "rank", "batch", "left to the host", *(name for name, _ in SHOWN), "compiled in s")
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
    """What stands between these runs and less memory."""
    lines = [
        "Nothing that the options can move stands on the device in the lines `most`; what is left there is",
        "",
        "- the frozen weights, which each step reads whole: 4.127 bits a value, token table and head in bfloat16 or, in the",
        "  lines `most, NF4`, in 4 bits too. Fewer bits a value, or more devices, are the only way below them;",
        "- what one layer holds while it is computed again and differentiated (activations of a micro-batch, one dense",
        "  matrix at a time), or a chunk of logits with the head, whichever is more. Fewer tokens a micro-batch lessen it.",
    ]
    least = [row for row in rows if row["offloaded"] == "most" and row["peak"] is not None]
    if not least:
        return lines
    shares = {row["model"] + " on " + row["device"]: row["weights"] / row["peak"] for row in least}
    said = ", ".join(f"{share:.0%} of {name}" for name, share in shares.items())
    return [*lines, "", f"The frozen weights are of the peak of `most`: {said}."]


if __name__ == "__main__":
    sys.exit(main_of(Arguments, run, __doc__))
