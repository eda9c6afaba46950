"""The training step: a pure function of (state, frozen, batch).

    total = number of learned tokens (or of another unit) in all micro-batches
    for each micro-batch:   gradient += d(summed loss) / d(adapter)
    adapter, optimizer state = optimizer(gradient / total)

Dividing by the units of the whole batch, not of each micro-batch, makes the step the same however the batch is cut. Only
the adapter is differentiated, updated and donated; the frozen part is read.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from qlora_jax.nn.host import to_device, to_host
from qlora_jax.train.offload import HostOffload, host_add, host_gradient, host_zeros
from qlora_jax.train.optim import Optimizer

Transformation = optax.GradientTransformation | Optimizer | HostOffload
Batch = Mapping[str, Array]
# (model, micro-batch, random key or None) to the summed loss of the micro-batch, or to that and more sums to report.
LossFunction = Callable[[Any, Batch, Array | None], Array | tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a loss is a mean over.

    Attributes:
        name: of the metric that holds the count.
        count: how many a batch `[..., b, t]` holds, float32 scalar.
    """

    name: str
    count: Callable[[Batch], Array]


TOKENS = Unit("tokens", lambda batch: batch["loss_mask"].sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes.

    Attributes:
        step: int32 scalar, updates done.
        adapter: the trainable parameters.
        opt_state: of the optimizer.
        seed: uint32 scalar; dropout of a step draws from (seed, step) alone, so that a resumed run draws the same.
    """

    step: Array
    adapter: Any
    opt_state: Any
    seed: Array


def split(model: nnx.Module) -> tuple[Any, Any, Any]:
    """(graphdef, adapter, frozen): the graph, the LoRA parameters, and all the rest."""
    graphdef, adapter, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, adapter, frozen


def init_state(tx: Transformation, adapter: Any, seed: int = 0) -> TrainState:
    """The state before the first step, to be traced; the optimizer's part is where the optimizer puts it."""
    if not jax.tree.leaves(adapter):
        raise ValueError("the model has no LoRA parameters: expected one that was built with an adapter")
    opt_state = tx.init(adapter)
    if in_host_memory(tx):
        adapter = to_host(adapter)
    return TrainState(step=jnp.zeros((), jnp.int32), adapter=adapter, opt_state=opt_state, seed=jnp.uint32(seed))


def in_host_memory(tx: Transformation) -> bool:
    """Whether the adapter is in host memory between steps."""
    return isinstance(tx, HostOffload) and tx.adapter


def create_state(tx: Transformation, adapter: Any, seed: int = 0) -> TrainState:
    """`init_state` on the devices: what training starts from.

    The adapter's buffers are taken over, so that it is in memory once. The leaves are committed to where they lie, as
    those that a step returns are; otherwise the second step would compile the program once more.
    """
    donated = () if in_host_memory(tx) else (0,)  # a buffer of the device cannot become one of the host
    state = jax.jit(lambda adapter: init_state(tx, adapter, seed), donate_argnums=donated)(adapter)
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
) -> tuple[TrainState, dict[str, Array]]:
    """One update.

    Args:
        batch: arrays `[micro-batches, b, t]`, with what `loss_fn` and `unit` need.
        unit: what the loss is divided by.

    Returns:
        The next state, and the metrics: `loss` and what else `loss_fn` reports, all of them means over the units;
        `grad_norm` (before clipping); and the number of units, under their name.
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

    if isinstance(tx, HostOffload):
        adapter, opt_state, norm = tx.apply(gradient, state.opt_state, state.adapter)
    else:
        updates, opt_state = tx.update(gradient, state.opt_state, state.adapter)
        adapter, norm = optax.apply_updates(state.adapter, updates), optax.tree.norm(gradient)
    metrics = {**means, "grad_norm": norm, unit.name: units}
    return TrainState(state.step + 1, adapter, opt_state, state.seed), metrics


def _device_gradient(loss_of: Callable[..., Any], adapter: Any, batch: Batch, keys: Array) -> tuple[Any, Any]:
    """(means, gradient) over all micro-batches. The backward pass of each adds every layer's part to the sum where it lies:
    there never is a second copy."""
    sums = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), adapter)

    def add(_: None, inputs: tuple[Batch, Array]) -> tuple[None, Any]:
        loss, pull_back, means = jax.vjp(partial(loss_of, *inputs), adapter, has_aux=True)
        pull_back.with_refs(sums)(jnp.ones_like(loss))
        return None, means

    _, means = jax.lax.scan(add, None, (batch, keys))
    return jax.tree.map(lambda x: x.sum(0), means), jax.tree.map(jax.freeze, sums)


def _host_gradient(loss_of: Callable[..., Any], adapter: Any, batch: Batch, keys: Array) -> tuple[Any, Any]:
    """The same for an adapter in host memory, where its gradient is, too."""
    if keys.size == 1:
        gradient, means = host_gradient(partial(loss_of, *jax.tree.map(lambda x: x[0], (batch, keys))), adapter)
        return means, gradient

    def add(total: Any, inputs: tuple[Batch, Array]) -> tuple[Any, Any]:
        gradient, means = host_gradient(partial(loss_of, *inputs), adapter)
        return host_add(total, gradient), means

    gradient, means = jax.lax.scan(add, host_zeros(adapter), (batch, keys))
    return jax.tree.map(lambda x: x.sum(0), means), gradient


def jit_train_step(
    graphdef: Any, tx: Transformation, loss_fn: LossFunction, state: TrainState, *, unit: Unit = TOKENS
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Array]]]:
    """The compiled step; the old state is donated, and each leaf of the new one stays where the old one was."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = partial(train_step, graphdef, tx, loss_fn, unit=unit)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def jit_eval_step(
    graphdef: Any, loss_fn: LossFunction, *, unit: Unit = TOKENS
) -> Callable[[Any, Any, Batch], tuple[dict[str, Array], Array]]:
    """The compiled (adapter, frozen, micro-batch `[b, t]`) -> (sums, units), without dropout. The sums are `loss` and what
    else `loss_fn` reports."""

    def step(adapter: Any, frozen: Any, batch: Batch) -> tuple[dict[str, Array], Array]:
        loss, more = _loss_and_sums(loss_fn(nnx.merge(graphdef, to_device(adapter), frozen), batch, None))
        return {"loss": loss, **more}, unit.count(batch)

    return jax.jit(step)


def compiled_first(step: Callable[..., Any], ahead: Future[jax.stages.Compiled] | None = None) -> Callable[..., Any]:
    """A jitted step that compiles before it runs on a batch, its last argument, of new shapes, so that compiler and program
    do not need the machine's memory at the same time.

    A compiler frees some hundred megabytes, which the C library would keep; here they go back to the system in between.

    Args:
        ahead: the same step as it is compiled elsewhere (ahead.py) for arguments of the first shapes, beside what runs there
            before; None: it is not.
    """
    programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(arguments[-1]))
        if shapes not in programs:
            programs[shapes] = _program(step, None if programs else ahead, arguments)
            if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # of glibc alone
                trim(0)
        return programs[shapes](*arguments)

    return call


def _program(step: Any, ahead: Future[jax.stages.Compiled] | None, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """What runs the step: a program that is there, or the step itself, which now finds its own."""
    if ahead is not None and _takes(compiled := ahead.result(), arguments):
        return compiled
    step.lower(*arguments).compile()
    return step


def _takes(compiled: jax.stages.Compiled, arguments: tuple[Any, ...]) -> bool:
    """Whether a program is for arguments of these shapes that lie where these do."""
    expected, tree = jax.tree.flatten(compiled.args_info[0])
    # The place of an argument that the program does not read is None.
    places = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda place: place is None)

    def lies_at(leaf: Any, place: jax.sharding.Sharding | None) -> bool:
        if place is None or not isinstance(leaf, Array) or not leaf.committed:
            return True
        return leaf.sharding.is_equivalent_to(place, leaf.ndim)

    return tree == jax.tree.structure(arguments) and all(
        (info.shape, info.dtype) == (leaf.shape, leaf.dtype) and lies_at(leaf, place)
        for info, place, leaf in zip(expected, places, jax.tree.leaves(arguments), strict=True)
    )


def _loss_and_sums(result: Array | tuple[Array, dict[str, Array]]) -> tuple[Array, dict[str, Array]]:
    return result if isinstance(result, tuple) else (result, {})
