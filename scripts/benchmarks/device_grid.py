"""Compile small models of every family with every option for several devices, none of which need be attached.

    python -m scripts.benchmarks.device_grid                                # the whole grid, about 20 minutes of CPU time
    python -m scripts.benchmarks.device_grid --devices v5e --families gemma t5 --every 10

A cell is a family, an option that differs from the defaults, a device, and a step (training or decoding). Each family meets
every device with the defaults, and each option meets every device with a family, in turn. A cell must compile, or be refused
with one line (a `QLoRAError`). The quick plan, which a run also calculates before it starts, must refuse what the compiler's
plan refuses, with the same words. The exit code is 1 if a cell does otherwise.

The models are small, but their heads have the sizes of the family's real models, which decide the attention kernel.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax import cli
from qlora_jax.errors import DoesNotFitError, QLoRAError
from qlora_jax.finetune.options.options import Options
from qlora_jax.finetune.step import step_spec
from qlora_jax.models import FAMILIES, ModelSpec, family_of
from qlora_jax.plan import Machine, compile_decode_step, compile_train_step, machine_mesh, machine_named, quick_plan
from qlora_jax.plan.topology import context
from qlora_jax.platforms import use_compilers_only
from qlora_jax.train import StepSpec, build_step, place_step
from scripts.benchmarks.model_sizes import check_names

_SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_TWO_KINDS = ["sliding_attention", "full_attention"]
# What each family's models have beside these sizes: the head size of its real models, and windows within the rows.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 64},
    "mistral": {"head_dim": 128, "sliding_window": 96},
    "qwen2": {"head_dim": 64, "use_sliding_window": True, "sliding_window": 96, "max_window_layers": 1},
    "qwen3": {"head_dim": 128},
    "gemma": {"head_dim": 256, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 256, "sliding_window": 96, "layer_types": _TWO_KINDS},
    "gemma3_text": {"head_dim": 256, "sliding_window": 96, "layer_types": _TWO_KINDS},
    "phi3": {"hidden_size": 384, "sliding_window": 96},  # heads of 96
    "smollm3": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "gpt_neox": {"hidden_size": 320},  # heads of 80
    "t5": {"d_model": 256, "d_kv": 64, "d_ff": 384, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
}
_QUERIES = r".*(q_proj|qkv_proj|query_key_value|SelfAttention\.q)"
# Options by name: fields of the groups of `Options`, and the number of devices.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "rows of 201 tokens": {"data": {"max_length": 201}},
    "rows of 1001 tokens": {"data": {"max_length": 1001}},
    "rows of 1001, not packed": {"data": {"max_length": 1001, "packing": False}},
    "rows of 2500, not packed": {"data": {"max_length": 2500, "packing": False}},
    "rows of 40 tokens": {"data": {"max_length": 40}},
    "not packed": {"data": {"packing": False}},
    "by length": {"data": {"group_by_length": True}},
    "dtype float32": {"model": {"dtype": "float32"}},
    "float32, not packed": {"model": {"dtype": "float32"}, "data": {"packing": False}},
    "data-type none": {"model": {"data_type": "none"}},
    "data-type fp4": {"model": {"data_type": "fp4"}},
    "data-type int4": {"model": {"data_type": "int4"}},
    "data-type nf3": {"model": {"data_type": "nf3"}},
    "block-size 128": {"model": {"block_size": 128}},
    "single quantization": {"model": {"double_quantization": False}},
    "embedding int8": {"model": {"embedding_storage": "int8"}},
    "embedding nf4": {"model": {"embedding_storage": "nf4"}},
    "remat none": {"model": {"remat": "none"}},
    "remat dots": {"model": {"remat": "dots"}},
    "remat offload": {"model": {"remat": "offload"}},
    "dropout": {"lora": {"dropout": 0.1}},
    "DoRA": {"lora": {"use_dora": True}},
    "rsLoRA of queries": {"lora": {"use_rslora": True, "target_regex": _QUERIES}},
    "patterns of ranks": {"lora": {"rank": 4, "rank_pattern": {"down_proj": 16}, "alpha_pattern": {"down_proj": 8.0}}},
    "adapted embedding": {"lora": {"target_modules": ("embed_tokens",)}},
    "trained head": {"lora": {"modules_to_save": ("lm_head",)}},
    "trained embedding, tied": {"lora": {"modules_to_save": ("embed_tokens",), "ensure_weight_tying": True}},
    "rank of some layers": {"lora": {"layers_to_transform": (1,)}},
    "bias all": {"lora": {"bias": "all"}},
    "lora-bias": {"lora": {"lora_bias": True}},
    "new special tokens": {"lora": {"special_tokens": ("<a>", "<b>")}},
    "trained embedding rows": {"lora": {"trainable_token_indices": (1, 2)}},
    "adamw8bit": {"optimizer": {"optimizer": "adamw8bit"}},
    "lion": {"optimizer": {"optimizer": "lion"}},
    "adafactor": {"optimizer": {"optimizer": "adafactor"}},
    "LoRA+": {"optimizer": {"loraplus_lr_ratio": 16.0}},
    "no clipping, decay": {"optimizer": {"max_grad_norm": 0.0, "weight_decay": 0.1}},
    "host-offload": {"optimizer": {"host_offload": True}},
    "host-adapter": {"optimizer": {"host_adapter": True}},
    "NEFTune": {"optimizer": {"neftune_alpha": 5.0}},
    "accumulation": {"run": {"accumulation_steps": 2, "batch_size": 1}},
    "full": {"tuning": {"method": "full"}, "model": {"data_type": "none"}},
    "ia3": {"tuning": {"method": "ia3"}},
    "prompt-tuning": {"tuning": {"method": "prompt-tuning"}},
    "prompt-tuning, not packed": {"tuning": {"method": "prompt-tuning"}, "data": {"packing": False}},
    "p-tuning": {"tuning": {"method": "p-tuning"}},
    "p-tuning, LSTM": {"tuning": {"method": "p-tuning", "prompt_encoder": "LSTM", "virtual_tokens": 7}},
    "prefix-tuning": {"tuning": {"method": "prefix-tuning"}},
    "prefix-tuning, not packed": {"tuning": {"method": "prefix-tuning"}, "data": {"packing": False}},
    "prefix with projection": {"tuning": {"method": "prefix-tuning", "prefix_projection": True}},
    "dpo": {"objective": {"objective": "dpo"}},
    "dpo, smoothed": {"objective": {"objective": "dpo", "label_smoothing": 0.1}},
    "attention groups": {"context": {"attention_groups": 4}},
    "longlora": {"context": {"longlora": True}},
    "yarn": {"context": {"rope_scaling": "yarn", "rope_factor": 2.0}},
    "2 devices": {"devices": 2},
    "2 devices, full": {"devices": 2, "tuning": {"method": "full"}, "model": {"data_type": "none"}},
    "2 devices, p-tuning": {"devices": 2, "tuning": {"method": "p-tuning"}},
    "2 devices, dots": {"devices": 2, "model": {"remat": "dots"}},
}
# The options that decide the program of the decode step.
DECODED = (
    "defaults",
    "dtype float32",
    "data-type none",
    "data-type nf3",
    "embedding nf4",
    "DoRA",
    "full",
    "ia3",
    "prompt-tuning",
    "prefix-tuning",
    "2 devices",
)
Step = Literal["train", "decode"]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The cells to compile."""

    devices: tuple[str, ...] = ("h100", "rtx4090", "v5e")
    """Devices, in the notation of scripts/plan.py."""
    families: tuple[str, ...] = tuple(FAMILY_FIELDS)
    """Families, by their model_type."""
    options: tuple[str, ...] = tuple(OPTIONS)
    """Options, by their names in this file."""
    steps: tuple[Step, ...] = ("train", "decode")
    """The steps to compile."""
    every: int = 1
    """Compile every so many cells of the list; another offset takes others."""
    offset: int = 0
    """The first cell to compile."""
    compile: bool = True
    """Whether to compile the training steps; otherwise they are only traced and lowered, which takes a third of the time and
    finds what a kernel does not take."""
    record: Path | None = None
    """File of JSON lines with the results, which is read and extended: cells that it has are not compiled again."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One program of the grid."""

    step: Step
    family: str
    option: str
    device: str

    @property
    def machine(self) -> Machine:
        """The machine, with as many devices as the option says."""
        machine = machine_named(self.device)
        count = OPTIONS[self.option].get("devices", 1)
        if count == 1:
            return machine
        shape = (count, *[1] * (machine.device.dimensions - 1)) if machine.device.platform == "tpu" else (count,)
        return Machine(machine.device, shape)

    @property
    def options(self) -> Options:
        """The options of a run."""
        plain = Options()
        changes = {"run": {"batch_size": 1}, "data": {"max_length": 192}, "lora": {"rank": 8}}
        if OPTIONS[self.option].get("tuning"):  # other methods take no rank
            del changes["lora"]
        for group, fields in OPTIONS[self.option].items():
            if group != "devices":
                changes[group] = changes.get(group, {}) | fields
        return dataclasses.replace(
            plain, **{group: dataclasses.replace(getattr(plain, group), **fields) for group, fields in changes.items()}
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a cell: "compiles", "refused" or "fails"; the line of the error; the seconds of CPU time."""

    outcome: str
    line: str
    quick: str
    seconds: float

    @property
    def good(self) -> bool:
        """Whether the cell compiles or is refused, and the quick plan says the same."""
        return self.outcome != "fails" and self.quick == self.line


def cells(arguments: Arguments) -> Iterator[Cell]:
    """Yield the cells: defaults of all families on all devices, other options on all devices with a family in turn."""
    families = arguments.families
    for step in arguments.steps:
        turn = 0
        for option in (name for name in arguments.options if step == "train" or name in DECODED):
            for device in arguments.devices:
                if option == "defaults":
                    yield from (Cell(step, family, option, device) for family in families)
                else:
                    yield Cell(step, families[turn % len(families)], option, device)
                    turn += 1


def compile_cell(cell: Cell, *, lower_only: bool = False) -> Result:
    """Return what the compiler and the quick plan say of a cell; with `lower_only` a training step is not compiled."""
    start, quick = time.process_time(), ""
    machine = cell.machine

    def spec() -> Any:
        config = {"model_type": cell.family, **_SMALL, **FAMILY_FIELDS[cell.family]}
        return step_spec(cell.options, family_of(config).config(config), machine.device.platform)

    if cell.step == "train":
        try:
            quick_plan(spec(), machine.device.target, machine.count)
        except QLoRAError as error:
            quick = str(error)
    outcome, line = "compiles", ""
    try:
        if cell.step == "train" and lower_only:
            _lower(spec(), machine)
        elif cell.step == "train":
            compile_train_step(spec(), machine)
        else:
            compile_decode_step(spec(), machine, capacity=256)
    except DoesNotFitError as error:  # no cell is that large
        outcome, line = "fails", str(error)
    except QLoRAError as error:
        outcome, line = "refused", str(error)
    except Exception as error:  # what a user would see as a traceback, of whatever kind
        outcome, line = "fails", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "\n" in line:
        outcome = "fails"
    return Result(outcome, line, line if cell.step == "decode" else quick, round(time.process_time() - start, 1))


def _lower(spec: StepSpec[ModelSpec], machine: Machine) -> None:
    """Trace and lower a training step for a machine."""
    mesh = machine_mesh(machine)
    step: Any = place_step(build_step(spec, platform=machine.device.target, devices=machine.count), mesh)
    with context(mesh):
        step.jit_train().trace(step.state, step.frozen, step.batch).lower(lowering_platforms=(machine.device.platform,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    use_compilers_only()
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Compile the cells, print the table, and return 1 if a cell fails."""
    check_names("families", arguments.families, FAMILIES)
    check_names("options", arguments.options, OPTIONS)
    recorded = _read(arguments.record)
    found: dict[Cell, Result] = {}
    for cell in list(cells(arguments))[arguments.offset :: arguments.every]:
        if cell not in recorded:
            recorded[cell] = compile_cell(cell, lower_only=not arguments.compile)
            if arguments.record is not None:
                with arguments.record.open("a", encoding="utf-8") as file:
                    values = dataclasses.asdict(cell) | dataclasses.asdict(recorded[cell])
                    file.write(json.dumps(values) + "\n")
            print(*dataclasses.astuple(cell), *dataclasses.astuple(recorded[cell]), sep=" | ", file=sys.stderr, flush=True)
        found[cell] = recorded[cell]
    print(table(found))
    bad = [cell for cell, result in found.items() if not result.good]
    seconds = sum(result.seconds for result in found.values())
    outcomes = {name: sum(result.outcome == name for result in found.values()) for name in ("compiles", "refused", "fails")}
    print(json.dumps({"cells": len(found), **outcomes, "bad": len(bad), "seconds": round(seconds)}))
    return 1 if bad else 0


def table(found: dict[Cell, Result]) -> str:
    """Return a Markdown table of the cells that do not compile, and the numbers of those that do."""
    lines = ["| step | family | option | device | outcome | quick plan |", "| --- | --- | --- | --- | --- | --- |"]
    for cell, result in found.items():
        if result.outcome == "compiles" and result.good:
            continue
        agrees = "the same" if result.quick == result.line else result.quick or "plans it"
        lines.append(f"| {' | '.join(dataclasses.astuple(cell))} | {result.outcome}: {result.line} | {agrees} |")
    return "\n".join(lines)


def _read(record: Path | None) -> dict[Cell, Result]:
    if record is None or not record.exists():
        return {}
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    names = [field.name for field in dataclasses.fields(Cell)]
    return {
        Cell(**{name: row[name] for name in names}): Result(**{name: row[name] for name in row if name not in names})
        for row in rows
    }


if __name__ == "__main__":
    sys.exit(main())
