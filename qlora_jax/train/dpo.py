"""Direct preference optimisation of an adapter (Rafailov et al. 2023).

    p = Σ log π(token)       over the learned tokens of a row, with the adapter
    r = the same             without it: the reference is the frozen base itself
    reward = beta (p - r)    of the chosen and of the rejected answer
    loss = -(1 - s) log σ(reward_chosen - reward_rejected) - s log σ(reward_rejected - reward_chosen)

s is the label smoothing: the share of pairs whose preference is thought to be the wrong way round. Chosen and rejected
answers go through the model as one batch, and through the head in chunks (`train.loss`), so that there are never all logits.
The reference has no weights of its own and keeps nothing for the backward pass: nothing in it depends on the adapter.

Where training goes on from an adapter, the reference is the model as it was then, as in TRL: `with_reference` makes the
model remember that adapter, a copy of some megabytes, among its frozen values.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.nn import Linear
from qlora_jax.nn.parallel import ReplicatedVariable
from qlora_jax.peft import Prompt
from qlora_jax.train.loss import row_losses
from qlora_jax.train.step import Unit


def dpo_loss(
    model: Any,
    batch: Mapping[str, Array],
    key: Array | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """The summed loss of a batch's pairs, and the sums of `rewards/chosen`, `rewards/rejected`, `rewards/margins` and
    `rewards/accuracies`, which TRL reports by these names.

    Args:
        model: a `CausalLM` with an adapter; the reference is what `with_reference` made it remember, else its base.
        batch: `chosen_inputs`, `chosen_targets`, `chosen_loss_mask` and the same of `rejected_`, each `[b, t]`. A pair with
            nothing to learn on one of its sides does not count.
        key: random key of the dropout; the reference has none.
        beta: how closely the tuned model is held to the reference; higher is closer.
    """
    inputs, targets, mask = (
        jnp.concatenate([batch[f"{side}_{name}"] for side in ("chosen", "rejected")])
        for name in ("inputs", "targets", "loss_mask")
    )

    def log_probabilities(model: Any, key: Array | None) -> Array:
        hidden = model.hidden(inputs, key=key)
        return -row_losses(model, hidden, targets, mask)

    tuned = log_probabilities(model, key)
    reference = jax.lax.stop_gradient(log_probabilities(_reference_of(model), None))
    rewards_chosen, rewards_rejected = jnp.split(beta * (tuned - reference), 2)
    margin = rewards_chosen - rewards_rejected
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)
    counts = _counts(batch)
    sums = {"chosen": rewards_chosen, "rejected": rewards_rejected, "margins": margin, "accuracies": (margin > 0) * 1.0}
    return (losses * counts).sum(), {f"rewards/{name}": (value * counts).sum() for name, value in sums.items()}


def without_adapter(model: Any) -> Any:
    """The same model with its adapter left out; it shares all other arrays with `model`, which stays as it is."""
    graphdef, state = nnx.split(model)
    bare = nnx.merge(graphdef, state)
    for _, module in list(nnx.iter_modules(bare)):
        if isinstance(module, Linear):
            module.adapter = None
        for name in [name for name, value in vars(module).items() if isinstance(value, nnx.LoRAParam | Prompt)]:
            setattr(module, name, None)
    return bare


class ReferenceAdapter(ReplicatedVariable):
    """The adapter of the reference: a pytree of arrays as `nnx.to_pure_dict` gives it."""


def with_reference(model: Any) -> Any:
    """The same model, which remembers a copy of its adapter as the reference of `dpo_loss`; other arrays are shared."""
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, state)
    # A copy, since the step donates the adapter's own buffers.
    copy.reference = ReferenceAdapter(jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))))
    return copy


def _reference_of(model: Any) -> Any:
    graphdef, adapter, reference, rest = nnx.split(model, nnx.LoRAParam, ReferenceAdapter, ...)
    if not jax.tree.leaves(reference):
        return without_adapter(model)
    adapter = jax.tree.map(lambda leaf: leaf, adapter)  # new variables: those of a split are the model's own
    remembered: Any = reference
    nnx.replace_by_pure_dict(adapter, remembered["reference"].get_value())
    return nnx.merge(graphdef, adapter, reference, rest)


def _counts(batch: Mapping[str, Array]) -> Array:
    """float32 `[..., b]`: 1 for the pairs that count, 0 for those that fill up a batch."""
    learned = [batch[f"{side}_loss_mask"].sum(-1) > 0 for side in ("chosen", "rejected")]
    return (learned[0] & learned[1]).astype(jnp.float32)


PAIRS = Unit("pairs", lambda batch: _counts(batch).sum())
