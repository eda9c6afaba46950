"""Direct preference optimisation of an adapter (Rafailov et al. 2023).

    p = Σ log π(token)       over the learned tokens of a row, with the adapter
    r = the same             without it: the reference is the frozen base itself
    reward = beta (p - r)    of the chosen and of the rejected answer
    loss = -(1 - s) log σ(reward_chosen - reward_rejected) - s log σ(reward_rejected - reward_chosen)

s is the label smoothing: the assumed share of pairs whose preference is the wrong way round. Chosen and rejected answers go
    through the model as one batch, and through the head in chunks (`train.cross_entropy`), so that all logits never exist at
    once.
The reference has no weights of its own and saves nothing for the backward pass: nothing in it depends on the adapter.

Where training continues from an adapter, the reference is the model as it was then, as in TRL: `with_reference` stores a
    copy of that adapter, some megabytes, among the model's frozen values.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from qlora_jax.nn import Linear
from qlora_jax.nn.parallel import ReplicatedVariable
from qlora_jax.peft import Prompt
from qlora_jax.train.loss import token_log_probabilities
from qlora_jax.train.step import Unit


def dpo_loss(
    model: Any,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return the summed loss of a batch's pairs, and the sums of the rewards under the names that TRL reports.

    These are `rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies`.

    Args:
        model: a `CausalLM` with an adapter; the reference is the adapter that `with_reference` stored, else the base.
        batch: `chosen_inputs`, `chosen_targets`, `chosen_loss_mask` and the same of `rejected_`, each `[b, t]`. A pair with
            nothing to learn on one of its sides does not count.
        key: the random key of the dropout; the reference has no dropout.
        beta: how closely the tuned model is held to the reference; higher is closer.
        label_smoothing: the assumed share of pairs whose preference is the wrong way round.
    """
    losses, rewards = pair_losses(model, batch, key, beta=beta, label_smoothing=label_smoothing)
    return losses.sum(), {name: value.sum() for name, value in rewards.items()}


def pair_losses(
    model: Any,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None,
    *,
    beta: float | Float[Array, " b"],
    label_smoothing: float | Float[Array, " b"],
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """Return the terms of the sums of `dpo_loss`, one for each pair; those of pairs that do not count are 0.

    The batch may have `adapter_ids`, the slots of a bank of adapters, whose reference is the base.
    """
    both = {
        name: jnp.concatenate([batch[f"{side}_{name}"] for side in ("chosen", "rejected")])
        for name in ("inputs", "targets", "loss_mask")
    }
    if "adapter_ids" in batch:
        both["adapter_ids"] = jnp.concatenate([batch["adapter_ids"]] * 2)
    tuned = token_log_probabilities(model, both, key).sum(1)
    reference = jax.lax.stop_gradient(token_log_probabilities(_reference_of(model), both).sum(1))
    rewards_chosen, rewards_rejected = (beta * side for side in jnp.split(tuned - reference, 2))
    margin = rewards_chosen - rewards_rejected
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    counts = _counts(batch)
    rewards = {"chosen": rewards_chosen, "rejected": rewards_rejected, "margins": margin, "accuracies": (margin > 0) * 1.0}
    return losses * counts, {f"rewards/{name}": value * counts for name, value in rewards.items()}


REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))


def without_adapter(model: Any) -> Any:
    """Return the model without its adapter; it shares all other arrays with `model`, which is not changed."""
    graphdef, state = nnx.split(model)
    bare = nnx.merge(graphdef, state)
    for _, module in list(nnx.iter_modules(bare)):
        if isinstance(module, Linear):
            module.adapter = None
        for name in [name for name, value in vars(module).items() if isinstance(value, nnx.LoRAParam | Prompt)]:
            setattr(module, name, None)
    return bare


class ReferenceAdapter(ReplicatedVariable):
    """The adapter of the reference, as the pytree of arrays that `nnx.to_pure_dict` returns."""


def with_reference(model: Any) -> Any:
    """Return the model with a copy of its adapter as the reference of `dpo_loss`; other arrays are shared with `model`."""
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state)
    # The step donates the buffers of the adapter itself, so the reference needs a copy.
    copy.reference = ReferenceAdapter(jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))))
    return copy


def _reference_of(model: Any) -> Any:
    """Return the model with the stored reference as its adapter, or without an adapter if none is stored."""
    graphdef, adapter, reference, rest = nnx.split(model, nnx.LoRAParam, ReferenceAdapter, ...)
    if not jax.tree.leaves(reference):
        return without_adapter(model)
    adapter = jax.tree.map(lambda leaf: leaf, adapter)  # makes new variables: those of a split belong to the model
    stored: Any = reference
    nnx.replace_by_pure_dict(adapter, stored["reference"].get_value())
    return nnx.merge(graphdef, adapter, reference, rest)


def _counts(batch: Mapping[str, Array]) -> Array:
    """Return float32 `[..., b]`: 1 for the pairs that count, 0 for the pairs that only fill up a batch."""
    learned = [batch[f"{side}_loss_mask"].sum(-1) > 0 for side in ("chosen", "rejected")]
    return (learned[0] & learned[1]).astype(jnp.float32)


PAIRS = Unit("pairs", lambda batch: _counts(batch).sum())
