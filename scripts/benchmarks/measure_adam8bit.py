"""Compare AdamW with moments in 8 bits and AdamW in float32: loss curves, bytes of the state, and time of a step.

    python scripts/benchmarks/measure_adam8bit.py                        200 steps of SmolLM2-135M on its default data
    python scripts/benchmarks/measure_adam8bit.py --steps 50 --length 128 --model FOLDER

Method. There is one base model, quantised to NF4, and one random adapter on all linear layers. Both optimizers start from
that adapter and alternate: at each step both use the same packed batch, at a constant learning rate, with gradients clipped
to 0.3. No batch is used twice in an epoch. Losses are compared as means over windows of ten steps, because the curve matters
and not the noise of single batches:

    deviation = |mean of 8 bits - mean of float32| / mean of float32                 PASS if the largest is at most 1 %

Times are medians over all steps except the first of each optimizer, which compiles; the time of a step ends when its loss is
on the host. The last line of the output is the report as JSON. The exit code is 1 if the criterion fails.
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

from qlora_jax import cli
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import default_dtype, load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import PLAIN_ANSWERS, BatchIterator, batches, encode_all, load_records
from qlora_jax.errors import OptionError
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization
from qlora_jax.train import OptimizerName, create_state, jit_train_step, language_model_loss, optimizer, split

WINDOW = 10  # steps in one mean
MOST = 0.01  # largest deviation that passes
RUNS: tuple[OptimizerName, OptimizerName] = ("adamw", "adamw8bit")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare AdamW in 8 bits with AdamW in float32."""

    model: str | None = None
    """Folder, .gguf file or hub id of the model; SmolLM2-135M-Instruct if left out."""
    steps: int = 200
    """Steps of each optimizer."""
    minutes: float = 60.0
    """Stop after so many minutes, even if steps are left."""
    batch_size: int = 1
    """Rows in the batch of a step."""
    length: int = 256
    """Tokens in a row."""
    rank: int = LoRA.rank
    """Rank of the adapter."""
    learning_rate: float = 1e-3
    """Constant learning rate."""
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
    if arguments.steps < WINDOW:
        raise OptionError(f"--steps: expected at least {WINDOW}, found {arguments.steps}")
    name = arguments.model or str(fetch_default_model())
    source = _batches(name, arguments)
    lora = LoRA(rank=arguments.rank)
    remat = "dots" if jax.default_backend() == "cpu" else "full"
    model = load_model(open_checkpoint(name), quantization=Quantization(), method=lora, remat=remat, seed=arguments.seed)
    graphdef, adapter, frozen = split(model)
    states, steps = {}, {}
    for run in RUNS:
        tx = optimizer(run, arguments.learning_rate)
        states[run] = create_state(tx, jax.tree.map(jnp.copy, adapter), arguments.seed)
        steps[run] = jit_train_step(graphdef, tx, language_model_loss, states[run])
    losses: dict[str, list[float]] = {run: [] for run in RUNS}
    seconds: dict[str, list[float]] = {run: [] for run in RUNS}
    start = time.perf_counter()
    for number in range(arguments.steps):
        batch = {name: jnp.asarray(x)[None] for name, x in next(source).items()}
        for run in RUNS:
            before = time.perf_counter()
            states[run], metrics = steps[run](states[run], frozen, batch)
            losses[run].append(float(metrics["loss"]))
            seconds[run].append(time.perf_counter() - before)
        if (number + 1) % WINDOW == 0:
            means = ", ".join(f"{run} {np.mean(losses[run][-WINDOW:]):.4f}" for run in RUNS)
            print(f"steps {number + 2 - WINDOW} to {number + 1}: {means}", file=sys.stderr, flush=True)
        if time.perf_counter() - start > 60 * arguments.minutes and number + 1 >= WINDOW:
            break
    done = len(losses["adamw"]) // WINDOW * WINDOW
    means = {run: np.reshape(losses[run][:done], (-1, WINDOW)).mean(1) for run in RUNS}
    deviations = np.abs(means["adamw8bit"] - means["adamw"]) / means["adamw"]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    return {
        "model": name,
        "steps": len(losses["adamw"]),
        "tokens_a_step": arguments.batch_size * arguments.length,
        "rank": arguments.rank,
        "learning_rate": arguments.learning_rate,
        "dtype": str(np.dtype(default_dtype())),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "versions": {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "optax")},
        "parameters": parameters,
        "state_bytes": {run: _bytes(states[run].opt_state) for run in RUNS},
        "state_bytes_a_parameter": {run: _bytes(states[run].opt_state) / parameters for run in RUNS},
        "seconds_a_step": {run: statistics.median(seconds[run][1:]) for run in RUNS},
        "mean_losses": {run: [round(float(x), 5) for x in means[run]] for run in RUNS},
        "largest_deviation": float(deviations.max()),
        "passes": bool(deviations.max() <= MOST),
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table and as JSON."""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    print(f"{report['model']}, {report['dtype']}, rank {report['rank']}: {report['parameters']:,} trainable parameters")
    print(f"{report['steps']} steps of {report['tokens_a_step']} tokens on {report['device']}; {versions}")
    print(f"  {'':24} {RUNS[0]:>12} {RUNS[1]:>12}")
    rows = {
        "loss of the first ten": [report["mean_losses"][run][0] for run in RUNS],
        "loss of the last ten": [report["mean_losses"][run][-1] for run in RUNS],
        "bytes a parameter": [report["state_bytes_a_parameter"][run] for run in RUNS],
        "MiB of state": [report["state_bytes"][run] / 2**20 for run in RUNS],
        "seconds a step": [report["seconds_a_step"][run] for run in RUNS],
    }
    for name, (first, second) in rows.items():
        print(f"  {name:24} {first:12.3f} {second:12.3f}")
    verdict = "PASS" if report["passes"] else "FAIL"
    print(f"  largest deviation of a mean {report['largest_deviation']:.3%}, at most {MOST:.0%}: {verdict}")
    print(json.dumps(report))


def _batches(name: str, arguments: Arguments) -> BatchIterator:
    tokenizer = load_tokenizer(name, None)
    examples, _ = encode_all(load_records(PLAIN_ANSWERS, None), tokenizer, max_length=arguments.length)
    return batches(
        examples,
        batch_size=arguments.batch_size,
        length=arguments.length,
        pad_id=int(tokenizer.pad_token_id),  # pyright: ignore
        packing=True,
        seed=arguments.seed,
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())
