"""What a QLoRA run needs in memory: its training step, compiled for a device that need not be attached.

    python scripts/plan.py --model llama-3-8b --rank 16 --batch-size 4 --length 2048
    python scripts/plan.py --model llama-65b --rank 64 --batch-size 1 --length 512 --host-optimizer
    python scripts/plan.py --model path/or/hub-id …
    python scripts/plan.py --objective dpo --batch-size 2     as much as --batch-size 4 learns: the reference has no weights

The step is the one that scripts/train.py runs: 4-bit base, bfloat16 activations, float32 LoRA on all linear
layers, AdamW. Nothing is estimated: the figures are those of XLA's buffer assignment for the device. The last
line is JSON.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

# The plan runs nothing on a device: an accelerator that is attached here stays free.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import tyro

from qlora_jax.checkpoint.source import CheckpointError, open_checkpoint
from qlora_jax.models import DecoderConfig, Remat, causal_family_of
from qlora_jax.nn import LoRA
from qlora_jax.plan import (
    SIZES,
    CompilerMissing,
    Plan,
    PlannedObjective,
    check_compiler,
    compile_train_step,
    device_named,
)
from qlora_jax.quant import DataType, Quantization

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a QLoRA run needs in memory, from the real compiler."""

    model: str = "llama-3-8b"
    """A size by name (see qlora_jax/plan/sizes.py), a folder, config.json, .gguf file or hub id."""
    rank: int = 64
    """LoRA rank, on all linear layers."""
    dropout: float = LoRA.dropout
    """Share of the adapter's inputs that is zeroed; its masks take memory too."""
    data_type: DataType | Literal["dense"] = "nf4"
    """What the linear layers are stored in."""
    block_size: int = 64
    """Values that share a scale."""
    double_quantization: bool = True
    """Whether the scales are quantised as well."""
    objective: PlannedObjective = "sft"
    """sft: answers; dpo: preference pairs, against the base as the reference."""
    batch_size: int = 1
    """Sequences in a micro-batch; pairs of them for dpo."""
    length: int = 512
    """Tokens in a sequence."""
    micro_batches: int = 1
    """Micro-batches whose gradients are added up in a step."""
    segment_ids: bool = True
    """Whether batches say which document each token belongs to, as those of scripts/train.py do where they are packed;
    pairs never are."""
    remat: Remat = "full"
    """What the backward pass recomputes; "offload" keeps the inputs of the layers in host memory."""
    host_optimizer: bool = False
    """Whether the optimizer's state lives in host memory."""
    host_adapter: bool = False
    """Whether the adapter and its gradient live in host memory too."""
    device: str = "h100"
    """The device to compile for."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        run(arguments)
    except (CompilerMissing, ValueError, OSError) as error:  # CheckpointError is a ValueError
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: Arguments) -> None:
    device = device_named(arguments.device)
    check_compiler(device)  # before anything is downloaded or traced
    for name in ("batch_size", "length", "micro_batches"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(arguments, name)}")
    hf_config = read_config(arguments.model)
    config = causal_family_of(hf_config).config(hf_config)
    assert isinstance(config, DecoderConfig)
    quantization = (
        None
        if arguments.data_type == "dense"
        else Quantization(arguments.data_type, arguments.block_size, arguments.double_quantization)
    )
    plan = compile_train_step(
        config,
        quantization=quantization,
        lora=LoRA(rank=arguments.rank, dropout=arguments.dropout),
        batch_size=arguments.batch_size,
        length=arguments.length,
        micro_batches=arguments.micro_batches,
        remat=arguments.remat,
        host_optimizer=arguments.host_optimizer,
        host_adapter=arguments.host_adapter,
        device=device,
        segment_ids=arguments.segment_ids,
        objective=arguments.objective,
    )
    print(table(plan, device.memory_bytes))
    result = {
        "method": "XLA buffer assignment of the compiled train step; GEMMs not autotuned",
        "run": dataclasses.asdict(arguments),
        **dataclasses.asdict(plan),
        "peak": plan.peak,
        "host_peak": plan.host_peak,
    }
    print(json.dumps(result))


def read_config(model: str) -> dict[str, Any]:
    """The config.json that a size, a path or a hub id stands for; no weights are read or downloaded.

    Raises:
        CheckpointError: there is none.
    """
    if model in SIZES:
        return SIZES[model]
    path = Path(model).expanduser()
    if path.suffix.lower() == ".gguf":
        return open_checkpoint(model).config
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        if "/" not in model:  # a size misspelt: do not go and ask the hub for it
            raise CheckpointError(f"--model {model}: no such path, and no size by that name: {', '.join(SIZES)}")
        path = _config_from_hub(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _config_from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json"))
    # Any of the hub's own errors, or of the HTTP client beneath it, which changes with its version.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"--model {model}: no such path, and no hub id that can be read "
            f"({type(error).__name__}: {reason}); sizes by name: {', '.join(SIZES)}"
        ) from error


def table(plan: Plan, device_bytes: int) -> str:
    """The plan in GiB, a row a kind."""
    rows = [
        ("weights in 4 bits", plan.packed_weights),
        ("other frozen weights", plan.dense_weights),
        ("adapter", plan.adapter),
        ("optimizer", plan.optimizer),
        ("temporaries", plan.temporaries),
        ("peak", plan.peak),
        ("host memory", plan.host_peak),
        ("  of it optimizer", plan.host_optimizer),
    ]
    lines = [f"{plan.device} ({device_bytes / GIB:.1f} GiB), GiB:"]
    lines += [f"  {name:22s}{size / GIB:10.3f}" for name, size in rows]
    verdict = "fits" if plan.peak <= device_bytes else "does not fit"
    return "\n".join([*lines, f"{verdict}; compiled in {plan.compile_seconds:.1f} s"])


if __name__ == "__main__":
    sys.exit(main())
