"""A suite of benchmarks: speed and memory beside Hugging Face, Qwix and Unsloth, on a CPU, a GPU or a TPU, or on none.

    python scripts/bench.py                                  everything: about an hour on 2 idle cores
    python scripts/bench.py --output docs/results.md         the same, and the page of results
    python scripts/bench.py --tasks train --ours float32-full --hf float32 --qwix --rounds 3
    python scripts/bench.py --tasks decode --batch-size 4
    python scripts/bench.py --peer-python ours/bin/python qwix/bin/python   where this interpreter lacks the peers' packages
    python scripts/bench.py --compile-only --device h100 v5e:2x2 --compile-models llama-3-8b
    python scripts/bench.py --platform default --tasks train decode         on the GPU or TPU that is there

Tasks (what their columns mean: scripts/benchmarks/)

    train      SmolLM2 with NF4 and LoRA, by qlora_jax, by transformers + PEFT + bitsandbytes, by Qwix + Tunix and, on a CUDA
               GPU, by Unsloth; with the time from the start of the program to the end of its first step
    decode     greedy decoding of SmolLM2, by qlora_jax and by transformers, dense and in 4 bits
    memory     the compiled plan of the training step on this CPU against the resident memory that it is measured to take
    compiled   memory, operations and bytes of training and decode steps, compiled for devices that need not be there

Method. Both sides read the same folder of bfloat16 weights and do the same work: the same tokens, ranks and optimizer. Every
run is a process of its own; ours and the peers' take turns, for several rounds, so that a slow minute of the machine hits
both. Warm-up, in which one compiles and the other allocates, is left out; each other step ends with its result on the host.

A variant is marked with * where its steps kept the cores busy for less than 80 %, or its slowest took half as long again as
its fastest: most likely neighbours had the cores, and its figures are not to be cited. They do not hurt both sides alike:
with one of two cores taken, a step of ours took twice as long, some of PyTorch's over ten times, spinning (and so looking
busy).

A peer is named by the interpreter that has its packages; one that has none, or that fails, is left out, and the reason is
told. The last line is the result as JSON.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.export.merge import merge
from qlora_jax.plan import SIZES, CompilerMissing, check_compiler, machine_named
from scripts.benchmarks import compiled, decoding, memory, page, training
from scripts.benchmarks.workers import OURS, Found, Peer, Platform, device, find_python, in_rounds, tell

Task = Literal["train", "decode", "memory", "compiled"]
Ours = Literal["float32-dots", "float32-full", "float32-none", "bfloat16-dots", "bfloat16-full", "bfloat16-none"]
Torch = Literal["float32", "float32-checkpointing", "bfloat16", "bfloat16-checkpointing"]
Prepared = Literal["float32-prepared", "bfloat16-prepared"]
Qwix = Literal["float32", "float32-block", "float32-decoder", "bfloat16", "bfloat16-block", "bfloat16-decoder"]
Decoded = Literal["dense-float32", "dense-bfloat16", "nf4-float32", "nf4-bfloat16"]
HF = Peer("hf", ("torch", "transformers", "peft", "bitsandbytes", "accelerate"))
QWIX = Peer("qwix", ("jax", "qwix", "tunix"))
UNSLOTH = Peer("unsloth", ("torch", "unsloth"), cuda=True)
# To compile for a device, it needs this package's own dependencies beside it.
QWIX_COMPILER = Peer("qwix", ("jax", "qwix", "tunix", "tyro", "gguf", "grain"))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare speed and memory of qlora_jax with those of its peers."""

    tasks: tuple[Task, ...] = ("train", "decode", "memory", "compiled")
    """What to run."""
    compile_only: bool = False
    """Only what needs no run: the task "compiled"."""
    output: Path | None = None
    """Markdown file for the results, beside standard output."""
    platform: Platform = "cpu"
    """"cpu", or "default": each side on the GPU or TPU that it finds, else on the CPU."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    peer_python: tuple[Path, ...] = (Path(sys.executable),)
    """Interpreters of the peers: each peer takes the first that has its packages."""
    rounds: int = 2
    """Runs of each variant."""
    batch_size: int | None = None
    """Sequences of a batch; 4 for training and 1 for decoding if left out."""
    rank: int = 16
    """Rank of the adapters."""

    ours: tuple[Ours, ...] = ("float32-dots", "float32-full", "bfloat16-dots", "bfloat16-full")
    """train: compute dtype and what the backward pass recomputes, of our runs."""
    hf: tuple[Torch | Prepared, ...] = (
        "float32",
        "float32-checkpointing",
        "bfloat16",
        "bfloat16-checkpointing",
        "bfloat16-prepared",
    )
    """train: compute dtype, and whether with gradient checkpointing, or as PEFT prepares a model in 4 bits (with
    checkpointing, and float32 for all that is not quantised), of transformers + PEFT; nothing: none."""
    qwix: tuple[Qwix, ...] = ("float32-decoder", "bfloat16-decoder")
    """train: compute dtype, and what Tunix recomputes; nothing: none, and none in "compiled"."""
    unsloth: tuple[Torch, ...] = ("bfloat16", "bfloat16-checkpointing")
    """train: the same of Unsloth, on a CUDA GPU; nothing: none."""
    length: int = 256
    """train: tokens of a sequence."""
    steps: int = 4
    """train: steps of a run that count."""
    warmup: int = 2
    """train: steps before them that do not."""

    decode_ours: tuple[Decoded, ...] = ("dense-float32", "nf4-float32", "nf4-bfloat16")
    """decode: storage of the linear layers and compute dtype, of our runs."""
    decode_hf: tuple[Decoded, ...] = ("dense-float32", "nf4-float32", "nf4-bfloat16")
    """decode: the same of transformers, in 4 bits through bitsandbytes; nothing: none."""
    prompt_tokens: int = 64
    """decode: tokens of the prompt."""
    new_tokens: int = 64
    """decode: tokens of an answer."""
    answers: int = 3
    """decode: answers of a run that count."""

    memory_recipes: tuple[str, ...] = memory.RECIPES
    """memory: runs, as dtype-remat-BxT."""

    device: tuple[str, ...] = ("h100", "v5e")
    """compiled: devices as scripts/plan.py takes them."""
    compile_models: tuple[str, ...] = ("llama-3.2-1b", "llama-3-8b")
    """compiled: sizes by name, as scripts/plan.py knows them."""
    compile_steps: tuple[compiled.Step, ...] = ("train", "decode")
    """compiled: which steps."""
    compile_batch_size: int = 4
    """compiled: sequences of a training batch."""
    compile_length: int = 2048
    """compiled: tokens of a sequence, and of the cache while decoding."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        run(arguments)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Arguments) -> None:
    check(arguments)
    tasks = ("compiled",) if arguments.compile_only else arguments.tasks
    machine = device()
    sections, report = [], {}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        needs_folder = set(tasks) & {"train", "decode", "memory"}
        folder = checkpoint_folder(arguments.model, Path(temporary)) if needs_folder else Path()
        for task in tasks:
            section, values = {"train": train, "decode": decode, "memory": plan_memory, "compiled": compile_steps}[task](
                arguments, folder, machine
            )
            sections.append(section)
            report[task] = values
            print(page.text(section), flush=True)
            if arguments.output is not None:  # after each, so that an hour's work is not lost with the last task
                page.write(arguments.output, sections, page.said_command("bench.py"))
    print(json.dumps({"device": machine, **report}))


def check(arguments: Arguments) -> None:
    """Raises ValueError for what could only fail later."""
    for name in ("rounds", "steps", "warmup", "rank", "length", "answers", "prompt_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(arguments, name)}")
    if arguments.new_tokens < 2:
        raise ValueError(f"new_tokens: expected at least 2 (the first is the prefill's), found {arguments.new_tokens}")
    if not arguments.tasks:
        raise ValueError("tasks: expected at least one, found none")
    for recipe in arguments.memory_recipes:
        memory.parsed(recipe)
    for name in arguments.device:
        machine_named(name)
    for name in arguments.compile_models:
        if name not in SIZES:
            raise ValueError(f"compile_models: expected some of {', '.join(SIZES)}, found {name}")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise ValueError(f"output: expected a folder that exists, found {arguments.output.absolute().parent}")


Result = tuple[page.Section, dict[str, Any]]


def train(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """The task of that name."""
    work = {name: getattr(arguments, name) for name in ("length", "rank", "steps", "warmup")}
    work["batch_size"] = arguments.batch_size or 4
    wanted = {HF: arguments.hf, QWIX: arguments.qwix, UNSLOTH: arguments.unsloth}
    pythons, skipped = interpreters([peer for peer, variants in wanted.items() if variants], arguments)
    variants: dict[str, Sequence[str]] = {
        OURS: arguments.ours,
        **{peer.name: names for peer, names in wanted.items() if peer.name in pythons},
    }
    runs = training.runs_of(folder, variants, pythons, **work)
    found = in_rounds(runs, arguments.rounds, arguments.platform, training.said, "train")
    found = Found(found.runs, {**skipped, **found.skipped})
    tokens = work["batch_size"] * work["length"]
    results = {name: training.summary(one, tokens, arguments.platform) for name, one in found.runs.items()}
    method = method_of(arguments, **work)
    return training.section(found, results, method, machine), values_of(found, method, results=results)


def decode(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """The task of that name."""
    source = folder if (folder / "tokenizer.json").exists() else arguments.model or fetch_default_model()
    prompt = decoding.prompt_of(load_tokenizer(source), arguments.prompt_tokens)
    work: dict[str, Any] = {name: getattr(arguments, name) for name in ("new_tokens", "answers")}
    work["batch_size"] = arguments.batch_size or 1
    pythons, skipped = interpreters([HF] * bool(arguments.decode_hf), arguments)
    variants: dict[str, Sequence[str]] = {
        OURS: arguments.decode_ours,
        **({"hf": arguments.decode_hf} if "hf" in pythons else {}),
    }
    runs = decoding.runs_of(folder, variants, pythons, prompt=prompt, **work)
    found = in_rounds(runs, arguments.rounds, arguments.platform, decoding.said, "decode")
    found = Found(found.runs, {**skipped, **found.skipped})
    results = {name: decoding.summary(one, work["batch_size"], arguments.platform) for name, one in found.runs.items()}
    method = method_of(arguments, **work, prompt_tokens=arguments.prompt_tokens)
    agreement = decoding.agreement(results)
    values = values_of(found, method, results=results, same_tokens=agreement)
    return decoding.section(found, results, method, machine), values


def plan_memory(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """The task "memory"."""
    runs = memory.runs_of(folder, arguments.memory_recipes, Path(sys.executable), arguments.rank)
    found = in_rounds(runs, 1, "cpu", memory.said, "memory")
    method = method_of(arguments, rank=arguments.rank)
    return memory.section(found, method), values_of(found, method)


def compile_steps(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """The task "compiled"."""
    devices, skipped = [], {}
    for name in arguments.device:
        try:
            check_compiler(machine_named(name))
            devices.append(name)
        except CompilerMissing as error:
            if arguments.compile_only:
                raise ValueError(str(error)) from error
            skipped[name] = str(error)
    pythons, without = interpreters([QWIX_COMPILER] * bool(arguments.qwix), arguments)
    work: dict[str, Any] = {"batch_size": arguments.compile_batch_size, "length": arguments.compile_length}
    work["rank"] = arguments.rank
    runs = compiled.runs_of(arguments.compile_models, devices, arguments.compile_steps, pythons, **work)
    found = in_rounds(runs, 1, "cpu", compiled.said, "compiled")
    found = Found(found.runs, {**skipped, **(without if devices else {}), **found.skipped})
    return compiled.section(found, work), values_of(found, work)


def interpreters(peers: list[Peer], arguments: Arguments) -> tuple[dict[str, Path], dict[str, str]]:
    """The interpreter of each side, and why a peer has none."""
    pythons, skipped = {OURS: Path(sys.executable)}, {}
    for peer in peers:
        if peer.cuda and arguments.platform == "cpu":
            skipped[peer.name] = "needs a CUDA GPU (--platform default)"
            continue
        python, reason = find_python(peer, arguments.peer_python)
        if python is None:
            skipped[peer.name] = f"{reason}; --peer-python names interpreters"
            tell(f"{peer.name} is left out: {skipped[peer.name]}")
        else:
            pythons[peer.name] = python
    return pythons, skipped


def method_of(arguments: Arguments, **work: Any) -> dict[str, Any]:
    """What was run, for the report."""
    model = arguments.model or "SmolLM2-135M-Instruct"
    return {"model": Path(model).name, "platform": arguments.platform, "rounds": arguments.rounds, **work}


def values_of(found: Found, method: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A task's part of the JSON line."""
    return {"method": method, "versions": found.versions, "skipped": found.skipped, **more, "runs": found.runs}


def checkpoint_folder(model: str | None, temporary: Path) -> Path:
    """The folder that both sides read: `model` itself, or an export of it in bfloat16."""
    if model is not None and Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    checkpoint = open_checkpoint(model or str(fetch_default_model()))
    return merge(checkpoint, None, temporary / "checkpoint", dtype="bfloat16", progress=False)


if __name__ == "__main__":
    sys.exit(main())
