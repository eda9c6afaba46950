"""The update of many tenants at once: AdamW, for each slot with its own learning rate, schedule, betas, decay and clip."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from qlora_jax.train.optim import SCHEDULES
from qlora_jax.train.tenant_slots import TenantsState

__all__ = ["Sums", "update"]


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


def update(state: TenantsState, slots: Array, sums: Sums) -> tuple[TenantsState, dict[str, Array]]:
    """Return the state after one update of the slots that have rows, and metrics `[S]`.

    The metrics are the means; `grad_norm`, before clipping; `learning_rate`; and `finite`, which is false for a slot that
    keeps its values and state since its loss or gradient is not finite.

    If a step has all slots but that of the bare base, they are updated at once, each array by one loop that reads and writes
    it once; a step with fewer goes through its slots one at a time, so that the others are not read.

    Args:
        state: of K slots; all slots but those of `slots` keep their bits.
        slots: int32 `[S]`, each slot once; K for an entry without a tenant.
        sums: of the whole step.
    """
    held = state.count.shape[0]
    count = state.count.at[slots].get(mode="clip")
    own = {name: leaf.at[slots].get(mode="clip") for name, leaf in state.settings.items()}
    norm = _norms(jax.tree.leaves(sums.gradient), slots.shape[0])
    finite = jnp.isfinite(norm) & jnp.isfinite(sums.means["loss"])
    rate, done = _learning_rate(count, own), count + 1
    own |= {
        "clip": jnp.where(norm < own["max_grad_norm"], 1.0, own["max_grad_norm"] / norm),
        "rate": rate,
        "updates": done.astype(jnp.float32),
        "moves": finite & (slots < held),
    }
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.adapter)]
    gradients, tree = jax.tree.leaves(sums.gradient), jax.tree.structure(state.adapter)
    stacks = list(zip(*(jax.tree.leaves(part) for part in (state.adapter, state.mu, state.nu)), strict=True))
    change = _all_slots if slots.shape[0] >= held - 1 else _slot_by_slot
    stacks = change(slots, own, names, gradients, stacks)
    adapter, mu, nu = (tree.unflatten(part) for part in zip(*stacks, strict=True))
    new_count = state.count.at[slots].set(jnp.where(finite, done, count), mode="drop")
    metrics = {**sums.means, "grad_norm": norm, "learning_rate": rate, "finite": finite}
    return TenantsState(adapter, state.scale, mu, nu, new_count, state.settings), metrics


_Stack = tuple[Array, Array, Array]  # a leaf of the adapter and its moments


def _all_slots(
    slots: Array, own: Mapping[str, Array], names: list[str], gradients: list[Array], stacks: list[_Stack]
) -> list[_Stack]:
    """Return the leaves with all slots updated at once; `own` has the settings of the entries of `slots`."""
    held = stacks[0][0].shape[1]
    place = jnp.zeros(held, jnp.int32).at[slots].set(jnp.arange(slots.shape[0], dtype=jnp.int32), mode="drop")
    met = jnp.zeros(held, bool).at[slots].set(own["moves"], mode="drop")
    mine = {name: values[place][None, :, None, None] for name, values in own.items()}
    moves = met[None, :, None, None]

    def moved(name: str, gradient: Array, stack: _Stack) -> _Stack:
        new = _adamw(name, gradient[:, place], *stack, mine)
        kept = [jnp.where(moves, one, before) for one, before in zip(new, stack, strict=True)]
        return kept[0], kept[1], kept[2]

    return [moved(*parts) for parts in zip(names, gradients, stacks, strict=True)]


def _slot_by_slot(
    slots: Array, own: Mapping[str, Array], names: list[str], gradients: list[Array], stacks: list[_Stack]
) -> list[_Stack]:
    """Return the leaves with the slots of `slots` updated in place, one at a time."""
    read = jnp.minimum(slots, stacks[0][0].shape[1] - 1)

    def change(place: Array, stacks: list[_Stack]) -> list[_Stack]:
        mine = {name: values[place] for name, values in own.items()}

        def moved(name: str, gradient: Array, stack: _Stack) -> _Stack:
            old = [jax.lax.dynamic_index_in_dim(leaf, read[place], 1, keepdims=False) for leaf in stack]
            of_slot = jax.lax.dynamic_index_in_dim(gradient, place, 1, keepdims=False)
            new = _adamw(name, of_slot, old[0], old[1], old[2], mine)
            kept = [jnp.where(mine["moves"], one, before) for one, before in zip(new, old, strict=True)]
            pairs = zip(stack, kept, strict=True)
            put = [jax.lax.dynamic_update_index_in_dim(leaf, one, read[place], 1) for leaf, one in pairs]
            return put[0], put[1], put[2]

        return [moved(*parts) for parts in zip(names, gradients, stacks, strict=True)]

    return jax.lax.fori_loop(0, slots.shape[0], change, stacks)


def _adamw(
    name: str, gradient: Array, value: Array, first: Array, second: Array, own: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    """Return the values and moments after an update with their own settings; `name` is that of the leaf."""
    gradient = gradient * own["clip"]
    first = own["beta1"] * first + own["rest_of_beta1"] * gradient
    second = own["beta2"] * second + own["rest_of_beta2"] * (gradient * gradient)
    step = first / (1 - own["beta1"] ** own["updates"])
    step = step / (jnp.sqrt(second / (1 - own["beta2"] ** own["updates"])) + own["epsilon"])
    rate = own["rate"] * own["rate_of_b"] if "lora_b" in name else own["rate"]
    return value - rate * (step + own["weight_decay"] * value), first, second


def _norms(gradients: list[Array], slots: int) -> Array:
    """Return the norm of each slot's gradient, `[S]`.

    The slots go through one loop: a sum over all of them at once may add up in an order that depends on their number, and
    the norm of a tenant, by which its gradient is clipped, would depend on who else trains.
    """

    def norm(place: Array) -> Array:
        own = [jax.lax.dynamic_index_in_dim(leaf, place, 1, keepdims=False) for leaf in gradients]
        return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in own))

    return jax.lax.map(norm, jnp.arange(slots))


def _learning_rate(count: Array, own: Mapping[str, Array]) -> Array:
    """Return the learning rate of each slot after so many updates; see `optim.learning_rate_schedule`."""
    step = count.astype(jnp.float32)
    gone = jnp.minimum(step - own["warmup"], own["rest"]) / own["rest"]
    falling = {"constant": jnp.ones_like(gone), "linear": 1 - gone, "cosine": 0.5 * (1 + jnp.cos(jnp.pi * gone))}
    after = jnp.select([own["schedule"] == SCHEDULES.index(kind) for kind in falling], list(falling.values()))
    return own["peak"] * jnp.where(step < own["warmup"], (step + 1) / (own["warmup"] + 1), after)
