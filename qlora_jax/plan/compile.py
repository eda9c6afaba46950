"""What a training step needs in memory, from the real compiler, without the device.

    1. the model, the adapter and the optimizer's state are built abstractly: shapes and dtypes, no memory
    2. each gets a sharding over the mesh of a described device (`plan.devices`), and its kind of memory
    3. `train.step.jit_train_step`, the function that training runs, is lowered and compiled for that device
    4. XLA's buffer assignment says what the compiled program needs:

           peak = arguments + temporaries + outputs - (outputs that lie in donated arguments)

The peak is that of the program's buffers. A run needs a little more: the CUDA context, the libraries'
workspaces, and what the allocator loses to fragments. GEMMs are compiled without autotuning, which needs the
hardware, and so without the workspaces that the fastest of them may take.
"""

import dataclasses
import importlib.metadata
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.models import CausalLM, DecoderConfig, Remat
from qlora_jax.nn import LoRA, default_implementation
from qlora_jax.plan.devices import Device, device_mesh
from qlora_jax.quant import Quantization, QuantizedTensor
from qlora_jax.train.dpo import PAIRS, dpo_loss
from qlora_jax.train.loss import language_model_loss
from qlora_jax.train.offload import host_offload, memory_kinds
from qlora_jax.train.optim import adamw
from qlora_jax.train.step import TOKENS, LossFunction, TrainState, Transformation, Unit, init_state, jit_train_step, split

PlannedObjective = Literal["sft", "dpo"]
_OBJECTIVES: dict[PlannedObjective, tuple[LossFunction, Unit]] = {
    "sft": (language_model_loss, TOKENS),
    "dpo": (dpo_loss, PAIRS),
}

# Autotuning runs kernels on the device, and there is none.
_COMPILER_OPTIONS = {"cuda": {"xla_gpu_autotune_level": "0"}, "tpu": {}}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of one compiled training step. Device memory, but for the fields that say host.

    Attributes:
        packed_weights: 4-bit matrices with their scales.
        dense_weights: the frozen rest: embeddings, norms, output head, and dense linear layers.
        adapter: the trainable parameters.
        optimizer, host_optimizer: the optimizer's state, where it lives.
        arguments, outputs, aliased, temporaries: of the program; `aliased` outputs lie in donated arguments.
        host_arguments, host_temporaries: the same in host memory.
        compile_seconds: of lowering and compiling.
        versions: of jax, jaxlib and the compiler's package.
    """

    device: str
    packed_weights: int
    dense_weights: int
    adapter: int
    optimizer: int
    host_optimizer: int
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    host_arguments: int
    host_temporaries: int
    compile_seconds: float
    versions: dict[str, str]

    @property
    def peak(self) -> int:
        """Device bytes of the step."""
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def host_peak(self) -> int:
        """Host bytes of the step; its outputs lie in the donated arguments."""
        return self.host_arguments + self.host_temporaries


def compile_train_step(
    config: DecoderConfig,
    *,
    quantization: Quantization | None,
    lora: LoRA,
    batch_size: int,
    length: int,
    device: Device,
    micro_batches: int = 1,
    remat: Remat = "full",
    host_optimizer: bool = False,
    host_adapter: bool = False,
    segment_ids: bool = False,
    objective: PlannedObjective = "sft",
) -> Plan:
    """Compiles one training step for a device that need not be attached.

    bfloat16 activations and dense weights, float32 adapter, clipped AdamW, the platform's attention kernel.

    Args:
        quantization: None keeps the linear layers dense.
        batch_size: sequences in a micro-batch, or pairs of them for DPO; length: tokens in a sequence.
        host_optimizer: whether the optimizer's state lives in pinned host memory.
        segment_ids: whether documents are packed, which pairs are never: the batch then has `segment_ids` and `positions`.
        objective: "sft": the loss of the answers; "dpo": that of preference pairs, against the base as the reference.

    Raises:
        CompilerMissing: the device's compiler is not installed.
        ValueError: LoRA targets that match nothing.
    """
    mesh = device_mesh(device)
    graphdef, adapter, frozen = split(
        nnx.eval_shape(
            lambda: CausalLM(
                config,
                quantization=quantization,
                lora=lora,
                dtype=jnp.bfloat16,
                attention=default_implementation(device.platform),
                remat=remat,
                rngs=nnx.Rngs(0),
            )
        )
    )
    tx = adamw(2e-4)
    tx = host_offload(tx, adapter=host_adapter) if host_optimizer or host_adapter else tx
    state = _abstract_state(tx, adapter, mesh, host_optimizer or host_adapter, host_adapter)
    frozen = _place(frozen, mesh)
    if objective == "dpo":
        batch = abstract_pairs(micro_batches, batch_size, length)
    else:
        batch = abstract_batch(micro_batches, batch_size, length, segment_ids=segment_ids)
    batch = _place(batch, mesh)

    loss, unit = _OBJECTIVES[objective]
    step = jit_train_step(graphdef, tx, loss, state, unit=unit)
    start = time.perf_counter()
    lowered = step.trace(state, frozen, batch).lower(lowering_platforms=(device.platform,))
    compiled = lowered.compile(_COMPILER_OPTIONS[device.platform])
    seconds = time.perf_counter() - start

    memory = compiled.memory_analysis()
    packed, dense = weight_bytes(frozen)
    optimizer = tree_bytes(state.opt_state)
    return Plan(
        device=device.description,
        packed_weights=packed,
        dense_weights=dense,
        adapter=tree_bytes(state.adapter),
        optimizer=0 if host_optimizer else optimizer,
        host_optimizer=optimizer if host_optimizer else 0,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        host_arguments=memory.host_argument_size_in_bytes,
        host_temporaries=memory.host_temp_size_in_bytes,
        compile_seconds=seconds,
        versions=_versions(device),
    )


def abstract_batch(
    micro_batches: int, batch_size: int, length: int, *, segment_ids: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `data` hands to a training step."""
    shape = (micro_batches, batch_size, length)
    names = ("inputs", "targets", *(("segment_ids", "positions") if segment_ids else ()))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def abstract_pairs(micro_batches: int, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """`abstract_batch` of preference pairs."""
    one = abstract_batch(micro_batches, batch_size, length, segment_ids=False)
    return {f"{side}_{name}": x for side in ("chosen", "rejected") for name, x in one.items()}


def weight_bytes(frozen: Any) -> tuple[int, int]:
    """(bytes of quantised matrices, bytes of everything else) of a frozen tree."""
    leaves = jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
    packed = sum(tree_bytes(leaf) for leaf in leaves if isinstance(leaf, QuantizedTensor))
    return packed, tree_bytes(frozen) - packed


def tree_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _abstract_state(tx: Transformation, adapter: Any, mesh: Mesh, host_optimizer: bool, host_adapter: bool) -> TrainState:
    state = jax.eval_shape(lambda adapter: init_state(tx, adapter), adapter)
    placed = _place(state, mesh)
    if not host_optimizer:
        return placed
    placed = dataclasses.replace(
        placed,
        opt_state=jax.tree.map(lambda leaf, kind: _place(leaf, mesh, kind), state.opt_state, memory_kinds(state.opt_state)),
    )
    if host_adapter:
        placed = dataclasses.replace(placed, adapter=_place(state.adapter, mesh, "pinned_host"))
    return placed


def _place(tree: Any, mesh: Mesh, memory_kind: str | None = None) -> Any:
    # NamedSharding keeps the kind of memory ahead of time; SingleDeviceSharding drops it.
    sharding = NamedSharding(mesh, PartitionSpec(), memory_kind=memory_kind)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _versions(device: Device) -> dict[str, str]:
    packages = {"cuda": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "tpu": ("libtpu",)}[device.platform]
    found: dict[str, str] = {}
    for package in ("jax", "jaxlib", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
