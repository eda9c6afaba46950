"""The compiled plan of a training step on this CPU, against the resident memory that the step is measured to take.

    1. the plan: the step is compiled from shapes, before any weight is read
           planned = arguments + temporaries + outputs - (outputs that lie in donated arguments)
    2. the checkpoint is loaded, the compiled step runs once, and everything is dropped: libraries, compiled programs and
       thread pools, which a process needs whatever it trains, are there now. What is resident then is the baseline.
    3. it is loaded again, the kernel's high-water mark is set back (5 to /proc/self/clear_refs), and the step runs
           measured = high-water mark - baseline

glibc is told to give back at once what is freed (mallopt's M_MMAP_THRESHOLD): its heaps would keep pages that nobody uses.
What is left beside the plan are the products' own buffers, which XLA's CPU backend takes while it runs.
"""

import ctypes
import gc
import sys
import time
from typing import Any

import worker

SMALL = 65536  # bytes from which glibc maps an allocation by itself
_M_MMAP_THRESHOLD = -3


def main() -> None:
    parser = worker.parser_of(__doc__, ("batch-size", "length", "rank", "steps"))
    parser.add_argument("--remat", choices=("full", "dots", "none"), required=True)
    arguments = parser.parse_args()
    if sys.platform != "linux":
        parser.error("expected Linux, whose /proc/self has the high-water mark")
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, SMALL)

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from qlora_jax.checkpoint.load import load_model
    from qlora_jax.checkpoint.open import open_checkpoint
    from qlora_jax.peft import LoRA
    from qlora_jax.plan import Recipe
    from qlora_jax.plan.recipe import abstract_step
    from qlora_jax.train.step import create_state, jit_train_step, split

    checkpoint = open_checkpoint(arguments.model)
    recipe = Recipe(
        config=checkpoint.model_config,
        method=LoRA(rank=arguments.rank, alpha=16.0),
        dtype=arguments.dtype,
        remat=arguments.remat,
        batch_size=arguments.batch_size,
        length=arguments.length,
        packed=False,
    )
    planned = abstract_step(recipe, "cpu")
    here = SingleDeviceSharding(jax.devices()[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)

    state, frozen, batch = placed(planned.state), placed(planned.frozen), placed(planned.batch)
    start = time.perf_counter()
    step = jit_train_step(planned.graphdef, planned.tx, planned.loss, state).trace(state, frozen, batch).lower().compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    plan = parts["arguments"] + parts["temporaries"] + parts["outputs"] - parts["aliased"]
    tokens = np.random.default_rng(0).integers(0, recipe.config.vocab_size, planned.batch["inputs"].shape, dtype=np.int32)

    def load() -> tuple[Any, Any]:
        model = load_model(
            checkpoint, method=recipe.method, dtype=jnp.dtype(arguments.dtype), remat=arguments.remat, progress=False
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


def status(field: str) -> int:
    """Bytes of one of the memory fields of /proc/self/status."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Sets the high-water mark of resident memory to what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


if __name__ == "__main__":
    main()
