"""Optimizers: learning-rate schedules, and four update rules with gradient clipping.

              state of a parameter    update, beside the decoupled weight decay, times the learning rate
adamw         8 bytes                 m / (sqrt(v) + epsilon)                 Loshchilov & Hutter 2019
adamw8bit     2.03 bytes              the same, with m and v in 8 bits        Dettmers et al. 2021 (`train.adam8bit`)
lion          4 bytes                 sign(beta1 m + (1 - beta1) g)           Chen et al. 2023
adafactor     4 (1/in + 1/out) bytes  g / sqrt(row means x column means)      Shazeer & Stern 2018
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.train import loraplus
from qlora_jax.train.adam8bit import scale_by_adam8bit

OptimizerName = Literal["adamw", "adamw8bit", "lion", "adafactor"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Optimizer:
    """An Optax rule applied after clipping by the global norm; it has the two functions of an Optax transformation.

    Attributes:
        rule: turns gradients into updates. `host_offload` needs a rule that treats each matrix by itself, as all rules here
            do.
        max_grad_norm: the norm to which gradients are clipped; None for no clipping.
        loraplus_lr_ratio: the factor on the updates of LoRA's B (train.loraplus); None for no factor.
    """

    rule: optax.GradientTransformation
    max_grad_norm: float | None = None
    loraplus_lr_ratio: float | None = None

    def init(self, params: optax.Params) -> optax.OptState:
        """Return the state of the rule before the first update."""
        return self.rule.init(params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        """Return the updates for gradients, and the next state of the rule."""
        factor = clip_factor(optax.tree.norm(updates), self.max_grad_norm)
        updates, state = self.rule.update(jax.tree.map(lambda leaf: leaf * factor, updates), state, params)
        leaves, tree = jax.tree.flatten(updates)
        return tree.unflatten(scaled(leaves, self.rates(updates))), state

    def rates(self, params: Any) -> list[float]:
        """Return the factor on the learning rate of each leaf of the parameters."""
        if self.loraplus_lr_ratio is None:
            return [1.0] * len(jax.tree.leaves(params))
        return loraplus.rates(params, self.loraplus_lr_ratio)


def scaled(updates: Any, rates: list[float]) -> list[Array]:
    """Return the updates multiplied by their factors."""
    return [leaf if rate == 1 else leaf * rate for leaf, rate in zip(updates, rates, strict=True)]


def clip_factor(norm: Array, max_grad_norm: float | None) -> Array:
    """Return the factor that clips gradients of that norm."""
    if max_grad_norm is None:
        return jnp.ones_like(norm)
    return jnp.where(norm < max_grad_norm, 1.0, max_grad_norm / norm)


def learning_rate_schedule(kind: Schedule, peak: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Return the learning rate by step: a linear rise to `peak` over the warm-up, then constant, or falling to 0 at `steps`.

    Raises:
        OptionError: the kind is unknown, or the warm-up is longer than the run.
    """
    if not 0 <= warmup_steps <= steps:
        raise OptionError(f"warm-up: expected between 0 and the {steps} steps of the run, found {warmup_steps}")
    rest = max(steps - warmup_steps, 1)
    match kind:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case _:
            raise OptionError(f"unknown schedule {kind!r}; expected one of {', '.join(SCHEDULES)}")
    if warmup_steps == 0:
        return after

    def rise(step: Any) -> Any:  # unlike in transformers, where the first step has a rate of 0 and changes nothing
        return peak * (step + 1) / (warmup_steps + 1)

    return optax.join_schedules([rise, after], [warmup_steps])


def optimizer(
    name: OptimizerName,
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta1: float | None = None,
    beta2: float | None = None,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 0.3,
    loraplus_lr_ratio: float | None = None,
) -> Optimizer:
    """Return an update rule with clipping by the global norm.

    The defaults are those of the QLoRA authors, and for Lion those of its paper.

    Args:
        name: the update rule.
        learning_rate: the learning rate, or a schedule of it.
        beta1: the decay of the first moment; 0.9 if None. Adafactor has no first moment.
        beta2: the decay of the second moment, 0.999 if None; for Lion the decay of its one moment, 0.99 if None. Adafactor's
            is 1 - t^-0.8 at step t.
        epsilon: the term that is added to the denominator in AdamW, of both kinds.
        weight_decay: the decoupled weight decay; 0 for none.
        max_grad_norm: the norm to which gradients are clipped; None for no clipping.
        loraplus_lr_ratio: the learning rate of LoRA's B divided by that of A; None for the same rate.

    Raises:
        OptionError: the name is unknown, Adafactor is given decays, or the ratio is not a positive number.
    """
    if loraplus_lr_ratio is not None and not 0 < loraplus_lr_ratio < math.inf:
        raise OptionError(f"loraplus_lr_ratio: expected a number above 0, found {loraplus_lr_ratio}")
    b1 = 0.9 if beta1 is None else beta1
    b2 = (0.99 if name == "lion" else 0.999) if beta2 is None else beta2
    match name:
        case "adamw":
            rule = optax.scale_by_adam(b1, b2, epsilon)
        case "adamw8bit":
            rule = scale_by_adam8bit(b1, b2, epsilon)
        case "lion":
            rule = optax.scale_by_lion(b1, b2)
        case "adafactor":
            if beta1 is not None or beta2 is not None:
                raise OptionError(f"beta1, beta2: expected none with adafactor, found {beta1}, {beta2}")
            rule = _for_each_matrix(
                optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
            )
        case _:
            raise OptionError(f"unknown optimizer {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    decay = () if weight_decay == 0 else (optax.add_decayed_weights(weight_decay),)
    chain = optax.chain(rule, *decay, optax.scale_by_learning_rate(learning_rate))
    return Optimizer(chain, max_grad_norm, loraplus_lr_ratio)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta1: float | None = None,
    beta2: float | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = 0.3,
) -> Optimizer:
    """Return `optimizer("adamw", …)`."""
    return optimizer(
        "adamw", learning_rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )


def _for_each_matrix(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return a rule that applies `tx` to each matrix by itself where parameters stack the matrices of all layers.

    Parameters are `[layers, in, out]`. Adafactor applied to the stack would factor the two longest axes, which may include
    the layers, and clip all layers together.
    """

    def over_stack(function: Callable[..., Any], leaf: Any) -> Callable[..., Any]:
        for _ in leaf.shape[:-2]:
            function = jax.vmap(function)
        return function

    def init(params: optax.Params) -> Any:
        return jax.tree.map(lambda leaf: over_stack(tx.init, leaf)(leaf), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        # The rule requires parameters but does not use their values.
        done = [over_stack(tx.update, g)(g, s, g) for g, s in zip(leaves, tree.flatten_up_to(state), strict=True)]
        scaled, states = zip(*done, strict=True)
        return tree.unflatten(scaled), tree.unflatten(states)

    return optax.GradientTransformation(init, update)
