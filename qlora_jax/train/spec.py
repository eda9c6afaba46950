"""One description of a training step, and the step that is built from it.

    StepSpec       model, objective, batch and optimizer as values: everything that decides the program of a step
    build_step     the same as shapes, without memory, with the optimizer and the jitted functions

The job, the programs that are compiled while weights load (`train.precompile`) and the planner (`plan`) all start from one
`StepSpec`, so that they agree on every shape and every loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.errors import OptionError
from qlora_jax.nn.attention_target import AttentionTarget
from qlora_jax.nn.mesh import MeshShape, shape_on
from qlora_jax.nn.parallel import abstract_module
from qlora_jax.train.offload import HostOffload, host_offload
from qlora_jax.train.optim import Optimizer, OptimizerName, learning_rate_schedule, optimizer
from qlora_jax.train.step import (
    LossFunction,
    TrainState,
    Transformation,
    Unit,
    host_memory_options,
    init_state,
    jit_eval_step,
    jit_train_step,
    split,
)


class AbstractModel(Protocol):
    """The part of a model's description that a step needs; `models.ModelSpec` has it."""

    @property
    def residuals_on_host(self) -> bool:
        """Whether the layers save their residuals in host memory."""
        ...

    def abstract(self, platform: str | AttentionTarget | None = None) -> Any:
        """Return the model with shapes in place of arrays, with the attention kernel of a platform or a device."""
        ...


Model = TypeVar("Model", bound=AbstractModel, covariant=True)


@dataclasses.dataclass(frozen=True)
class BatchArray:
    """One array of a batch, `[rows, tokens]`.

    Attributes:
        name: its name in the batch.
        dtype: the name of its dtype.
        of_source: whether its tokens are those of an encoder's source rather than those of the targets.
    """

    name: str
    dtype: str = "int32"
    of_source: bool = False


def unchanged(model: Any) -> Any:
    """Return the model as it is."""
    return model


@dataclasses.dataclass(frozen=True)
class StepObjective:
    """What a step learns: its losses and the arrays that they read. `train.objectives` makes those of this package.

    Attributes:
        name: the kind of fine-tuning, for reports.
        loss: the loss of a micro-batch in training.
        held_out_loss: the loss of held-out data, with the further sums to report, without what only training needs.
        unit: the unit over which both losses are means.
        arrays: the arrays of a batch that the losses read.
        sequences: how many sequences of a row go through the model.
        attention_groups: the groups of LongLoRA's attention; 1 for dense attention.
        neftune_alpha: the noise on the embeddings in training; 0 for none.
        prepare: returns the loaded model as it is trained.
    """

    name: str
    loss: LossFunction
    held_out_loss: LossFunction
    unit: Unit
    arrays: tuple[BatchArray, ...]
    sequences: int = 1
    attention_groups: int = 1
    neftune_alpha: float = 0.0
    prepare: Callable[[Any], Any] = unchanged

    @property
    def array_names(self) -> tuple[str, ...]:
        """The names of the arrays of a batch that the losses read."""
        return tuple(array.name for array in self.arrays)

    @property
    def packed(self) -> bool:
        """Whether a row can hold several documents: its batch then says which document each token belongs to."""
        return "segment_ids" in self.array_names


@dataclasses.dataclass(frozen=True)
class BatchSpec:
    """The size of a step's batch.

    Attributes:
        batch_size: the rows of a micro-batch on each device; those of a tensor axis share them.
        micro_batches: the number of micro-batches whose gradients a step adds up.
        length: the tokens of a row; of an encoder-decoder, of its targets.
        source_length: the tokens of an encoder's source; None: as many as `length`.
    """

    batch_size: int = 1
    micro_batches: int = 1
    length: int = 512
    source_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batches", "length", "source_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}: expected at least 1, found {value}")

    @property
    def longest(self) -> int:
        """The tokens of the longest array of a row."""
        return max(self.length, self.source_length or 0)


@dataclasses.dataclass(frozen=True)
class OptimizerSpec:
    """The optimizer of a step; see `optimizer` and `host_offload` for what the values do.

    Attributes:
        name: the update rule.
        beta1, beta2: the decays of its moments; None for the rule's own.
        weight_decay: the decoupled weight decay; 0 for none.
        max_grad_norm: the norm to which gradients are clipped; None for no clipping.
        loraplus_lr_ratio: the learning rate of LoRA's B divided by that of A; None for the same rate.
        host_optimizer: whether the optimizer's state is in pinned host memory.
        host_adapter: whether the adapter and its gradient are there too.
    """

    name: OptimizerName = "adamw"
    beta1: float | None = None
    beta2: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float | None = 0.3
    loraplus_lr_ratio: float | None = None
    host_optimizer: bool = False
    host_adapter: bool = False

    def __post_init__(self) -> None:
        if self.host_adapter and not self.host_optimizer:
            raise OptionError("host_adapter: expected host_optimizer beside it, found none")

    def build(self, learning_rate: optax.ScalarOrSchedule) -> Optimizer | HostOffload:
        """Return the optimizer at a learning rate."""
        tx = optimizer(
            self.name,
            learning_rate,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
        )
        return host_offload(tx, adapter=self.host_adapter) if self.host_optimizer else tx


@dataclasses.dataclass(frozen=True)
class StepSpec(Generic[Model]):
    """Everything that decides the program of a training step, but for the learning rate.

    Attributes:
        model: describes the model with its adapter; a `models.ModelSpec`, or anything else with `abstract`.
        objective: what the step learns.
        batch: the size of its batch.
        optimizer: what updates the adapter.
        mesh: the number of devices along each axis of the mesh; None: all devices along `fsdp`.
    """

    model: Model
    objective: StepObjective
    batch: BatchSpec = BatchSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    mesh: MeshShape | None = None

    @property
    def sequences(self) -> int:
        """The sequences that a device's pass through the model takes."""
        return self.batch.batch_size * self.objective.sequences

    @property
    def tokens(self) -> int:
        """The tokens that a device's pass through the model takes."""
        return self.sequences * self.batch.longest

    def compiler_options(self, platform: str | AttentionTarget | None = None) -> dict[str, str]:
        """Return XLA's options for the training step on a platform or a device; the default one if None."""
        on_host = self.model.residuals_on_host or self.optimizer.host_optimizer
        name = platform.platform if isinstance(platform, AttentionTarget) else platform
        return host_memory_options(name or jax.default_backend()) if on_host else {}

    def batch_shapes(self, devices: int = 1) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a step's batch on all devices together, `[micro-batches, rows, tokens]`."""
        size, source = self.batch, self.batch.source_length or self.batch.length
        rows = size.batch_size * shape_on(self.mesh, devices).row_shards
        return {
            array.name: jax.ShapeDtypeStruct(
                (size.micro_batches, rows, source if array.of_source else size.length), jnp.dtype(array.dtype)
            )
            for array in self.objective.arrays
        }

    def along_fsdp(self, devices: int) -> tuple["StepSpec[Model]", int]:
        """Return (this step with all devices along `fsdp`, the number of devices that store as much as these each)."""
        return dataclasses.replace(self, mesh=None), shape_on(self.mesh, devices).weight_shards

    def select(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of a batch `[rows, tokens]` that the losses read."""
        return {name: batch[name] for name in self.objective.array_names}

    def micro_batches(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the arrays of a batch `[rows, tokens]` that the losses read, as `[micro-batches, rows, tokens]`."""
        count = self.batch.micro_batches
        return {name: array.reshape(count, -1, array.shape[-1]) for name, array in self.select(batch).items()}


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step with its arguments, which are shapes or the arrays themselves.

    Attributes:
        objective: what the step learns.
        tx: the optimizer.
        graphdef: the graph of the model.
        state: the state that training changes.
        frozen: the values of the model that do not train.
        batch: the shapes of a batch of all devices, `[micro-batches, rows, tokens]`.
        compiler_options: XLA's options for the training step.
    """

    objective: StepObjective
    tx: Transformation
    graphdef: Any
    state: TrainState
    frozen: Any
    batch: dict[str, jax.ShapeDtypeStruct]
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def micro_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of one micro-batch of all devices, `[rows, tokens]`, which the evaluation step takes."""
        return {name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for name, leaf in self.batch.items()}

    def jit_train(self) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
        """Return the jitted training step, for a state that has the shardings of this one."""
        return jit_train_step(
            self.graphdef,
            self.tx,
            self.objective.loss,
            self.state,
            unit=self.objective.unit,
            compiler_options=self.compiler_options,
        )

    def jit_eval(self) -> Callable[[Any, Any, Any], tuple[dict[str, jax.Array], jax.Array]]:
        """Return the jitted evaluation step."""
        return jit_eval_step(self.graphdef, self.objective.held_out_loss, unit=self.objective.unit)


# A plan needs a schedule, whose counter is part of the optimizer's state, but not its values.
_ANY_SCHEDULE = learning_rate_schedule("constant", 2e-4, 100)


def build_step(
    spec: StepSpec[Any],
    learning_rate: optax.Schedule = _ANY_SCHEDULE,
    *,
    platform: str | AttentionTarget | None = None,
    devices: int = 1,
) -> Step:
    """Return the step of a spec with shapes as its arguments.

    Args:
        spec: describes the step.
        learning_rate: the learning rate by step.
        platform: the platform ("cpu", "gpu" or "tpu") or the device whose attention kernel the model takes; the default
            device if None.
        devices: how many devices share the batch.

    Raises:
        OptionError: the adapter does not fit the model.
    """
    graphdef, adapter, frozen = split(_prepared(spec, platform))
    tx = spec.optimizer.build(learning_rate)
    state = jax.eval_shape(partial(init_state, tx), adapter)
    options = spec.compiler_options(platform)
    return Step(spec.objective, tx, graphdef, state, frozen, spec.batch_shapes(devices), options)


def _prepared(spec: StepSpec[Any], platform: str | AttentionTarget | None) -> Any:
    """Return the abstract model as it is trained."""
    model = spec.model.abstract(platform)
    if spec.objective.prepare is unchanged:
        return model
    graphdef, state = nnx.split(model)
    return abstract_module(lambda state: spec.objective.prepare(nnx.merge(graphdef, state)), state)
