"""The training step: a pure function of (state, frozen, batch).

    total = number of learned tokens (or of another unit) in all micro-batches
    for each micro-batch:   gradient += d(summed loss) / d(adapter)
    adapter, optimizer state = optimizer(gradient / total)

Dividing by the units of the whole batch, not of each micro-batch, makes the step the same for any number of micro-batches.
Only the adapter is differentiated, updated and donated; the frozen part is read.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.nn.host import to_device, to_host
from qlora_jax.nn.mesh import tensor_shards
from qlora_jax.nn.parallel import adapter_shardings
from qlora_jax.train.offload import HostOffload, chosen, host_add, host_gradient, host_zeros
from qlora_jax.train.optim import Optimizer

Transformation = optax.GradientTransformation | Optimizer | HostOffload
Batch = Mapping[str, Array]
# Takes (model, micro-batch, random key or None); returns the summed loss of the micro-batch, or (that, sums to report).
LossFunction = Callable[[Any, Batch, Array | None], Array | tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """The unit over which a loss is a mean.

    Attributes:
        name: the name of the metric that reports how many units a batch holds.
        count: returns how many units a batch `[..., b, t]` holds, as a float32 scalar.
    """

    name: str
    count: Callable[[Batch], Array]


TOKENS = Unit("tokens", lambda batch: batch["loss_mask"].sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
        step: the number of updates done, an int32 scalar.
        adapter: the trainable parameters.
        opt_state: the state of the optimizer.
        seed: a uint32 scalar. The dropout of a step draws from (seed, step) alone, so that a resumed run draws the same.
    """

    step: Array
    adapter: Any
    opt_state: Any
    seed: Array


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """Return (graphdef, adapter, frozen): the graph of a model, its trainable parameters, and all its other values."""
    graphdef, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, adapter, frozen


def init_state(tx: Transformation, adapter: Any, seed: int = 0) -> TrainState:
    """Return the state before the first step, for use under tracing; the optimizer decides where its own state is."""
    if not jax.tree.leaves(adapter):
        raise OptionError("the model has no LoRA parameters: expected one that was built with an adapter")
    opt_state = tx.init(adapter)
    if in_host_memory(tx):
        adapter = to_host(adapter)
    return TrainState(step=jnp.zeros((), jnp.int32), adapter=adapter, opt_state=opt_state, seed=jnp.uint32(seed))


def in_host_memory(tx: Transformation) -> bool:
    """Return whether the adapter is in host memory between steps."""
    return isinstance(tx, HostOffload) and tx.adapter


def create_state(tx: Transformation, adapter: Any, seed: int = 0) -> TrainState:
    """Return the state before the first step, on the devices.

    The adapter's buffers are donated, so that it is in memory once. Each leaf is committed to its devices, as the leaves
    that a step returns are; otherwise the second step would compile the program once more.
    """
    donated = () if in_host_memory(tx) else (0,)  # a buffer of the device cannot become one of the host
    init, shardings = partial(init_state, tx, seed=seed), None
    if tensor_shards() > 1 and not isinstance(tx, HostOffload):
        shardings = adapter_shardings(jax.sharding.get_mesh(), adapter, jax.eval_shape(init, adapter))
    state = jax.jit(init, donate_argnums=donated, out_shardings=shardings)(adapter)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))


def train_step(
    graphdef: Any,
    tx: Transformation,
    loss_fn: LossFunction,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    unit: Unit = TOKENS,
    loss_limit: Array | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Return the state after one update, and the metrics of the step.

    The metrics are `loss` and the further sums of `loss_fn`, all of them means over the units; `grad_norm`, before clipping;
    and the number of units, under the unit's name.

    Args:
        graphdef: the graph of the model.
        tx: the optimizer.
        loss_fn: the loss of a micro-batch.
        state: the state before the update.
        frozen: the values of the model that do not train.
        batch: arrays `[micro-batches, b, t]` that `loss_fn` and `unit` read.
        unit: the loss is divided by their number.
        loss_limit: a float32 scalar. If the loss is above it, or the loss or the gradient is not finite, the adapter and the
            state of the optimizer stay as they are, and only the step is counted. None: every update is done.
    """
    units = unit.count(batch)
    total = jnp.maximum(units, 1.0)
    count = jax.tree.leaves(batch)[0].shape[0]
    keys = jax.random.split(jax.random.fold_in(jax.random.key(state.seed), state.step), count)

    def loss_of(micro_batch: Batch, key: Array, adapter: Any) -> tuple[Array, dict[str, Array]]:
        sums = _loss_and_sums(loss_fn(nnx.merge(graphdef, adapter, frozen), micro_batch, key))
        loss, more = jax.tree.map(lambda x: x / total, sums)
        return loss, {"loss": loss, **more}

    if in_host_memory(tx):
        means, gradient = _host_gradient(loss_of, state.adapter, batch, keys)
    elif keys.size == 1:
        loss = partial(loss_of, *jax.tree.map(lambda x: x[0], (batch, keys)))
        gradient, means = jax.grad(loss, has_aux=True)(state.adapter)
    else:
        means, gradient = _device_gradient(loss_of, state.adapter, batch, keys)

    allowed = None if loss_limit is None else jnp.isfinite(means["loss"]) & (means["loss"] <= loss_limit)
    if isinstance(tx, HostOffload):
        adapter, opt_state, norm = tx.apply(gradient, state.opt_state, state.adapter, allowed)
    else:
        updates, opt_state = tx.update(gradient, state.opt_state, state.adapter)
        adapter, norm = optax.apply_updates(state.adapter, updates), optax.tree.norm(gradient)
        if allowed is not None:
            adapter, opt_state = chosen(allowed & jnp.isfinite(norm), (adapter, opt_state), (state.adapter, state.opt_state))
    metrics = {**means, "grad_norm": norm, unit.name: units}
    return TrainState(state.step + 1, adapter, opt_state, state.seed), metrics


def _device_gradient(loss_of: Callable[..., Any], adapter: Any, batch: Batch, keys: Array) -> tuple[Any, Any]:
    """Return (means, gradient) over all micro-batches.

    The backward pass of each micro-batch adds every layer's gradient to the sum in place, so that no second copy exists.
    """
    sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), adapter)

    def add(_: None, inputs: tuple[Batch, Array]) -> tuple[None, Any]:
        loss, pull_back, means = jax.vjp(partial(loss_of, *inputs), adapter, has_aux=True)
        pull_back.with_refs(sums)(jnp.ones_like(loss))
        return None, means

    _, means = jax.lax.scan(add, None, (batch, keys))
    return jax.tree.map(lambda x: x.sum(0), means), jax.tree.map(jax.freeze, sums)


def _host_gradient(loss_of: Callable[..., Any], adapter: Any, batch: Batch, keys: Array) -> tuple[Any, Any]:
    """Return (means, gradient) over all micro-batches for an adapter in host memory; the gradient is there too."""
    if keys.size == 1:
        gradient, means = host_gradient(partial(loss_of, *jax.tree.map(lambda x: x[0], (batch, keys))), adapter)
        return means, gradient

    def add(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, Any]:
        gradient, means = host_gradient(partial(loss_of, *inputs), adapter)
        return host_add(total, gradient), means

    gradient, means = jax.lax.scan(add, host_zeros(adapter), (batch, keys))
    return jax.tree.map(lambda x: x.sum(0), means), gradient


def host_memory_options(platform: str) -> dict[str, str]:
    """Return XLA's options for a step that stores residuals or state in host memory, on a platform.

    XLA for GPUs recomputes values where a program needs more memory than the device has, and counts arrays in host memory as
    if they were on the device. It then recomputes what would fit: 9 % more traffic and 2 GiB more memory in a step of
    1 x 262144 tokens. With these options its limit is out of reach.
    """
    return {"xla_gpu_memory_limit_slop_factor": "10000"} if platform in ("gpu", "cuda") else {}  # per cent of the memory


def jit_train_step(
    graphdef: Any,
    tx: Transformation,
    loss_fn: LossFunction,
    state: TrainState,
    *,
    unit: Unit = TOKENS,
    compiler_options: dict[str, str] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Return the jitted step. It donates the old state, and each leaf of the new state has the sharding of the old one.

    It may be given a fourth argument, the `loss_limit` of `train_step`.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def step(state: TrainState, frozen: Any, batch: Batch, loss_limit: Array | None = None) -> Any:
        return train_step(graphdef, tx, loss_fn, state, frozen, batch, unit=unit, loss_limit=loss_limit)

    step.__name__ = train_step.__name__  # the program's name in profiles and compiled text
    options: Any = compiler_options or None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def jit_eval_step(
    graphdef: Any, loss_fn: LossFunction, *, unit: Unit = TOKENS
) -> Callable[[Any, Any, Batch], tuple[dict[str, Array], Array]]:
    """Return the jitted evaluation step, without dropout: (adapter, frozen, micro-batch `[b, t]`) to (sums, units).

    The sums are `loss` and the further sums that `loss_fn` reports.
    """

    def step(adapter: Any, frozen: Any, batch: Batch) -> tuple[dict[str, Array], Array]:
        loss, more = _loss_and_sums(loss_fn(nnx.merge(graphdef, to_device(adapter), frozen), batch, None))
        return {"loss": loss, **more}, unit.count(batch)

    return jax.jit(step)


def _loss_and_sums(result: Array | tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array]]:
    return result if isinstance(result, tuple) else (result, {})
