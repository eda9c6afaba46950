"""Worker: compare the compiled plan of a training step on this CPU with its measured resident memory.

    1. The step is compiled from shapes, before any weight is read:
           planned = arguments + temporaries + outputs - outputs in donated arguments
    2. The checkpoint is loaded, the compiled step runs once, and everything is dropped. Libraries, compiled programs and
       thread pools, which every process needs, are in memory now. The resident memory at this point is the baseline.
    3. The checkpoint is loaded again, the kernel's maximum of resident memory is reset (5 to /proc/self/clear_refs), and the
       step runs:
           measured = maximum - baseline

glibc is configured to return freed memory at once (M_MMAP_THRESHOLD of mallopt), because its heaps would keep unused pages.
The remaining difference from the plan are buffers of matrix products, which XLA's CPU backend allocates while it runs.
"""

import ctypes
import gc
import sys
import time
from typing import Any

import worker

SMALL = 65536  # glibc maps allocations of at least so many bytes separately
_M_MMAP_THRESHOLD = -3


def main() -> None:
    parser = worker.parser_of(__doc__, ("batch-size", "length", "rank", "steps"))
    parser.add_argument("--remat", choices=("full", "dots", "none"), required=True)
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("expected Linux, whose /proc/self has the maximum of resident memory")
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, SMALL)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from qlora_jax.checkpoint.load import load_model
    from qlora_jax.checkpoint.open import open_checkpoint
    from qlora_jax.models import ModelSpec
    from qlora_jax.peft import LoRA
    from qlora_jax.train import BatchSpec, StepSpec, build_step, create_state, language_model_objective, place_step, split

    checkpoint = open_checkpoint(arguments.model)
    described = ModelSpec(
        checkpoint.model_config,
        method=LoRA(rank=arguments.rank, alpha=16.0),
        dtype=arguments.dtype,
        remat=arguments.remat,
    )
    batch = BatchSpec(batch_size=arguments.batch_size, length=arguments.length)
    planned = place_step(
        build_step(StepSpec(described, language_model_objective(packed=False), batch), platform="cpu"), None
    )
    start = time.perf_counter()
    step, parts = compile_step(planned)
    compile_seconds = time.perf_counter() - start
    plan = parts["arguments"] + parts["temporaries"] + parts["outputs"] - parts["aliased"]
    tokens = np.random.default_rng(0).integers(0, described.config.vocab_size, planned.batch["inputs"].shape, dtype=np.int32)

    def load() -> tuple[Any, Any]:
        model = load_model(
            checkpoint, method=described.method, dtype=jnp.dtype(arguments.dtype), remat=arguments.remat, progress=False
        )
        _, adapter, frozen = split(model)
        return jax.block_until_ready((create_state(planned.tx, adapter), frozen))

    def train(steps: int) -> list[float]:
        state, frozen = load()
        settle()
        reset_peak()
        losses = []
        for _ in range(steps):
            mask = np.ones(tokens.shape, np.float32)
            batch = jax.device_put({"inputs": tokens, "targets": np.roll(tokens, -1, axis=2), "loss_mask": mask})
            state, metrics = jax.block_until_ready(step(state, frozen, batch))
            losses.append(float(metrics["loss"]))
        return losses

    def settle() -> None:
        gc.collect()
        libc.malloc_trim(0)

    train(1)
    settle()
    baseline = status("VmRSS")
    losses = train(arguments.steps)
    measured = status("VmHWM") - baseline
    found = {"planned": plan, "measured": measured, "error": plan / measured - 1, "baseline": baseline, **parts}
    versions = worker.versions("jax", "jaxlib", "flax")
    worker.report(found, compile_seconds=compile_seconds, losses=losses, versions=versions)


def compile_step(planned: Any) -> tuple[Any, dict[str, int]]:
    """Compile a training step for this CPU from shapes; return it and the parts of its memory in bytes."""
    compiled = planned.jit_train().trace(planned.state, planned.frozen, planned.batch).lower().compile()
    memory = compiled.memory_analysis()
    return compiled, {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }


def status(field: str) -> int:
    """Return a memory field of /proc/self/status in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Reset the kernel's maximum of resident memory to the present value."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


if __name__ == "__main__":
    main()
