"""Training of many tenants' adapters over one frozen base: pure functions of explicit state.

    loss              sum over tenants of the mean over the tenant's own tokens; gradients of different slots do not meet
    for each micro-batch:   sums += gradient of S slots                              `accumulate`; rows of any tenants
    for each of S slots:    clip by its own norm, AdamW with its own settings        `tenant_update`
                            the new values where the slot has rows and all is finite, else the old bits

The state is in K slots (`train.tenant_slots`). A micro-batch takes the A and B of its rows out of them, and the update
changes the S slots of a step's tenants in place; operations and bytes grow with S and with the rows. Which slots and rows
these are is data and not part of the program: tenants join, pause, finish and leave without a compilation.

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
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from qlora_jax.peft.bank import take_rows
from qlora_jax.train.dpo import REWARDS, pair_losses
from qlora_jax.train.loss import decoder_hidden, row_losses
from qlora_jax.train.tenant_slots import TenantsState
from qlora_jax.train.tenant_update import Sums, update

__all__ = [
    "METRICS",
    "ROW_LOSSES",
    "RowLoss",
    "TenantPrograms",
    "accumulate",
    "language_model_row_losses",
    "preference_row_losses",
    "tenant_programs",
]

Batch = Mapping[str, Array]
# (model, micro-batch with adapter_ids) to the summed loss of each row and further metrics, float32 [rows] each
RowLoss = Callable[[Any, Batch], dict[str, Array]]


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


def accumulate(
    graphdef: Any,
    row_loss: RowLoss,
    dtype: DTypeLike,
    slots: Array,
    state: TenantsState,
    sums: Sums,
    frozen: Any,
    batch: Batch,
) -> Sums:
    """Return the sums with those of one micro-batch added.

    Args:
        graphdef: the graph of the model.
        row_loss: the losses of the rows.
        dtype: of the activations.
        slots: int32 `[S]`, as `update` takes them.
        state: of K slots, of which those of the rows are read.
        sums: so far.
        frozen: the values of the model that do not train.
        batch: arrays `[rows, t]` that `row_loss` reads; `adapter_ids` int32 `[rows]`, which entry of `slots` a row
            belongs to; `share` float32 `[rows]`, one divided by the learned tokens (or pairs) of the row's tenant in the
            whole step, and 0 in rows of padding, whose `loss_mask` is 0 as well.
    """
    places = batch["adapter_ids"]
    adapter, scale = take_rows(state.adapter, state.scale, slots[places], dtype)
    rows_alone = {**batch, "adapter_ids": jnp.arange(places.shape[0], dtype=jnp.int32)}

    def loss(adapter: Any) -> tuple[Array, dict[str, Array]]:
        rows = row_loss(nnx.merge(graphdef, adapter, scale, frozen), rows_alone)
        shares = {name: values * batch["share"] for name, values in rows.items()}
        return shares["loss"].sum(), shares

    gradient, rows = jax.grad(loss, has_aux=True)(adapter)
    own = jax.tree.leaves(gradient)
    leaves, tree = jax.tree.flatten(sums.gradient)
    summed = [leaf.at[:, places].add(one.astype(leaf.dtype)) for leaf, one in zip(leaves, own, strict=True)]
    means = {name: sums.means[name].at[places].add(values) for name, values in rows.items()}
    return Sums(tree.unflatten(summed), sums.means | means)


@dataclasses.dataclass(frozen=True)
class TenantPrograms:
    """The compiled functions of a step.

    Attributes:
        begin: (state, slots) to the sums of a step before its first micro-batch.
        accumulate: by the name of an objective, (slots, state, sums, frozen, micro-batch) to the sums; the old ones are
            donated.
        update: (state, slots, sums) to (state, metrics); the old state is donated.
    """

    begin: Callable[[TenantsState, Any], Sums]
    accumulate: dict[str, Callable[[Any, TenantsState, Sums, Any, Mapping[str, Any]], Sums]]
    update: Callable[[TenantsState, Any, Sums], tuple[TenantsState, dict[str, Array]]]

    def cache_sizes(self) -> tuple[int, ...]:
        """Return how often each function was compiled."""
        functions: Any = (self.begin, *self.accumulate.values(), self.update)
        return tuple(function._cache_size() for function in functions)


def tenant_programs(graphdef: Any, dtype: DTypeLike = "float32") -> TenantPrograms:
    """Return the jitted functions of a step of many tenants; each compiles when it is first called.

    Args:
        graphdef: the graph of the model.
        dtype: of its activations.
    """

    def begin(state: TenantsState, slots: Array) -> Sums:
        met = slots.shape[0]
        gradient = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], met, *leaf.shape[2:]), leaf.dtype), state.adapter)
        return Sums(gradient, {name: jnp.zeros((met,), jnp.float32) for name in METRICS})

    steps = {name: partial(accumulate, graphdef, loss, dtype) for name, loss in ROW_LOSSES.items()}
    return TenantPrograms(
        jax.jit(begin),
        {name: jax.jit(step, donate_argnums=2) for name, step in steps.items()},
        jax.jit(update, donate_argnums=0),
    )
