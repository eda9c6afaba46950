"""Optimizers: schedules, and four update rules behind gradient clipping.

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

from qlora_jax.train import loraplus
from qlora_jax.train.adam8bit import scale_by_adam8bit

OptimizerName = Literal["adamw", "adamw8bit", "lion", "adafactor"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Optimizer:
    """An Optax rule behind clipping by the global norm; it has the two functions of an Optax transformation.

    Attributes:
        rule: gradients to updates. `host_offload` takes those that treat each matrix by itself, as all rules here do.
        max_grad_norm: None for no clipping.
        loraplus_lr_ratio: by what the updates of LoRA's B are multiplied (train.loraplus); None: as those of A.
    """

    rule: optax.GradientTransformation
    max_grad_norm: float | None = None
    loraplus_lr_ratio: float | None = None

    def init(self, params: optax.Params) -> optax.OptState:
        return self.rule.init(params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        factor = clip_factor(optax.tree.norm(updates), self.max_grad_norm)
        updates, state = self.rule.update(jax.tree.map(lambda leaf: leaf * factor, updates), state, params)
        leaves, tree = jax.tree.flatten(updates)
        return tree.unflatten(scaled(leaves, self.rates(updates))), state

    def rates(self, params: Any) -> list[float]:
        """The factor on the learning rate of each leaf of the parameters."""
        if self.loraplus_lr_ratio is None:
            return [1.0] * len(jax.tree.leaves(params))
        return loraplus.rates(params, self.loraplus_lr_ratio)


def scaled(updates: Any, rates: list[float]) -> list[Array]:
    """A list of updates times their factors."""
    return [leaf if rate == 1 else leaf * rate for leaf, rate in zip(updates, rates, strict=True)]


def clip_factor(norm: Array, max_grad_norm: float | None) -> Array:
    """What gradients of that norm are multiplied by."""
    if max_grad_norm is None:
        return jnp.ones_like(norm)
    return jnp.where(norm < max_grad_norm, 1.0, max_grad_norm / norm)


def learning_rate_schedule(kind: Schedule, peak: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """The learning rate by step: a linear rise to `peak` over the warm-up, then constant, or down to 0 at `steps`.

    Raises:
        ValueError: unknown kind, or a warm-up that is longer than the run.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warm-up: expected between 0 and the {steps} steps of the run, found {warmup_steps}")
    rest = max(steps - warmup_steps, 1)
    match kind:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, 0.0, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest)
        case _:
            raise ValueError(f"unknown schedule {kind!r}; expected one of {', '.join(SCHEDULES)}")
    if warmup_steps == 0:
        return after

    def rise(step: Any) -> Any:  # unlike transformers', whose first step has a rate of 0 and is lost
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
    """An update rule behind clipping by the global norm; the defaults are the QLoRA authors', those of Lion its paper's.

    Args:
        beta1: decay of the first moment; 0.9 if None. Adafactor keeps none.
        beta2: decay of the second moment, 0.999 if None; with Lion that of its one moment, 0.99 if None. Adafactor's is
            1 - t^-0.8 at step t.
        epsilon: of both kinds of AdamW.
        max_grad_norm: None for no clipping.
        loraplus_lr_ratio: learning rate of LoRA's B by that of A; None for the same.

    Raises:
        ValueError: unknown name, decays for Adafactor, or a ratio that is no positive number.
    """
    if loraplus_lr_ratio is not None and not 0 < loraplus_lr_ratio < math.inf:
        raise ValueError(f"loraplus_lr_ratio: expected a number above 0, found {loraplus_lr_ratio}")
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
                raise ValueError(f"beta1, beta2: expected none with adafactor, found {beta1}, {beta2}")
            rule = _for_each_matrix(
                optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
            )
        case _:
            raise ValueError(f"unknown optimizer {name!r}; expected one of {', '.join(OPTIMIZERS)}")
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
    """`optimizer("adamw", …)`."""
    return optimizer(
        "adamw", learning_rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay, max_grad_norm=max_grad_norm
    )


def _for_each_matrix(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` on each matrix by itself, where parameters stack the matrices of all layers: `[layers, in, out]`.

    Adafactor left alone would factor the two longest axes, layers among them, and clip all layers together.
    """

    def over_stack(function: Callable[..., Any], leaf: Any) -> Callable[..., Any]:
        for _ in leaf.shape[:-2]:
            function = jax.vmap(function)
        return function

    def init(params: optax.Params) -> Any:
        return jax.tree.map(lambda leaf: over_stack(tx.init, leaf)(leaf), params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, tree = jax.tree.flatten(updates)
        # The rule asks for parameters, whose values it does not use.
        done = [over_stack(tx.update, g)(g, s, g) for g, s in zip(leaves, tree.flatten_up_to(state), strict=True)]
        scaled, states = zip(*done, strict=True)
        return tree.unflatten(scaled), tree.unflatten(states)

    return optax.GradientTransformation(init, update)
