"""A plan in seconds, by arithmetic: exact where shapes decide, and by measured factors where only a compiler knows.

    arguments    weights, adapter, optimizer: exact, from `jax.eval_shape` and the shardings of the job
    residuals    what the layers save for the backward pass, which depends on remat: from shapes
    gradients    the gradients of the adapter, in float32
    working      the memory beside these at the peak: estimated

The peak is at one of three moments. One is the loss, with a chunk of logits and before the gradients exist (several GPUs
allocate these while the head is gathered). One is a layer's backward pass, with its recomputed activations and with the
gradients. On one GPU, attention's backward pass within it is a moment of its own, which decides for long sequences, whose
feed-forward takes chunks. The working memory of each is a sum of sizes that shapes give (`plan.features`), each multiplied
by a factor (`FACTORS`).

    quick peak = arguments + residuals + max(loss, gradients + layer, gradients + attention)
"""

import dataclasses
from typing import Any

import jax

from qlora_jax.models import ModelSpec
from qlora_jax.nn import split_axis
from qlora_jax.nn.attention_target import AttentionTarget, attention_target
from qlora_jax.plan.factors import FACTORS
from qlora_jax.plan.features import features, name_of, workspace_of
from qlora_jax.plan.residuals import residual_bytes
from qlora_jax.plan.tree_bytes import tree_bytes
from qlora_jax.quant import PackedEmbedding
from qlora_jax.train.spec import Step, StepSpec, build_step


@dataclasses.dataclass(frozen=True)
class QuickPlan:
    """The memory of one training step on each device, in bytes.

    Attributes:
        packed_weights: the quantised matrices and embeddings.
        dense_weights: the other frozen weights.
        adapter: the trainable parameters in device memory.
        host_adapter: the trainable parameters in host memory, with their gradient.
        optimizer, host_optimizer: the optimizer's state, in device or in host memory.
        batch: the batch.
        residuals, host_residuals: what the layers save for the backward pass, in device or in host memory.
        gradients: the gradients of the adapter at the peak.
        working: the estimated rest at the peak.
        workspace: cuDNN's workspace in attention's backward pass (`plan.workspace`); it is part of `working` if the peak is
            there.
    """

    packed_weights: int
    dense_weights: int
    adapter: int
    host_adapter: int
    optimizer: int
    host_optimizer: int
    batch: int
    residuals: int
    host_residuals: int
    gradients: int
    working: int
    workspace: int = 0

    @property
    def exact(self) -> int:
        """The part of the peak that does not depend on a measured factor."""
        return self.peak - self.working

    @property
    def settled(self) -> int:
        """The part of the peak that is the same at every moment of the step."""
        return self.peak - self.working - self.gradients

    @property
    def peak(self) -> int:
        """The bytes of device memory while the step runs."""
        return (
            self.packed_weights
            + self.dense_weights
            + self.adapter
            + self.optimizer
            + self.batch
            + self.residuals
            + self.gradients
            + self.working
        )

    @property
    def host_peak(self) -> int:
        """The bytes of host memory while the step runs."""
        return self.host_optimizer + self.host_adapter + self.host_residuals


def quick_plan(
    spec: StepSpec[ModelSpec], platform: str | AttentionTarget, devices: int = 1, *, step: Step | None = None
) -> QuickPlan:
    """Return the plan of a step on a number of devices: a platform ("cuda", "tpu" or "cpu"), or the target of a device.

    Args:
        spec: describes the step.
        platform: the platform or the target.
        devices: the number of devices.
        step: the step of a spec that differs in its batch only, which saves most of the time; it is built if None.

    Raises:
        QLoRAError: the adapter does not fit the model.
    """
    target = attention_target(platform)
    step = build_step(spec, platform=target, devices=devices) if step is None else step
    packed, dense = _spread_bytes(step.frozen, devices)
    adapter, optimizer = tree_bytes(step.state.adapter), tree_bytes(step.state.opt_state)
    saved, saved_on_host = residual_bytes(spec, target)
    on_device = 0 if spec.optimizer.host_adapter else adapter
    gradients, working = worst_moment(features(spec, target, devices, on_device), FACTORS[kind_of(name_of(target), devices)])
    return QuickPlan(
        packed_weights=packed,
        dense_weights=dense,
        adapter=on_device,
        host_adapter=2 * adapter if spec.optimizer.host_adapter else 0,
        optimizer=0 if spec.optimizer.host_optimizer else optimizer,
        host_optimizer=optimizer if spec.optimizer.host_optimizer else 0,
        batch=tree_bytes(spec.batch_shapes(devices)) // devices,
        residuals=saved,
        host_residuals=saved_on_host,
        gradients=gradients,
        working=working,
        workspace=workspace_of(spec, target),
    )


def kind_of(platform: str, devices: int) -> str:
    """Return the key of `FACTORS`. XLA schedules a program for several GPUs by other rules, which hide its gathers."""
    return "cuda, several" if platform == "cuda" and devices > 1 else platform


def worst_moment(sizes: dict[str, int], factors: dict[str, dict[str, float]]) -> tuple[int, int]:
    """Return (bytes of gradients, bytes of working memory) at the moment that needs more memory."""
    working = {moment: sum(factor * sizes[name] for name, factor in of.items()) for moment, of in factors.items()}
    loss, rest = working.pop("loss"), max(working.values())
    if loss > sizes["adapter"] + rest:
        return 0, int(loss)
    return sizes["adapter"], int(rest)


def _spread_bytes(frozen: Any, devices: int) -> tuple[int, int]:
    """Return (bytes that are packed, bytes of the rest) on each device, spread as `nn.frozen_sharding` spreads them."""
    packed = dense = 0
    for leaf in jax.tree.leaves(frozen, is_leaf=lambda leaf: isinstance(leaf, PackedEmbedding)):
        quantized = isinstance(leaf, PackedEmbedding)
        for part in jax.tree.leaves(leaf):
            whole = split_axis(part.shape, devices) is None
            size = part.size * part.dtype.itemsize // (1 if whole else devices)
            packed, dense = (packed + size, dense) if quantized else (packed, dense + size)
    return packed, dense
