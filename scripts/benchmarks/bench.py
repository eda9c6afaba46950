"""Benchmark speed and memory against Hugging Face, Qwix and Unsloth, on a CPU, a GPU or a TPU, or by compiling alone.

    python scripts/benchmarks/bench.py                                  all tasks: about an hour on 2 idle cores
    python scripts/benchmarks/bench.py --output docs/results.md         the same, and write the page of results
    python scripts/benchmarks/bench.py --tasks train --ours float32-full --hf float32 --qwix --rounds 3
    python scripts/benchmarks/bench.py --tasks decode --batch-size 4
    python scripts/benchmarks/bench.py --peer-python ours/bin/python qwix/bin/python    other interpreters for the peers
    python scripts/benchmarks/bench.py --compile-only --device h100 v5e:2x2 --compile-models llama-3-8b
    python scripts/benchmarks/bench.py --platform default --tasks train decode          use the GPU or TPU of this machine

Tasks (the modules of the same name in scripts/benchmarks/ explain the columns of their tables)

    train      SmolLM2 with NF4 and LoRA, by qlora_jax, by transformers + PEFT + bitsandbytes, by Qwix + Tunix and, on a CUDA
               GPU, by Unsloth; includes the time from the start of the program to the end of its first step
    decode     greedy decoding of SmolLM2, by qlora_jax and by transformers, dense and in 4 bits
    memory     the compiled plan of the training step on this CPU, compared with its measured resident memory
    compiled   memory, operations and bytes of training and decode steps, compiled for devices that need not be attached

Method. All programs read the same folder of bfloat16 weights and do the same work: the same tokens, ranks and optimizer.
Every run is a separate process. Runs of qlora_jax and of the peers alternate, for several rounds, so that a slow minute of
the machine affects both. The warm-up, in which programs compile or allocate, is not counted; each other step ends when its
result is on the host.

A variant is marked with * if its steps used less than 80 % of the cores, or if its slowest step took 1.5 times as long as
its fastest: most likely other processes used the cores, and its numbers should not be cited. Other processes do not slow all
programs equally: with one of two cores in use, a step of qlora_jax took twice as long, and some steps of PyTorch took more
than ten times as long, while its threads waited actively and so appeared busy.

A peer runs with the first interpreter that has its packages. A peer without an interpreter, or one that fails, is left out
and the reason is printed. The last line is the result as JSON.
"""

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import OptionError
from qlora_jax.export.merge import merge
from qlora_jax.plan import SIZES, CompilerMissing, check_compiler, machine_named
from scripts.benchmarks import compiled, decoding, memory, page, training
from scripts.benchmarks.workers import OURS, Found, Peer, Platform, device, find_python, in_rounds, log

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
    """Tasks to run."""
    compile_only: bool = False
    """Run only the task "compiled", which executes no model."""
    output: Path | None = None
    """Markdown file to write; the results are printed too."""
    platform: Platform = "cpu"
    """"cpu"; or "default": each program uses the GPU or TPU that it finds, else the CPU."""
    model: str | None = None
    """Hugging Face folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    peer_python: tuple[Path, ...] = (Path(sys.executable),)
    """Python interpreters for the peers; each peer uses the first that has its packages."""
    rounds: int = 2
    """Number of runs of each variant."""
    batch_size: int | None = None
    """Sequences in a batch; 4 for training and 1 for decoding if left out."""
    rank: int = 16
    """Rank of the adapters."""

    ours: tuple[Ours, ...] = ("float32-dots", "float32-full", "bfloat16-dots", "bfloat16-full")
    """train: variants of qlora_jax, as compute dtype and rematerialisation."""
    hf: tuple[Torch | Prepared, ...] = (
        "float32",
        "float32-checkpointing",
        "bfloat16",
        "bfloat16-checkpointing",
        "bfloat16-prepared",
    )
    """train: variants of transformers + PEFT, as compute dtype, and checkpointing or prepared (PEFT's preparation of 4-bit
    models: checkpointing, and float32 for everything that is not quantised). An empty list leaves this peer out."""
    qwix: tuple[Qwix, ...] = ("float32-decoder", "bfloat16-decoder")
    """train: variants of Qwix + Tunix, as compute dtype and rematerialisation. An empty list leaves this peer out, in
    "compiled" too."""
    unsloth: tuple[Torch, ...] = ("bfloat16", "bfloat16-checkpointing")
    """train: variants of Unsloth, on a CUDA GPU. An empty list leaves this peer out."""
    length: int = 256
    """train: tokens in a sequence."""
    steps: int = 4
    """train: measured steps of a run."""
    warmup: int = 2
    """train: steps before the measured ones."""

    decode_ours: tuple[Decoded, ...] = ("dense-float32", "nf4-float32", "nf4-bfloat16")
    """decode: variants of qlora_jax, as storage of the linear layers and compute dtype."""
    decode_hf: tuple[Decoded, ...] = ("dense-float32", "nf4-float32", "nf4-bfloat16")
    """decode: variants of transformers, with bitsandbytes for 4 bits. An empty list leaves this peer out."""
    prompt_tokens: int = 64
    """decode: tokens in the prompt."""
    new_tokens: int = 64
    """decode: tokens in an answer."""
    answers: int = 3
    """decode: measured answers of a run."""

    memory_recipes: tuple[str, ...] = memory.RECIPES
    """memory: training steps to plan and measure, as dtype-remat-BxT."""

    device: tuple[str, ...] = ("h100", "v5e")
    """compiled: devices, in the notation of scripts/plan.py."""
    compile_models: tuple[str, ...] = ("llama-3.2-1b", "llama-3-8b")
    """compiled: models by the name of their size, as in scripts/plan.py."""
    compile_steps: tuple[compiled.Step, ...] = ("train", "decode")
    """compiled: steps to compile."""
    compile_batch_size: int = 4
    """compiled: sequences in a training batch."""
    compile_length: int = 2048
    """compiled: tokens in a training sequence, and in the cache of the decode step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> None:
    """Run the tasks, print each result, and write the page after each task."""
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
            if arguments.output is not None:  # after each task, so that a later failure loses nothing
                page.write(arguments.output, sections, page.command_line("benchmarks/bench.py"))
    print(json.dumps({"device": machine, **report}))


def check(arguments: Arguments) -> None:
    """Raise OptionError for options that would fail only after a long time."""
    for name in ("rounds", "steps", "warmup", "rank", "length", "answers", "prompt_tokens"):
        if getattr(arguments, name) < 1:
            raise OptionError(f"{name}: expected at least 1, found {getattr(arguments, name)}")
    if arguments.new_tokens < 2:
        raise OptionError(f"new_tokens: expected at least 2 (the first is the prefill's), found {arguments.new_tokens}")
    if not arguments.tasks:
        raise OptionError("tasks: expected at least one, found none")
    for recipe in arguments.memory_recipes:
        memory.parsed(recipe)
    for name in arguments.device:
        machine_named(name)
    for name in arguments.compile_models:
        if name not in SIZES:
            raise OptionError(f"compile_models: expected some of {', '.join(SIZES)}, found {name}")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise OptionError(f"output: expected a folder that exists, found {arguments.output.absolute().parent}")


Result = tuple[page.Section, dict[str, Any]]


def train(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """Run the task "train"."""
    work = {name: getattr(arguments, name) for name in ("length", "rank", "steps", "warmup")}
    work["batch_size"] = arguments.batch_size or 4
    wanted = {HF: arguments.hf, QWIX: arguments.qwix, UNSLOTH: arguments.unsloth}
    pythons, skipped = interpreters([peer for peer, variants in wanted.items() if variants], arguments)
    variants: dict[str, Sequence[str]] = {
        OURS: arguments.ours,
        **{peer.name: names for peer, names in wanted.items() if peer.name in pythons},
    }
    runs = training.runs_of(folder, variants, pythons, **work)
    found = in_rounds(runs, arguments.rounds, arguments.platform, training.progress_text, "train")
    found = Found(found.runs, {**skipped, **found.skipped})
    tokens = work["batch_size"] * work["length"]
    results = {name: training.summary(one, tokens, arguments.platform) for name, one in found.runs.items()}
    method = method_of(arguments, **work)
    return training.section(found, results, method, machine), values_of(found, method, results=results)


def decode(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """Run the task "decode"."""
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
    found = in_rounds(runs, arguments.rounds, arguments.platform, decoding.progress_text, "decode")
    found = Found(found.runs, {**skipped, **found.skipped})
    results = {name: decoding.summary(one, work["batch_size"], arguments.platform) for name, one in found.runs.items()}
    method = method_of(arguments, **work, prompt_tokens=arguments.prompt_tokens)
    agreement = decoding.agreement(results)
    values = values_of(found, method, results=results, same_tokens=agreement)
    return decoding.section(found, results, method, machine), values


def plan_memory(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """Run the task "memory"."""
    runs = memory.runs_of(folder, arguments.memory_recipes, Path(sys.executable), arguments.rank)
    found = in_rounds(runs, 1, "cpu", memory.progress_text, "memory")
    method = method_of(arguments, rank=arguments.rank)
    return memory.section(found, method), values_of(found, method)


def compile_steps(arguments: Arguments, folder: Path, machine: dict[str, Any]) -> Result:
    """Run the task "compiled"."""
    devices, skipped = [], {}
    for name in arguments.device:
        try:
            check_compiler(machine_named(name))
            devices.append(name)
        except CompilerMissing as error:
            if arguments.compile_only:
                raise OptionError(str(error)) from error
            skipped[name] = str(error)
    pythons, without = interpreters([QWIX_COMPILER] * bool(arguments.qwix), arguments)
    work: dict[str, Any] = {"batch_size": arguments.compile_batch_size, "length": arguments.compile_length}
    work["rank"] = arguments.rank
    runs = compiled.runs_of(arguments.compile_models, devices, arguments.compile_steps, pythons, **work)
    found = in_rounds(runs, 1, "cpu", compiled.progress_text, "compiled")
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
            log(f"{peer.name} is left out: {skipped[peer.name]}")
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
    """Return the folder that all programs read: `model` itself, or an export of it in bfloat16."""
    if model is not None and Path(os.path.expanduser(model)).is_dir():
        return Path(os.path.expanduser(model))
    checkpoint = open_checkpoint(model or str(fetch_default_model()))
    return merge(checkpoint, None, temporary / "checkpoint", dtype="bfloat16", progress=False)


if __name__ == "__main__":
    sys.exit(main())
