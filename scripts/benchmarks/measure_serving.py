"""Measure the throughput of the serving engine, without HTTP: many tenants in one batch against one tenant and none.

    python scripts/benchmarks/measure_serving.py                                    the default model
    python scripts/benchmarks/measure_serving.py --model FOLDER --peft-requests 2   and transformers with PEFT

    base    `rows` requests at once to a model without a bank of adapters
    one     the same number to one adapter
    mixed   the same number, each to an adapter of its own
    alone   requests to adapters of their own, one after another, in the same engine
    peft    the same with transformers and PEFT, `set_adapter` before each, in the same dtype, with a dense base

Every request has a prompt of its own of random tokens, so that no beginning is shared, and is answered greedily. Adapters
are LoRA of random values on all linear layers. The ways take turns in each round, after one round that is not counted. The
figures are medians over the rounds of tokens of answers per second, prompts included, and per CPU-second of the process,
which depends less on what else the machine does. The seconds to the first token, from when all requests are there, and from
one token to the next are those of `mixed`. The last line is JSON.
"""

import dataclasses
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax import cli
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.load import default_dtype
from qlora_jax.errors import OptionError
from qlora_jax.peft.bank import Bank, split_bank
from qlora_jax.serve.adapter_slots import AdapterSlots
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.request import Choices, Request
from qlora_jax.serve.scheduler import Limits


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the serving engine."""

    model: str | None = None
    """A folder of a model; by default the default model."""
    rows: int = 16
    """Requests at a time, and adapters."""
    rank: int = 16
    """Of the adapters."""
    prompt_tokens: int = 16
    """Tokens of a prompt."""
    new_tokens: int = 64
    """Tokens of an answer."""
    capacity: int = 512
    """Most tokens of a prompt and its answer that the engine has room for."""
    chunk: int = 256
    """Tokens of prompts that the engine processes at a time."""
    rounds: int = 3
    """Rounds that are counted."""
    alone_requests: int = 4
    """Requests one after another in each round."""
    peft_requests: int = 0
    """Requests to transformers and PEFT in each round; they need --model FOLDER."""
    temperature: float = 0.0
    """Of the draws; 0 is greedy."""
    top_p: float | None = None
    """Of the draws."""


@dataclasses.dataclass
class Way:
    """The rates of one way, round by round, and the seconds between tokens if it is measured."""

    run: Callable[[int], int]
    per_second: list[float] = dataclasses.field(default_factory=list)
    per_cpu_second: list[float] = dataclasses.field(default_factory=list)

    def measure(self, round: int) -> None:
        """Run one round; round 0 is not counted."""
        start, cpu = time.perf_counter(), time.process_time()
        tokens = self.run(round)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        if round:
            self.per_second.append(tokens / seconds)
            self.per_cpu_second.append(tokens / cpu)


@dataclasses.dataclass
class Latencies:
    """Seconds to first tokens and between tokens."""

    first: list[float] = dataclasses.field(default_factory=list)
    between: list[float] = dataclasses.field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print the throughput of each way."""
    if arguments.peft_requests and arguments.model is None:
        raise OptionError("--peft-requests: expected --model FOLDER, which transformers can read")
    latencies = Latencies()
    base, banked = engine_of(arguments, bank=False), engine_of(arguments, bank=True)
    names = [f"tenant-{index}" for index in range(arguments.rows)]
    alone = names[: arguments.alone_requests]
    ways = {
        "base": Way(lambda round: answer(base, requests_of(arguments, [""] * arguments.rows, round))),
        "one": Way(lambda round: answer(banked, requests_of(arguments, names[:1] * arguments.rows, round))),
        "mixed": Way(lambda round: answer(banked, requests_of(arguments, names, round), latencies if round else None)),
        "alone": Way(lambda round: sum(answer(banked, [one]) for one in requests_of(arguments, alone, round))),
    }
    if arguments.peft_requests:
        ways["peft"] = Way(peft_way(arguments))
    for round in range(arguments.rounds + 1):
        for name, way in ways.items():
            way.measure(round)
            if round:
                print(
                    f"round {round} {name:6} {way.per_second[-1]:8.1f} tokens/s {way.per_cpu_second[-1]:8.1f} /CPU-s",
                    flush=True,
                )
    report(arguments, ways, latencies)


def report(arguments: Arguments, ways: dict[str, Way], latencies: Latencies) -> None:
    """Print the medians and their ratios, and all of them as JSON."""
    found: dict[str, Any] = {
        name: [statistics.median(way.per_second), statistics.median(way.per_cpu_second)] for name, way in ways.items()
    }
    ratios = {
        f"{over}/{under}": [found[over][index] / found[under][index] for index in (0, 1)]
        for over, under in (("mixed", "one"), ("mixed", "base"), ("mixed", "alone"), ("mixed", "peft"))
        if under in found
    }
    seconds = {
        name: {"median": float(np.median(values)), "p99": float(np.quantile(values, 0.99))}
        for name, values in dataclasses.asdict(latencies).items()
    }
    packages = ("qlora-jax", "jax", "jaxlib", "flax", *(("torch", "transformers", "peft") if "peft" in ways else ()))
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f}"
    print(device + "".join(f"; {name} {version}" for name, version in versions.items()))
    for name, (rate, cpu) in found.items():
        print(f"{name:14} {rate:8.1f} tokens/s {cpu:8.1f} tokens/CPU-s")
    for name, (rate, cpu) in ratios.items():
        print(f"{name:14} {rate:8.2f}          {cpu:8.2f}")
    for name, of_name in seconds.items():
        print(f"{name:14} {of_name['median']:8.3f} s median {of_name['p99']:8.3f} s p99")
    machine = {"device": device, "versions": versions}
    print(json.dumps({**dataclasses.asdict(arguments), **machine, "rates": found, "ratios": ratios, "seconds": seconds}))


def engine_of(arguments: Arguments, *, bank: bool) -> Engine:
    """Return an engine with all programs compiled; with a bank, its adapters are in their slots."""
    dtype, rows = default_dtype(), arguments.rows
    method = Bank(rows + 1, arguments.rank, dtype) if bank else None
    pretrained = open_pretrained(arguments.model, method=method, dtype=dtype)
    model = pretrained.load(progress=False)
    limits = Limits(rows=rows, capacity=arguments.capacity, chunk=arguments.chunk)
    adapters = None
    if bank:
        leaves = jax.eval_shape(lambda: split_bank(model)[1])

        def load(seed: int) -> Any:
            draws = np.random.default_rng(seed)
            return jax.tree.map(
                lambda leaf: draws.normal(0, 0.01, (leaf.shape[0], *leaf.shape[2:])).astype(np.float32), leaves
            )

        adapters = AdapterSlots(rows + 1, load, held=rows)
        for index in range(rows):
            adapters.register(f"tenant-{index}", index)
    vocabulary = pretrained.checkpoint.model_config.vocab_size
    engine = Engine(*nnx.split(model), limits=limits, vocabulary=vocabulary, adapters=adapters)
    engine.warm_up()
    return engine


def requests_of(arguments: Arguments, names: Sequence[str], round: int) -> list[Request]:
    """Return a request for each name, with prompts that no other round has."""
    draws = np.random.default_rng(round)
    choices = Choices(temperature=arguments.temperature, top_p=arguments.top_p)
    return [
        Request(
            tuple(draws.integers(3, 1000, arguments.prompt_tokens).tolist()),
            arguments.new_tokens,
            dataclasses.replace(choices, seed=index),
            adapter=name,
            tenant=name,
        )
        for index, name in enumerate(names)
    ]


def answer(engine: Engine, requests: Sequence[Request], latencies: Latencies | None = None) -> int:
    """Answer requests that come at once; return the number of tokens of their answers."""
    start, tokens = time.perf_counter(), 0
    last = {engine.submit(request): start for request in requests}
    seen: set[int] = set()
    while engine.busy:
        for event in engine.step():
            tokens += len(event.tokens)
            if event.tokens and latencies is not None:
                now = time.perf_counter()
                (latencies.between if event.ticket in seen else latencies.first).append(now - last[event.ticket])
                last[event.ticket] = now
                seen.add(event.ticket)
    return tokens


def peft_way(arguments: Arguments) -> Callable[[int], int]:
    """Return the way of transformers and PEFT, with a model in memory that has all adapters."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(Path(arguments.model or ""), dtype=torch.float32)
    config = peft.LoraConfig(r=arguments.rank, target_modules="all-linear", lora_dropout=0.0)
    model: Any = peft.get_peft_model(base, config, adapter_name="tenant-0")
    names = [f"tenant-{index}" for index in range(arguments.peft_requests)]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def run(round: int) -> int:
        tokens = 0
        for request in requests_of(arguments, names, round):
            model.set_adapter(request.adapter)
            prompt = torch.tensor([request.prompt])
            with torch.inference_mode():
                ids = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=False,
                    min_new_tokens=arguments.new_tokens,
                    max_new_tokens=arguments.new_tokens,
                    pad_token_id=0,
                )
            tokens += ids.shape[1] - prompt.shape[1]
        return tokens

    return run


if __name__ == "__main__":
    sys.exit(main())
