"""Measure the gain of packing: real tokens per second with padded rows of one example, and with packed rows of several.

    python scripts/benchmarks/measure_packing.py conversations.jsonl        SmolLM2-135M, 5 steps of 2 × 512 tokens of each
    python scripts/benchmarks/measure_packing.py FILE --model FOLDER --length 1024 --batch-size 4 --steps 20

Method. There is one base model, quantised to NF4, and one adapter on all linear layers. Padded and packed steps alternate in
one process, with the inputs that training gives them: packed rows with segment masks and positions, padded rows without,
because their padding is at the end. Times are medians over all steps except the first of each kind, which compiles; the time
of a step ends when its loss is on the host.

    tokens a second = (1 - padding share) · rows · length / seconds a step           real tokens; shares of a whole epoch
    predicted ratio = (1 - padding share, packed) / (1 - padding share, padded)       if both kinds of rows take equally long
    measured ratio  = tokens a second, packed / tokens a second, padded               PASS within 10 % of the predicted one

The last line of the output is the report as JSON. The exit code is 1 if the criterion fails.
"""

import dataclasses
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import default_dtype, load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import BatchIterator, Example, batches, encode_all, open_source, padding_share
from qlora_jax.errors import OptionError
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import create_state, jit_train_step, language_model_loss, optimizer, split

MOST = 0.1  # largest deviation of the measured ratio from the predicted one
RUNS = ("padded", "packed")
PACKED_ONLY = ("segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare packed rows with padded ones."""

    data: tyro.conf.Positional[str]
    """JSONL, JSON, CSV, TSV or Parquet file, or hub id, of the training data."""
    model: str | None = None
    """Folder, .gguf file or hub id of the model; SmolLM2-135M-Instruct if left out."""
    split: str | None = None
    """Split of a hub data set."""
    steps: int = 5
    """Measured steps of each kind."""
    batch_size: int = 2
    """Rows in the batch of a step."""
    length: int = 512
    """Tokens in a row; longer examples are truncated."""
    rank: int = LoRA.rank
    """Rank of the adapter."""
    seed: int = 0
    """Seed of the adapter and of the order of the data."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Measure, print the report and return 0 if the criterion holds, else 1."""
    report = measure(arguments)
    print_report(report)
    return 0 if report["passes"] else 1


def measure(arguments: Arguments) -> dict[str, Any]:
    """Measure and return the report."""
    for option in ("steps", "batch_size"):
        if (value := getattr(arguments, option)) < 1:
            raise OptionError(f"--{option.replace('_', '-')}: expected at least 1, found {value}")
    name = arguments.model or str(fetch_default_model())
    tokenizer = load_tokenizer(name)
    records = open_source(arguments.data, arguments.split).records
    examples, _ = encode_all(records, tokenizer, max_length=arguments.length)
    shares = {run: padding_share(examples, arguments.length, packing=run == "packed", seed=arguments.seed) for run in RUNS}
    sources = {run: _batches(examples, run, int(tokenizer.pad_token_id), arguments) for run in RUNS}  # pyright: ignore
    seconds, losses = _train(name, sources, arguments)
    places = arguments.batch_size * arguments.length
    medians = {run: statistics.median(seconds[run]) for run in RUNS}
    tokens = {run: (1 - shares[run]) * places / medians[run] for run in RUNS}
    predicted = (1 - shares["packed"]) / (1 - shares["padded"])
    measured = tokens["packed"] / tokens["padded"]
    return {
        "model": name,
        "data": arguments.data,
        "examples": len(examples),
        "tokens": sum(len(example) for example in examples),
        "rows": arguments.batch_size,
        "length": arguments.length,
        "steps": arguments.steps,
        "rank": arguments.rank,
        "dtype": str(np.dtype(default_dtype())),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
        "padding_share": shares,
        "seconds": seconds,
        "seconds_a_step": medians,
        "tokens_per_second": tokens,
        "mean_loss": {run: float(np.mean(losses[run])) for run in RUNS},
        "measured_ratio": measured,
        "predicted_ratio": predicted,
        "deviation": abs(measured / predicted - 1),
        "passes": abs(measured / predicted - 1) <= MOST,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table and as JSON."""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    print(f"{report['data']}: {report['examples']:,} examples, {report['tokens']:,} tokens")
    print(f"{report['model']}, {report['dtype']}, rank {report['rank']} on {report['device']}; {versions}")
    print(f"{report['steps']} steps of {report['rows']} × {report['length']} tokens of each kind")
    print(f"  {'':24} {RUNS[0]:>12} {RUNS[1]:>12}")
    for label, name in (
        ("padding share", "padding_share"),
        ("seconds a step", "seconds_a_step"),
        ("real tokens a second", "tokens_per_second"),
    ):
        print(f"  {label:24} {report[name]['padded']:12.3f} {report[name]['packed']:12.3f}")
    print(f"  ratio measured {report['measured_ratio']:.3f}, predicted {report['predicted_ratio']:.3f}")
    verdict = "PASS" if report["passes"] else "FAIL"
    print(f"  deviation {report['deviation']:.1%}, at most {MOST:.0%}: {verdict}")
    print(json.dumps(report))


def _train(name: str, sources: dict[str, BatchIterator], arguments: Arguments) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the seconds of each measured step and the losses of all steps, by kind."""
    remat = "dots" if jax.default_backend() == "cpu" else "full"
    lora = LoRA(rank=arguments.rank)
    model = load_model(open_checkpoint(name), quantization=Quantization(), method=lora, remat=remat, seed=arguments.seed)
    graphdef, adapter, frozen = split(model)
    tx = optimizer("adamw", 1e-4)
    state = create_state(tx, adapter, arguments.seed)
    step = jit_train_step(graphdef, tx, language_model_loss, state)
    seconds: dict[str, list[float]] = {run: [] for run in RUNS}
    losses: dict[str, list[float]] = {run: [] for run in RUNS}
    for number in range(arguments.steps + 1):
        for run in RUNS:
            unneeded = () if run == "packed" else PACKED_ONLY
            batch = {key: jnp.asarray(x)[None] for key, x in next(sources[run]).items() if key not in unneeded}
            before = time.perf_counter()
            state, metrics = step(state, frozen, batch)
            losses[run].append(float(metrics["loss"]))
            if number:
                seconds[run].append(time.perf_counter() - before)
    return seconds, losses


def _batches(examples: list[Example], run: str, pad_id: int, arguments: Arguments) -> BatchIterator:
    return batches(
        examples,
        batch_size=arguments.batch_size,
        length=arguments.length,
        pad_id=pad_id,
        packing=run == "packed",
        seed=arguments.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
