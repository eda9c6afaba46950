"""Measure the loading of a checkpoint: host memory compared with the size of the result, time, and bits per parameter.

    python scripts/benchmarks/measure_loading.py                  write 2 GB with the shapes of Llama-2-7B, load, remove
    python scripts/benchmarks/measure_loading.py --folder FOLDER  load a folder; write it first if it does not exist

Method. A checkpoint of random bfloat16 weights is streamed into sharded .safetensors files, with the layer shapes of a real
Llama and as many layers as the requested size needs. A new process imports everything, creates JAX's backend, compiles
nothing, and reads its anonymous resident memory: the baseline. It then loads and quantises the checkpoint, while a thread
reads RssAnon from /proc/self/status every few milliseconds. Only anonymous memory is counted, because pages of files
(libraries, the checkpoint in the page cache) can be dropped at any time and do not belong to the loader. The criterion:

    peak - baseline <= result + 2 x largest tensor

The result is the number of bytes of all leaves of the loaded model; the largest tensor is measured as stored in the file.
The peak includes what the compiler allocates, some 200 MiB, so that checkpoints whose largest tensor is smaller than that
cannot be measured in this way. The report also has VmHWM, the kernel's own maximum of all resident pages: no peak between
two samples was higher. On accelerators the result is in the memory of the device, so that the criterion says little. The
last line of the output is the report as JSON. The exit code is 1 if a criterion fails.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from qlora_jax import cli
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import OptionError
from qlora_jax.export.merge import merge
from qlora_jax.models import CausalLM
from qlora_jax.peft import LoRA
from qlora_jax.quant import DATA_TYPES, DataType, Quantization, QuantizedTensor

Model = Literal["llama-2-7b", "llama-3-8b", "tiny"]
SHAPES: dict[Model, dict[str, int]] = {
    "llama-2-7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
SHARD_BYTES = 500_000_000
# NF4 in blocks of 64 with double quantisation: 4 + 8/64 + 32/(64 * 256) = 4.127 bits, and 32 a matrix.
MOST_BITS = 4.13
MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the memory and time that loading a checkpoint takes."""

    folder: Path | None = None
    """Checkpoint to load, which is written first if it does not exist; a temporary one if left out."""
    shapes: Model = "llama-2-7b"
    """Layer shapes of the written checkpoint."""
    gigabytes: float = 2.0
    """Least size of the written checkpoint in 10^9 bytes; layers are added until it is reached."""
    data_type: DataType = DATA_TYPES[0]
    """Storage of the linear weights."""
    double_quantization: bool = True
    """Whether the scales are quantised too."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of dense weights, including the embedding; that of the platform if left out."""
    rank: int = 16
    """Rank of the adapter on all linear layers, which is part of the result; 0 for no adapter."""
    interval_ms: float = 2.0
    """Milliseconds between two samples."""
    stage: Literal["all", "write", "load"] = "all"
    """"all" writes the checkpoint, loads it in a separate process and removes temporary files; the others do one of both."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    return cli.run(run, Arguments, __doc__, arguments)


def run(arguments: Arguments) -> int:
    """Do the stages that are asked for; return 0 if all criteria hold, else 1."""
    if arguments.folder is None and arguments.stage != "all":
        raise OptionError(f"--stage {arguments.stage}: expected --folder")
    match arguments.folder, arguments.stage:
        case Path() as folder, "write":
            write_checkpoint(folder, arguments.shapes, arguments.gigabytes)
            return 0
        case Path() as folder, "load":
            report = measure(folder, arguments)
            print_report(report)
            return 0 if report["memory_passes"] and report["bits_pass"] is not False else 1
        case _:
            with tempfile.TemporaryDirectory(prefix="measure-loading-") as temporary:
                folder = arguments.folder or Path(temporary) / "checkpoint"
                if not folder.exists():
                    start = time.perf_counter()
                    write_checkpoint(folder, arguments.shapes, arguments.gigabytes)
                    print(f"wrote {folder} in {time.perf_counter() - start:.1f} s", flush=True)
                # After writing, the heap of a process has free pages that loading could use: load in a new process.
                loading = dataclasses.replace(arguments, folder=folder, stage="load")
                return subprocess.run([sys.executable, __file__, *flags(loading)], check=False).returncode


def flags(arguments: Arguments) -> list[str]:
    """Return the command line that gives these options."""
    found: list[str] = []
    for field in dataclasses.fields(arguments):
        value, name = getattr(arguments, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            found += [f"--{name}", str(value)]
    return found


def synthetic_checkpoint(shapes: Model, gigabytes: float, seed: int = 0) -> Checkpoint:
    """Return a checkpoint of random bfloat16 weights, each of which is drawn when it is read."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **SHAPES[shapes],
    }
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ends = {
        "model.embed_tokens": (vocabulary, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocabulary, hidden),
    }
    bytes_of = {name: 2 * int(np.prod(shape)) for name, shape in {**layer, **ends}.items()}
    missing = gigabytes * 1e9 - sum(bytes_of[name] for name in ends)
    layers = max(1, int(np.ceil(missing / sum(bytes_of[name] for name in layer))))
    config["num_hidden_layers"] = layers
    tensors = {f"{name}.weight": shape for name, shape in ends.items()}
    for index in range(layers):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}

    def read(name: str) -> np.ndarray:
        shape = tensors[name]
        if len(shape) == 1:
            return np.ones(shape, ml_dtypes.bfloat16)
        generator = np.random.default_rng([seed, list(tensors).index(name)])
        tensor = np.empty(int(np.prod(shape)), ml_dtypes.bfloat16)
        for start in range(0, tensor.size, 2**22):  # so that few float32 values are in memory at once
            part = tensor[start : start + 2**22]
            part[:] = generator.standard_normal(part.size, np.float32) * np.float32(shape[1] ** -0.5)
        return tensor.reshape(shape)

    return Checkpoint(f"synthetic {shapes}", config, tensors, read)


def write_checkpoint(folder: Path, shapes: Model, gigabytes: float, shard_bytes: int = SHARD_BYTES) -> None:
    """Stream a synthetic checkpoint into a sharded Hugging Face folder."""
    merge(synthetic_checkpoint(shapes, gigabytes), None, folder, shard_bytes=shard_bytes)


def status(field: str) -> int:
    """Return a memory field of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: has no field {field}; Linux 4.5 or later is needed")


@contextmanager
def sampling(interval: float) -> Iterator[list[int]]:
    """Sample the anonymous resident bytes of this process every `interval` seconds inside the context."""
    samples = [status("RssAnon")]
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            samples.append(status("RssAnon"))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
        samples.append(status("RssAnon"))


def measure(folder: Path, arguments: Arguments) -> dict[str, Any]:
    """Load a checkpoint and return the report. It must be the first work of its process."""
    devices = jax.devices()  # creates the backend
    checkpoint = open_checkpoint(str(folder))
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    sizes: dict[str, int] = {}

    def read(name: str) -> np.ndarray:
        tensor = checkpoint.read(name)
        sizes[name] = tensor.nbytes
        return tensor

    baseline = status("RssAnon")
    start, start_cpu = time.perf_counter(), time.process_time()
    with sampling(arguments.interval_ms / 1000) as samples:
        model = load_model(
            dataclasses.replace(checkpoint, read=read),
            quantization=Quantization(arguments.data_type, double_quantization=arguments.double_quantization),
            method=LoRA(rank=arguments.rank) if arguments.rank else None,
            dtype=arguments.dtype,
            progress=False,
        )
        assert isinstance(model, CausalLM)
        leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    quantized = [
        leaf
        for leaf in jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
        if isinstance(leaf, QuantizedTensor)
    ]
    result = sum(leaf.nbytes for leaf in leaves)
    largest = max(sizes.values())
    peak = max(samples) - baseline
    parameters = sum(int(np.prod(tensor.shape)) for tensor in quantized)
    bits = 8 * sum(tensor.nbytes for tensor in quantized) / parameters
    promised = arguments.double_quantization  # without it a block of 64 takes 4.5 bits a value by definition
    return {
        "checkpoint": checkpoint.name if arguments.folder is None else folder.name,
        "file_bytes": file_bytes,
        "tensors": len(sizes),
        "platform": devices[0].platform,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "dtype": str(model.embed_tokens.weight.dtype),
        "result_bytes": result,
        "largest_tensor_bytes": largest,
        "baseline_bytes": baseline,
        "peak_above_baseline_bytes": peak,
        "allowed_bytes": result + 2 * largest,
        "after_loading_bytes": samples[-1] - baseline,
        "peak_resident_bytes": status("VmHWM"),
        "samples": len(samples),
        "memory_passes": peak <= result + 2 * largest,
        "linear_parameters": parameters,
        "bits_per_parameter": bits,
        "bits_pass": bits <= MOST_BITS if promised else None,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "megabytes_per_second": file_bytes / seconds / 1e6,
    }


def print_report(report: dict[str, Any]) -> None:
    """Print the report as a table with its criteria, and as JSON."""

    def mebibytes(name: str) -> str:
        return f"{report[name] / MEBIBYTE:,.1f} MiB"

    print(
        f"{report['checkpoint']}: {report['tensors']} tensors, {report['file_bytes'] / 1e9:.2f} GB; dense "
        f"weights in {report['dtype']}; {report['platform']}, {report['cores']} cores, load average "
        f"{report['load_average']:.1f}, jax {report['jax']}"
    )
    rows = {
        "result, all leaves": mebibytes("result_bytes"),
        "largest tensor, as stored": mebibytes("largest_tensor_bytes"),
        "allowed: result + 2 x largest": mebibytes("allowed_bytes"),
        "peak above baseline (RssAnon)": mebibytes("peak_above_baseline_bytes"),
        "after loading, above baseline": mebibytes("after_loading_bytes"),
        "baseline (RssAnon)": mebibytes("baseline_bytes"),
        "VmHWM, all resident pages": mebibytes("peak_resident_bytes"),
        "samples": f"{report['samples']:,}",
        "bits a linear parameter": f"{report['bits_per_parameter']:.4f}",
        "time": f"{report['seconds']:.1f} s, {report['cpu_seconds']:.1f} s of CPU",
        "speed": f"{report['megabytes_per_second']:.0f} MB/s of the file",
    }
    for name, value in rows.items():
        print(f"  {name:31} {value:>26}")
    verdict = {True: "PASS", False: "FAIL", None: "not claimed without double quantisation"}
    print(f"  peak <= result + 2 x largest tensor: {verdict[report['memory_passes']]}")
    print(f"  bits a linear parameter <= {MOST_BITS}: {verdict[report['bits_pass']]}")
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(main())
