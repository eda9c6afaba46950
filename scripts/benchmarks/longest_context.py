"""Find the longest context that fits each card, and write a table beside Unsloth's, as in docs/longest-context.md.

    python scripts/benchmarks/longest_context.py --output docs/longest-context.md
    python scripts/benchmarks/longest_context.py --models llama-3.1-8b --verify

The run is that of Unsloth's table: QLoRA of rank 32 on all linear layers, one row. Layers are recomputed in the backward
pass, and their inputs are in host memory (--remat offload). 1 GiB of the device is left free. The quick plan searches the
lengths in steps of 1024 tokens; with --verify, some of the cells that it finds are compiled. The last line is JSON.
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
from qlora_jax.plan import (
    DEVICES,
    Machine,
    QuickPlan,
    check_compiler,
    compile_train_step,
    largest_that_fits,
    machine_named,
    quick_plan,
)
from qlora_jax.plan.compile import versions
from qlora_jax.platforms import use_compilers_only
from qlora_jax.quant import EmbeddingStorage
from qlora_jax.train import BatchSpec, OptimizerSpec, StepSpec, build_step, language_model_objective
from qlora_jax.train.spec import Step
from scripts.benchmarks.model_sizes import check_names, config_of
from scripts.benchmarks.page import table

Spec = StepSpec[ModelSpec]
GIB = 2**30
STEP = 1024  # tokens; the chunks of the feed-forward and of the loss then divide a row
# Unsloth's table and that of Hugging Face with FlashAttention 2, by model and GB of the card; None: out of memory.
SOURCE = "https://unsloth.ai/docs/basics/unsloth-benchmarks"
PUBLISHED: dict[str, dict[int, tuple[int, int | None]]] = {
    "llama-3.1-8b": {
        8: (2_972, None),
        12: (21_848, 932),
        16: (40_724, 2_551),
        24: (78_475, 5_789),
        40: (153_977, 12_264),
        48: (191_728, 15_502),
        80: (342_733, 28_454),
    },
    "llama-3.3-70b": {48: (12_106, None), 80: (89_389, 6_916)},
}
CHIPS = ("v5e", "v6e", "v5p")
# What differs: the storage of embedding and output head, and AdamW's state in host memory or in 8 bits on the device.
WAYS: dict[str, tuple[EmbeddingStorage, OptimizerSpec]] = {
    "dense, offloaded": ("none", OptimizerSpec(host_optimizer=True)),
    "dense, 8-bit": ("none", OptimizerSpec("adamw8bit")),
    "int8, offloaded": ("int8", OptimizerSpec(host_optimizer=True)),
    "int8, 8-bit": ("int8", OptimizerSpec("adamw8bit")),
}
FIRST = next(iter(WAYS))
VERIFIED = (  # (model, place, way) of the cells that --verify compiles
    ("llama-3.1-8b", "24 GB", FIRST),
    ("llama-3.1-8b", "80 GB", FIRST),
    ("llama-3.1-8b", "16 GB", "int8, offloaded"),
    ("llama-3.3-70b", "80 GB", FIRST),
    ("llama-3.1-8b", "v5e", FIRST),
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the table."""

    models: tuple[str, ...] = tuple(PUBLISHED)
    """Models by the name of their size."""
    verify: bool = False
    """Compile some of the cells, and show their peaks beside those of the quick plan."""
    record: Path | None = None
    """File of JSON lines with compiled peaks, which is read and extended."""
    output: Path | None = None
    """Markdown file to write; if left out, the page is only printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Search all cells, compile some of them, then print and write the page."""
    check_names("models", arguments.models, PUBLISHED)
    places = {f"{size} GB": card(size) for size in PUBLISHED["llama-3.1-8b"]} | {name: machine_named(name) for name in CHIPS}
    chosen = [
        (model, place, way)
        for model in arguments.models
        for place in places
        for way in WAYS
        if place in CHIPS or int(place.split()[0]) in PUBLISHED[model]
    ]
    rows, steps = [], {}
    for model, place, way in tqdm(chosen, desc="searching", unit="cell"):
        platform = places[place].device.platform
        key = (model, way, platform)
        steps[key] = steps[key] if key in steps else build_step(spec_of(model, way, STEP), platform=platform)
        rows.append(_search(model, place, way, places[place], steps[key]))
    compiled = _compiled(arguments, rows, places)
    text = markdown(rows, compiled)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
    print(json.dumps({"method": "largest length of the quick plan, 1 GiB left free", "rows": rows, "compiled": compiled}))


def card(size: int) -> Machine:
    """Return a machine with one GPU of so many GB.

    It has the memory that CUDA reports for an RTX 4090, an A100 of 40 GB or of 80 GB; for other sizes it has as much of each
    GiB as the RTX 4090, and programs are compiled for that GPU.
    """
    known = {40: "a100-40", 80: "a100-80"}
    device = DEVICES[known.get(size, "rtx4090")]
    memory = device.memory_bytes if size in known else device.memory_bytes * size // 24
    return Machine(dataclasses.replace(device, memory_bytes=memory), (1,))


def spec_of(model: str, way: str, length: int) -> Spec:
    """Return the step of a cell with a length."""
    storage, optimizer = WAYS[way]
    described = ModelSpec(config_of(model), method=LoRA(32), remat="offload", embedding_storage=storage)
    return StepSpec(described, language_model_objective(packed=False), BatchSpec(length=length), optimizer)


def _search(model: str, place: str, way: str, machine: Machine, step: Step) -> dict[str, Any]:
    """Return the largest length of a cell, or None for it, with its peaks in device and host memory.

    `step` is that of the cell with any length.
    """
    limit, platform = machine.device.memory_bytes - GIB, machine.device.platform

    def plan(length: int) -> QuickPlan:
        return quick_plan(spec_of(model, way, length), platform, step=step)

    found = largest_that_fits(lambda length: plan(length).peak, limit, start=16 * STEP, step=STEP, most=2**21)
    length, size = found or (None, None)
    host = None if length is None else plan(length).host_peak
    return {"model": model, "place": place, "way": way, "length": length, "peak": size, "host": host, "limit": limit}


def _compiled(arguments: Arguments, rows: list[dict[str, Any]], places: dict[str, Machine]) -> list[dict[str, Any]]:
    """Return the compiled peaks of cells: those of `VERIFIED` if they are to be verified, and those of the record."""
    path = arguments.record
    lines = [] if path is None or not path.exists() else path.read_text(encoding="utf-8").splitlines()
    recorded = [json.loads(line) for line in lines]
    found = []
    for row in rows:
        cell = (row["model"], row["place"], row["way"])
        same = [one for one in recorded if (*cell, row["length"]) == (one["model"], one["place"], one["way"], one["length"])]
        if same:
            found.append(same[0])
        elif arguments.verify and cell in VERIFIED and row["length"] is not None:
            found.append(row | _compile(spec_of(row["model"], row["way"], row["length"]), places[row["place"]]))
            if path is not None:
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found[-1]) + "\n")
    return found


def _compile(spec: Spec, machine: Machine) -> dict[str, Any]:
    check_compiler(machine)
    try:
        plan = compile_train_step(spec, machine)
    except DoesNotFitError as error:  # only TPUs' compiler refuses; it says how much the program needs
        return {"compiled": error.needed, "workspace": 0, "versions": versions(machine)}
    return {"compiled": plan.peak, "workspace": plan.program.workspace, "versions": plan.versions}


def markdown(rows: list[dict[str, Any]], compiled: list[dict[str, Any]]) -> str:
    """Return the page."""
    lines = [HEAD, ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        lines += [f"## {model}", "", *_cards(model, own), "", *_chips(own), ""]
    lines += ["## Compiled cells", "", *_checks(compiled)]
    return "\n".join(lines) + "\n"


def _cards(model: str, rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for size, (theirs, other) in PUBLISHED[model].items():
        cells = {row["way"]: row for row in rows if row["place"] == f"{size} GB"}
        first = cells[FIRST]
        ratio = "–" if first["length"] is None else f"{first['length'] / theirs:.2f}"
        ours = [_length(cells[way]["length"]) for way in WAYS]
        found.append([f"{size} GB", _length(theirs), _length(other), *ours, ratio, _gib(first["host"])])
    return table(["card", "Unsloth", "Hugging Face", *WAYS, f"{FIRST} / Unsloth", "host GiB"], found)


def _chips(rows: list[dict[str, Any]]) -> list[str]:
    found = []
    for chip in CHIPS:
        cells = {row["way"]: row for row in rows if row["place"] == chip}
        found.append([chip, *(_length(cells[way]["length"]) for way in WAYS), _gib(cells[FIRST]["host"])])
    return table(["chip", *WAYS, "host GiB"], found)


def _checks(compiled: list[dict[str, Any]]) -> list[str]:
    if not compiled:
        return ["None was compiled for this page."]
    found = []
    for row in compiled:
        sizes = (row[name] for name in ("peak", "compiled", "limit", "workspace"))
        found.append([row["model"], row["place"], row["way"], _length(row["length"]), *map(_gib, sizes)])
    used = dict.fromkeys(", ".join(f"{name} {version}" for name, version in row["versions"].items()) for row in compiled)
    header = ["model", "device", "way", "tokens", "quick GiB", "compiled GiB", "limit GiB", "workspace GiB"]
    return [*table(header, found), "", f"Compiled with {'; '.join(used)}."]


def _length(length: int | None) -> str:
    return "does not fit" if length is None else f"{length:,}"


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / GIB:.2f}"


HEAD = f"""\
# The longest context by card

The most tokens of one row that fit a training step: QLoRA of rank 32 on all linear layers, batch size 1, NF4 with double
quantisation, bfloat16 activations, float32 adapter, no packing. Made by
`python scripts/benchmarks/longest_context.py --verify --output docs/longest-context.md`.

- Layers are recomputed in the backward pass and their inputs are in host memory (`--remat offload`). The column "host
  GiB" is what "{FIRST}" stores there. A machine with less host memory has a shorter context.
- `dense` or `int8` is the storage of the embedding and the output head (`--embedding-storage`). `offloaded` is AdamW
  with its state in host memory (`--host-offload`), `8-bit` is `--optimizer adamw8bit` on the device.
- 1 GiB of the device is left free, for the CUDA context, libraries and fragmentation. cuDNN's workspace is counted. A
  card of 24, 40 or 80 GB has the memory that CUDA reports for an RTX 4090 or an A100; another one has as much of each
  GiB as the RTX 4090.
- The lengths are those of the quick plan, in steps of {STEP:,} tokens. No card was attached. The last section compares
  some of them with compiled steps. Lengths of TPU chips are estimates that no compiler has confirmed, unless the last
  section lists them.
- The columns "Unsloth" and "Hugging Face" (with FlashAttention 2) are Unsloth's own measurements, from
  {SOURCE}. Theirs is the memory of the whole card, ours that of
  the card without 1 GiB. A ratio below 1 is a cell in which their context is longer.

Both models were trained with at most 131,072 positions. Above 524,288 tokens of llama-3.1-8b the queries of one layer have
more than 2³¹ elements; XLA compiles such a step, and whether cuDNN's attention takes it is known only on a device."""


if __name__ == "__main__":
    sys.exit(main())
