"""Flags, timing loops and the final JSON line of the workers of scripts/benchmarks/bench.py.

    train     steps on random tokens of one seed; the time goes from the tokens on the host to the loss on the host
    answer    greedy continuations of one prompt, with the time at which each token is on the host (a mark)

        prefill = first mark - start        a token = (last mark - first mark) / (marks - 1)

`start_seconds` is the time from the first line of the program to the end of the first step or to the first token. It
includes imports, reading and quantising the checkpoint, and compiling or allocating.

Only the standard library and NumPy are used here, because the interpreter of every peer has them.
"""

import argparse
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

BEGAN = time.perf_counter()


def parser_of(description: str | None, numbers: Sequence[str]) -> argparse.ArgumentParser:
    """Return a parser with a checkpoint folder, a compute dtype, and a number for each name."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True, help="compute dtype")
    for name in numbers:
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser


def train_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of workers that train."""
    return parser_of(description, ("batch-size", "length", "rank", "steps", "warmup"))


def answer_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of workers that decode."""
    parser = parser_of(description, ("batch-size", "new-tokens", "answers"))
    parser.add_argument("--storage", choices=("nf4", "dense"), required=True, help="storage of the linear layers")
    parser.add_argument("--prompt", type=json.loads, required=True, help="token ids as JSON")
    return parser


def parse_train(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check the flags of a worker that trains."""
    arguments = parser.parse_args()
    if arguments.warmup < 1:
        parser.error("--warmup: expected at least 1, the step that compiles or allocates")
    return arguments


def train(step: Callable[[np.ndarray], float], vocabulary: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the times of the steps after the warm-up, and all losses; `step` takes tokens `[b, t]` and returns the loss."""
    generator = np.random.default_rng(0)
    shape = (arguments.batch_size, arguments.length)
    seconds, cpu_seconds, losses, start_seconds = [], [], [], 0.0
    for number in range(arguments.warmup + arguments.steps):
        tokens = generator.integers(0, vocabulary, shape, dtype=np.int32)
        start, start_cpu = time.perf_counter(), time.process_time()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - start_cpu)
        if number == 0:
            start_seconds = time.perf_counter() - BEGAN
    return {
        "step_seconds": seconds[arguments.warmup :],
        "step_cpu_seconds": cpu_seconds[arguments.warmup :],
        "first_step_seconds": seconds[0],
        "start_seconds": start_seconds,
        "losses": losses,
    }


def answer(generate: Callable[[Callable[[], None]], Sequence[int]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the times of the answers after the first, and the tokens.

    `generate` calls its argument once for each token of a row.
    """
    prefill, decoding, cpu, start_seconds, tokens = [], [], [], 0.0, []
    for number in range(1 + arguments.answers):
        marks, cpu_marks = [], []

        def mark(marks: list[float] = marks, cpu_marks: list[float] = cpu_marks) -> None:
            marks.append(time.perf_counter())
            cpu_marks.append(time.process_time())

        start = time.perf_counter()
        tokens = list(generate(mark))
        if len(marks) != arguments.new_tokens or len(tokens) != arguments.new_tokens:
            sys.exit(f"expected {arguments.new_tokens} tokens, found {len(marks)} marks and {len(tokens)} tokens")
        if number == 0:  # this answer includes compilation or allocation
            start_seconds = marks[0] - BEGAN
            continue
        prefill.append(marks[0] - start)
        decoding.append((marks[-1] - marks[0]) / (len(marks) - 1))
        cpu.append((cpu_marks[-1] - cpu_marks[0]) / (len(marks) - 1))
    return {
        "prefill_seconds": prefill,
        "token_seconds": decoding,
        "token_cpu_seconds": cpu,
        "start_seconds": start_seconds,
        "tokens": tokens,
    }


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of these packages."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def report(found: dict[str, Any], **more: Any) -> None:
    """Print the JSON line."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**found, "peak_resident_bytes": peak, **more}))


def jax_device() -> dict[str, Any]:
    """Return the name of JAX's device and its peak of memory; None for a CPU."""
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu":
        return {"device": None, "peak_device_bytes": None}
    statistics = device.memory_stats() or {}
    return {"device": device.device_kind, "peak_device_bytes": statistics.get("peak_bytes_in_use")}


def torch_device() -> dict[str, Any]:
    """Return the name of PyTorch's GPU and its peak of memory; None for a CPU."""
    import torch

    if not torch.cuda.is_available():
        return {"device": None, "peak_device_bytes": None}
    return {"device": torch.cuda.get_device_name(), "peak_device_bytes": torch.cuda.max_memory_allocated()}
