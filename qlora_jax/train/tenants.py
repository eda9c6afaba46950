"""Training of many tenants' adapters over one frozen base: pure functions of explicit state.

    loss              sum over tenants of the mean over the tenant's own tokens; gradients of different slots do not meet
    for each micro-batch:   sums += gradient of S slots                              `accumulate`; rows of any tenants
    for each of S slots:    clip by its own norm, AdamW with its own settings        `update`
                            the new values where the slot has rows and all is finite, else the old bits

The state of a slot is its A and B, the two moments of AdamW, the count of its updates and its settings (learning rate,
schedule, decays). All of it is stacked over the K slots of a bank (`peft.bank`), so that its bytes are K times those of a
slot. A step takes A and B of the S slots of its tenants out of the stacks, and updates these slots in place; its operations
and bytes grow with S and with the rows. Which slots and rows these are is data and not part of the program: tenants join,
pause, finish and leave without a compilation.

A value that is not finite stays in its own slot: rows of a batch do not meet in the model, gradients of slots are summed by
index and never by a product with zeros, and the update chooses with `where`. A tenant's loss divides by its own tokens of
the whole step, as `train.step` does, so that a tenant learns what a run of its own would.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.peft.bank import SlotScale, take_slots
from qlora_jax.train.dpo import REWARDS, pair_losses
from qlora_jax.train.loss import decoder_hidden, row_losses
from qlora_jax.train.optim import SCHEDULES, Schedule
from qlora_jax.train.spec import OptimizerSpec

__all__ = [
    "METRICS",
    "ROW_LOSSES",
    "RowLoss",
    "Sums",
    "TenantPrograms",
    "TenantsState",
    "accumulate",
    "get_slot",
    "init_tenants",
    "language_model_row_losses",
    "new_slot",
    "preference_row_losses",
    "put_slot",
    "slot_settings",
    "split_tenants",
    "tenant_programs",
    "update",
]

Batch = Mapping[str, Array]
# (model, micro-batch with adapter_ids) to the summed loss of each row and further metrics, float32 [rows] each
RowLoss = Callable[[Any, Batch], dict[str, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TenantsState:
    """What training changes, of all slots, or of one slot (then without the axis of the slots).

    Attributes:
        adapter: A and B of all stacks; the slots are the second axis of each leaf, behind the layers.
        scale: the scalings of all stacks, `[layers, K]`.
        mu, nu: the first and second moment, each like `adapter`.
        count: int32 `[K]`, the updates done.
        settings: float32 arrays `[K]` by name, of `slot_settings`.
    """

    adapter: Any
    scale: Any
    mu: Any
    nu: Any
    count: Array
    settings: dict[str, Array]

    @property
    def stacks(self) -> tuple[Any, Any, Any, Any]:
        """The parts whose slots are the second axis."""
        return self.adapter, self.scale, self.mu, self.nu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """What the micro-batches of a step add up, of S slots.

    Attributes:
        gradient: like the adapter of S slots.
        means: float32 `[S]` by the names of metrics, `loss` among them.
    """

    gradient: Any
    means: dict[str, Array]


def slot_settings(
    optimizer: OptimizerSpec, schedule: Schedule, peak: float, steps: int, warmup_steps: int
) -> dict[str, np.ndarray]:
    """Return the settings of a slot: those of `OptimizerSpec.build(learning_rate_schedule(…))` as float32 scalars.

    Raises:
        OptionError: another optimizer than AdamW, or one whose state is in host memory.
    """
    if optimizer.name != "adamw" or optimizer.host_optimizer:
        found = "host_offload" if optimizer.host_optimizer else optimizer.name
        raise OptionError(f"optimizer: expected adamw on the device for many tenants at once, found {found}")
    beta1 = 0.9 if optimizer.beta1 is None else optimizer.beta1
    beta2 = 0.999 if optimizer.beta2 is None else optimizer.beta2
    values = {
        "peak": peak,
        "schedule": SCHEDULES.index(schedule),
        "rest": max(steps - warmup_steps, 1),
        "warmup": warmup_steps,
        "beta1": beta1,
        "beta2": beta2,
        "rest_of_beta1": 1 - beta1,  # in float32, 1 - 0.999 would be off by 1e-5 of itself
        "rest_of_beta2": 1 - beta2,
        "epsilon": 1e-8,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm or np.inf,
        "rate_of_b": optimizer.loraplus_lr_ratio or 1.0,
    }
    return {name: np.float32(value) for name, value in values.items()}  # pyright: ignore[reportReturnType]


def split_tenants(model: Any) -> tuple[Any, Any, Any, Any]:
    """Return (graphdef, adapter, scale, frozen) of a model that was made with a `Bank`."""
    graphdef, adapter, scale, frozen = nnx.split(model, nnx.LoRAParam, SlotScale, ...)
    return graphdef, adapter, scale, frozen


def init_tenants(adapter: Any, scale: Any) -> TenantsState:
    """Return the state of empty slots, for use under tracing or `jax.eval_shape`."""
    slots = jax.tree.leaves(scale)[0].shape[1]
    zeros = jax.tree.map(jnp.zeros_like, adapter)
    names = slot_settings(OptimizerSpec(), "constant", 0.0, 1, 0)
    settings = {name: jnp.zeros((slots,), jnp.float32) for name in names}
    count = jnp.zeros((slots,), jnp.int32)
    return TenantsState(zeros, scale, zeros, jax.tree.map(jnp.zeros_like, adapter), count, settings)


def new_slot(adapter: Any, scale: Any, settings: Mapping[str, np.ndarray]) -> TenantsState:
    """Return the state of one slot before its first update; its values are `adapter` and `scale`, as NumPy arrays."""
    zeros = jax.tree.map(np.zeros_like, adapter)
    return TenantsState(adapter, scale, zeros, jax.tree.map(np.zeros_like, adapter), np.int32(0), dict(settings))  # pyright: ignore[reportArgumentType]


@partial(jax.jit, donate_argnums=0)
def put_slot(state: TenantsState, slot: int | Array, values: TenantsState) -> TenantsState:
    """Return the state with a tenant in a slot, in place: the old state is donated. One program serves all slots."""
    adapter, scale, mu, nu = jax.tree.map(lambda leaf, new: leaf.at[:, slot].set(new), state.stacks, values.stacks)
    count = state.count.at[slot].set(values.count)
    settings = {name: leaf.at[slot].set(values.settings[name]) for name, leaf in state.settings.items()}
    return TenantsState(adapter, scale, mu, nu, count, settings)


@jax.jit
def get_slot(state: TenantsState, slot: int | Array) -> TenantsState:
    """Return the state of the tenant in a slot, which may be kept in main memory and put into any slot later."""
    adapter, scale, mu, nu = jax.tree.map(lambda leaf: leaf[:, slot], state.stacks)
    settings = {name: leaf[slot] for name, leaf in state.settings.items()}
    return TenantsState(adapter, scale, mu, nu, state.count[slot], settings)


def language_model_row_losses(model: Any, batch: Batch) -> dict[str, Array]:
    """Return the summed cross-entropy of each row over its learned tokens; see `language_model_loss`."""
    return {"loss": row_losses(model, decoder_hidden(model, batch, None), batch["targets"], batch["loss_mask"])}


def preference_row_losses(model: Any, batch: Batch) -> dict[str, Array]:
    """Return the loss and the rewards of each pair; see `dpo_loss`. `beta` and `label_smoothing` are `[pairs]`."""
    given = {name: batch[name] for name in ("beta", "label_smoothing")}
    loss, rewards = pair_losses(model, batch, None, beta=given["beta"], label_smoothing=given["label_smoothing"])
    return {"loss": loss, **rewards}


ROW_LOSSES: dict[str, RowLoss] = {"sft": language_model_row_losses, "dpo": preference_row_losses}
METRICS = ("loss", *REWARDS)  # of all objectives


def accumulate(graphdef: Any, row_loss: RowLoss, adapter: Any, scale: Any, sums: Sums, frozen: Any, batch: Batch) -> Sums:
    """Return the sums with those of one micro-batch added.

    Args:
        graphdef: the graph of the model.
        row_loss: the losses of the rows.
        adapter, scale: of S slots, as `take_slots` returns them.
        sums: so far.
        frozen: the values of the model that do not train.
        batch: arrays `[rows, t]` that `row_loss` reads; `adapter_ids` int32 `[rows]`, which of the S slots a row belongs
            to; `share` float32 `[rows]`, one divided by the learned tokens (or pairs) of the row's tenant in the whole step,
            and 0 in rows of padding, whose `loss_mask` is 0 as well.
    """

    def loss(adapter: Any) -> tuple[Array, dict[str, Array]]:
        rows = row_loss(nnx.merge(graphdef, adapter, scale, frozen), batch)
        shares = {name: values * batch["share"] for name, values in rows.items()}
        return shares["loss"].sum(), shares

    gradient, rows = jax.grad(loss, has_aux=True)(adapter)
    summed = jax.tree.map(jnp.add, sums.gradient, gradient)
    means = {name: sums.means[name].at[batch["adapter_ids"]].add(values) for name, values in rows.items()}
    return Sums(summed, sums.means | means)


def update(state: TenantsState, slots: Array, sums: Sums) -> tuple[TenantsState, dict[str, Array]]:
    """Return the state after one update of the slots that have rows, and metrics `[S]`.

    The metrics are the means; `grad_norm`, before clipping; `learning_rate`; and `finite`, which is false for a slot that
    keeps its values and state since its loss or gradient is not finite.

    Args:
        state: of K slots; all slots but those of `slots` keep their bits.
        slots: int32 `[S]`, each slot once; K for an entry without a tenant.
        sums: of the whole step.
    """
    count = state.count.at[slots].get(mode="clip")
    own = {name: leaf.at[slots].get(mode="clip") for name, leaf in state.settings.items()}
    norm = jnp.sqrt(sum(_of_slots(leaf * leaf) for leaf in jax.tree.leaves(sums.gradient)))
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.means["loss"])
    rate, done = _learning_rate(count, own), count + 1
    own |= {
        "clip": jnp.where(norm < own["max_grad_norm"], 1.0, own["max_grad_norm"] / norm),
        "rate": rate,
        "updates": done.astype(jnp.float32),
        "moves": finite & (slots < state.count.shape[0]),
    }
    slots_read = jnp.minimum(slots, state.count.shape[0] - 1)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.adapter)]
    gradients, tree = jax.tree.leaves(sums.gradient), jax.tree.structure(state.adapter)

    def change(place: Array, stacks: list[tuple[Array, Array, Array]]) -> list[tuple[Array, Array, Array]]:
        """Update one slot in place: its values and state are read and written once."""
        mine = {name: values[place] for name, values in own.items()}

        def moved(name: str, gradient: Array, stack: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            old = [jax.lax.dynamic_index_in_dim(leaf, slots_read[place], 1, keepdims=False) for leaf in stack]
            of_slot = jax.lax.dynamic_index_in_dim(gradient, place, 1, keepdims=False)
            new = _adamw(name, of_slot, old[0], old[1], old[2], mine)
            kept = [jnp.where(mine["moves"], one, before) for one, before in zip(new, old, strict=True)]
            pairs = zip(stack, kept, strict=True)
            put = [jax.lax.dynamic_update_index_in_dim(leaf, one, slots_read[place], 1) for leaf, one in pairs]
            return put[0], put[1], put[2]

        return [moved(*parts) for parts in zip(names, gradients, stacks, strict=True)]

    stacks = list(zip(*(jax.tree.leaves(part) for part in (state.adapter, state.mu, state.nu)), strict=True))
    stacks = jax.lax.fori_loop(0, slots.shape[0], change, stacks)
    adapter, mu, nu = (tree.unflatten(part) for part in zip(*stacks, strict=True))
    new_count = state.count.at[slots].set(jnp.where(finite, done, count), mode="drop")
    metrics = {**sums.means, "grad_norm": norm, "learning_rate": rate, "finite": finite}
    return TenantsState(adapter, state.scale, mu, nu, new_count, state.settings), metrics


def _adamw(
    name: str, gradient: Array, value: Array, first: Array, second: Array, own: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    """Return the values and moments of one slot after an update with its own settings; `name` is that of the leaf."""
    gradient = gradient * own["clip"]
    first = own["beta1"] * first + own["rest_of_beta1"] * gradient
    second = own["beta2"] * second + own["rest_of_beta2"] * (gradient * gradient)
    step = first / (1 - own["beta1"] ** own["updates"])
    step = step / (jnp.sqrt(second / (1 - own["beta2"] ** own["updates"])) + own["epsilon"])
    rate = own["rate"] * own["rate_of_b"] if "lora_b" in name else own["rate"]
    return value - rate * (step + own["weight_decay"] * value), first, second


def _of_slots(leaf: Array) -> Array:
    """Return the sums of a leaf `[layers, S, …]` of each slot, `[S]`."""
    return leaf.sum(tuple(axis for axis in range(leaf.ndim) if axis != 1))


def _learning_rate(count: Array, own: Mapping[str, Array]) -> Array:
    """Return the learning rate of each slot after so many updates; see `optim.learning_rate_schedule`."""
    step = count.astype(jnp.float32)
    gone = jnp.minimum(step - own["warmup"], own["rest"]) / own["rest"]
    falling = {"constant": jnp.ones_like(gone), "linear": 1 - gone, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * gone))}
    after = jnp.select([own["schedule"] == SCHEDULES.index(kind) for kind in falling], list(falling.values()))
    return own["peak"] * jnp.where(step < own["warmup"], (step + 1) / (own["warmup"] + 1), after)


@dataclasses.dataclass(frozen=True)
class TenantPrograms:
    """The compiled functions of a step.

    Attributes:
        begin: (state, slots) to (adapter, scale, sums of zeros) of these slots.
        accumulate: by the name of an objective, (adapter, scale, sums, frozen, micro-batch) to the sums; the old ones are
            donated.
        update: (state, slots, sums) to (state, metrics); the old state is donated.
    """

    begin: Callable[[TenantsState, Any], tuple[Any, Any, Sums]]
    accumulate: dict[str, Callable[[Any, Any, Sums, Any, Mapping[str, Any]], Sums]]
    update: Callable[[TenantsState, Any, Sums], tuple[TenantsState, dict[str, Array]]]

    def cache_sizes(self) -> tuple[int, ...]:
        """Return how often each function was compiled."""
        functions: Any = (self.begin, *self.accumulate.values(), self.update)
        return tuple(function._cache_size() for function in functions)


def tenant_programs(graphdef: Any) -> TenantPrograms:
    """Return the jitted functions of a step of many tenants; each compiles when it is first called."""

    def begin(state: TenantsState, slots: Array) -> tuple[Any, Any, Sums]:
        adapter, scale = take_slots(state.adapter, slots), take_slots(state.scale, slots)
        zeros = {name: jnp.zeros(slots.shape, jnp.float32) for name in METRICS}
        return adapter, scale, Sums(jax.tree.map(jnp.zeros_like, adapter), zeros)

    return TenantPrograms(
        jax.jit(begin),
        {name: jax.jit(partial(accumulate, graphdef, loss), donate_argnums=2) for name, loss in ROW_LOSSES.items()},
        jax.jit(update, donate_argnums=0),
    )
