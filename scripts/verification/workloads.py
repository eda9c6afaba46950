"""Models with random weights that are made on the device, one layer and then copies of it, and a training step of them.

A model of one layer is built as usual. The leaves that the whole model has once for each layer are that layer's, repeated:
the time and the memory of a step do not depend on the values, and dense weights of many layers never exist.
"""

import dataclasses
import functools
import queue
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.models import ModelSpec, family_of
from qlora_jax.peft import LoRA
from qlora_jax.plan import SIZES, quick_plan
from qlora_jax.train import (
    BatchSpec,
    OptimizerSpec,
    Step,
    StepSpec,
    create_state,
    language_model_objective,
    learning_rate_schedule,
    split,
)
from scripts.verification.machine import memory_limit

Spec = StepSpec[ModelSpec]
_FETCH = 45  # seconds for the default model
_SHARE = 0.9  # of the device's memory that a step is planned to take, if layers have to be left out
# Widths that a CPU trains in a second. A head has 64 features, so that kernels for attention apply.
_SMALL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step to run.

    Attributes:
        size: the name of the model's shape in `plan.SIZES`.
        steps: how many steps are run.
        batch_size, length: the batch; rows are packed.
        rank: the rank of the adapter.
        real: whether the weights are those of the default model where it can be fetched.
        offload: whether the cost of host memory is measured too.
    """

    size: str
    steps: int
    batch_size: int
    length: int
    rank: int = 16
    real: bool = False
    offload: bool = False


WORKLOADS = {
    "smollm2": Workload("smollm2-135m", steps=20, batch_size=4, length=512, real=True),
    "8b": Workload("llama-3-8b", steps=5, batch_size=1, length=2048, offload=True),
    "65b": Workload("llama-65b", steps=5, batch_size=1, length=512, rank=64),
}


def step_spec(work: Workload, small: bool) -> Spec:
    """Return the step of a workload, with as many layers as the device's memory holds."""
    fields = {**SIZES[work.size], **(_SMALL if small else {})}
    batch = BatchSpec(batch_size=1, length=64) if small else BatchSpec(batch_size=work.batch_size, length=work.length)
    layers, limit, platform = fields["num_hidden_layers"], memory_limit(), jax.default_backend()

    def spec_of(layers: int) -> Spec:
        values = {**fields, "num_hidden_layers": layers}
        dtype = "float32" if platform == "cpu" else "bfloat16"
        model = ModelSpec(family_of(values).config(values), method=LoRA(rank=work.rank, alpha=16.0), dtype=dtype)
        return StepSpec(model, language_model_objective(), batch, OptimizerSpec())

    while layers > 1 and limit is not None and _planned(spec_of(layers), platform) > _SHARE * limit:
        layers = layers * 3 // 4
    return spec_of(layers)


def _planned(spec: Spec, platform: str) -> int:
    return quick_plan(spec, "cuda" if platform == "gpu" else platform, 1).peak


def layers_of(spec: Spec) -> int:
    """Return the number of layers of the model."""
    return spec.model.config.num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue]


def random_weights(model: ModelSpec) -> tuple[Any, Any, Any]:
    """Return (graphdef, adapter, frozen) of a model with random weights, as `train.split` does; the layers are equal."""
    graphdef, *wanted = split(model.abstract())

    def whole(leaf: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return leaf if leaf.shape == like.shape else jnp.repeat(leaf, like.shape[0], axis=0)

    adapter, frozen = jax.tree.map(whole, _build_one_layer(model)(), tuple(wanted))
    return graphdef, adapter, frozen


@functools.cache  # so that sections in one process trace and compile it once; it holds no weights
def _build_one_layer(model: ModelSpec) -> Any:
    """Return a jitted function that makes (adapter, frozen) of the model with one layer."""
    config: Any = dataclasses.replace(model.config, num_hidden_layers=1)  # pyright: ignore[reportCallIssue]
    one = dataclasses.replace(model, config=config)

    def build() -> Any:
        with jax.default_prng_impl("unsafe_rbg"):  # the device's own generator, which is fast and compiles fast
            return split(one.build(nnx.Rngs(0)))[1:]

    return jax.jit(build)


def fetched_model() -> Path:
    """Return the file of the default model; raise CheckpointError if it cannot be fetched, or takes too long to."""
    found: queue.Queue[Path | Exception] = queue.Queue()

    def fetch() -> None:
        try:
            found.put(fetch_default_model())
        except (CheckpointError, OSError) as error:
            found.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    try:
        model = found.get(timeout=_FETCH)
    except queue.Empty:
        model = CheckpointError(f"the default model was not fetched within {_FETCH} s")
    if isinstance(model, Exception):
        raise CheckpointError((str(model).splitlines() or [""])[0][:200]) from model
    return model


def real_weights(model: ModelSpec) -> tuple[tuple[Any, Any, Any] | None, str]:
    """Return the default model's weights as `train.split` does and a remark, or None and why it could not be fetched."""
    try:
        checkpoint = open_checkpoint(str(fetched_model()))
    except CheckpointError as error:
        return None, f"random weights ({error})"
    loaded = load_model(
        checkpoint,
        quantization=model.quantization,
        method=model.method,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        progress=False,
    )
    return split(loaded), "SmolLM2-135M-Instruct"


def batch_of(spec: Spec) -> dict[str, np.ndarray]:
    """Return one batch of random tokens, two documents a row: the same one is learned at each step."""
    rows, length = spec.batch.batch_size, spec.batch.length
    vocabulary: int = spec.model.config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    second = np.arange(length) >= length // 2
    arrays = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((rows, length), np.float32),
        "segment_ids": np.broadcast_to(second + 1, (rows, length)).astype(np.int32),
        "positions": np.broadcast_to(np.arange(length) - second * (length // 2), (rows, length)).astype(np.int32),
    }
    return spec.micro_batches(arrays)


@dataclasses.dataclass
class Run:
    """A compiled training step and what is measured of it.

    Attributes:
        losses: of each step.
        seconds: of each step, to the end of its result on the host.
        compile_seconds: of tracing, lowering and compiling.
        traced, compiled: the program.
    """

    losses: list[float]
    seconds: list[float]
    compile_seconds: float
    traced: Any
    compiled: Any

    @property
    def median(self) -> float:
        """The median of the steps but the first, which moves buffers for the first time."""
        return float(np.median(self.seconds[1:] or self.seconds))


def train(spec: Spec, graphdef: Any, adapter: Any, frozen: Any, steps: int) -> Run:
    """Compile the step of a spec and run it on one batch. The buffers of the adapter are donated."""
    tx = spec.optimizer.build(learning_rate_schedule("constant", 2e-3, steps))
    state = create_state(tx, adapter)
    del adapter
    jitted: Any = Step(spec.objective, tx, graphdef, state, frozen, spec.batch_shapes()).jit_train()
    batch = jax.device_put(batch_of(spec))
    start = time.perf_counter()
    traced = jitted.trace(state, frozen, batch)
    compiled = traced.lower().compile()
    run = Run([], [], time.perf_counter() - start, traced, compiled)
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        run.losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        run.seconds.append(time.perf_counter() - start)
    return run


def another_adapter(shapes: Any) -> Any:
    """Return an adapter with these shapes whose values are small and all equal."""
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1e-3, leaf.dtype), shapes)
