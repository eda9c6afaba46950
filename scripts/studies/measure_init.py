"""Measure how far a model is from its original weights before training, in 4 bits and with several initializations.

    python scripts/studies/measure_init.py                               SmolLM2-135M, r 16
    python scripts/studies/measure_init.py --rank 64 --turns 1 5         another rank; LoftQ of one and of five turns
    OPENBLAS_NUM_THREADS=1 python scripts/studies/measure_init.py        for a CPU that other programs use, where threads
                                                                         that wait for each other make it many times slower

The initializations are 4 bits alone, adapters that are initialized from the weights (PiSSA, LoftQ), and DoRA, which does not
exactly reproduce the weights. For every linear layer, the error is |W - (Q + s A B)| / |W| in Frobenius norms, where W is
the matrix of the checkpoint and Q, A and B are those of the loaded model; for DoRA it is |DoRA - Q| / |W|, where DoRA is the
matrix with which the new layer multiplies. The last columns count the layers in which the error is smaller than that of 4
bits alone. Then the logits of some sentences are compared with those of the dense model, by the mean of their absolute
difference. The last line is JSON, with each layer.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qlora_jax import cli
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.export.drift import logit_drift, sample_logits
from qlora_jax.models import Model, linear_mappings
from qlora_jax.nn import Linear
from qlora_jax.peft import DoRALinear, LoRA, LowRankAdapter
from qlora_jax.quant import DataType, Quantization, QuantizedTensor, dequantize

TEXTS = (
    "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer: 40 miles per hour.",
    "Water boils at 100 degrees Celsius at sea level, where the pressure of the air is one atmosphere.",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Options of the measurement."""

    model: str | None = None
    """Folder, .gguf file or hub id; SmolLM2-135M-Instruct if left out."""
    rank: int = 16
    """Rank of the adapters; alpha has the same value."""
    turns: tuple[int, ...] = (1, 5)
    """Numbers of turns of LoftQ."""
    data_type: DataType = "nf4"
    """Storage of the linear layers of the base."""
    double_quantization: bool = True
    """Whether its scales are quantised too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(measure, Arguments, __doc__, arguments)


def measure(arguments: Arguments) -> None:
    """Print a row for each way to store the base and to initialise the adapter."""
    source = arguments.model or str(fetch_default_model())
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    batches = [np.asarray([tokenizer(text)["input_ids"]], np.int32) for text in TEXTS]
    quantization = Quantization(arguments.data_type, double_quantization=arguments.double_quantization)
    lora = LoRA(rank=arguments.rank, alpha=float(arguments.rank))
    methods: dict[str, LoRA | None] = {
        "4 bits": None,
        "DoRA": dataclasses.replace(lora, use_dora=True),
        "PiSSA": dataclasses.replace(lora, init_lora_weights="pissa"),
        "PiSSA, 4 iterations": dataclasses.replace(lora, init_lora_weights="pissa_niter_4"),
    }
    for turns in arguments.turns:
        methods[f"LoftQ, {turns}"] = dataclasses.replace(lora, init_lora_weights="loftq", loftq_iter=turns)
    exact = sample_logits(load_model(checkpoint, quantization=None, dtype=jnp.float32), batches)
    rows: list[dict[str, Any]] = []
    for name, method in methods.items():
        start = time.perf_counter()
        model = load_model(checkpoint, quantization=quantization, method=method, dtype=jnp.float32)
        seconds = time.perf_counter() - start
        errors = layer_errors(checkpoint, model)
        drift = logit_drift(exact, sample_logits(model, batches))
        rows.append({"start": name, "seconds": seconds, "logits": drift.mean, "errors": errors})
        plain = rows[0]["errors"]
        smaller = sum(errors[layer] < plain[layer] for layer in errors)
        mean, worst = float(np.mean([*errors.values()])), max(errors.values())
        print(
            f"{name:20s} error mean {mean:.5f}, largest {worst:.5f}; smaller in {smaller} of {len(errors)} layers; "
            f"logits {drift.mean:.4f}; {seconds:.0f} s",
            flush=True,
        )
    for layer in rows[0]["errors"]:
        print(f"{layer:44s} " + "  ".join(f"{row['start']} {row['errors'][layer]:.5f}" for row in rows))
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": platform.python_version()}
    described = dataclasses.asdict(arguments) | {"model": source, "device": jax.devices()[0].device_kind}
    print(json.dumps({"arguments": described, "versions": versions, "rows": rows}))


def layer_errors(checkpoint: Checkpoint, model: Model) -> dict[str, float]:
    """Return the relative error of each linear layer by its name; one dense matrix at a time is in memory."""
    errors = {}
    dora = model.method is not None and model.method.use_dora
    for key in tqdm([*linear_mappings(model.config.parameter_mappings)], desc="comparing", leave=False):
        layer: Any = model
        for part in key.path[:-1]:
            layer = getattr(layer, part)
        for number, name in enumerate(key.names()):
            w = np.asarray(checkpoint.read(name), np.float32).T
            q, effective = effective_matrix(layer, number)
            error = effective - (q if dora else w)
            errors[name.removesuffix(".weight")] = float(np.linalg.norm(error) / np.linalg.norm(w))
    return errors


def effective_matrix(layer: Linear, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the dequantised matrix of layer `number` of a stack, and the matrix with which it multiplies, `[in, out]`."""
    weight, adapter = jax.tree.map(lambda leaf: leaf[number], layer.weight.get_value()), layer.adapter
    q = np.asarray(dequantize(weight, jnp.float32) if isinstance(weight, QuantizedTensor) else weight)
    if not isinstance(adapter, LowRankAdapter):
        return q, q
    a, b = (np.asarray(variable[...][number]) for variable in (adapter.lora_a, adapter.lora_b))
    v = q + adapter.spec.scalings[number] * (a @ b)
    if isinstance(adapter, DoRALinear):
        m = np.asarray(adapter.weight_norm[...][number] + adapter.lora_magnitude[...][number])
        v = v * (m / np.linalg.norm(v, axis=0))[None]
    return q, v


if __name__ == "__main__":
    sys.exit(main())
