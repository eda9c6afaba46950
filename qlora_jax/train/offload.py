"""Optimizers whose state, and optionally the adapter with its gradient, is in pinned host memory.

QLoRA's paged optimizers page Adam's moments between GPU and host on demand. XLA plans memory at compile time, so each page
becomes an explicit transfer, one for each layer:

    compute the norm of the whole gradient, layer by layer
    for each layer:   move its gradient, state and parameters to the device,
                      clip and update them as matrices of their own, and move them back

The parameters of a stack of layers are `[layers, in, out]` arrays. Their state is the state of each layer, stacked
(`jax.vmap` of the rule's `init`), so that the state of one layer is a slice of it. Parameters without layers are updated as
a whole. Beside the gradient, device memory holds the state of one layer only. With the adapter in host memory, its gradient
is never on the device as a whole either (`nn.host`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from qlora_jax.errors import OptionError
from qlora_jax.nn.host import HostArray, to_device, to_host
from qlora_jax.train.optim import Optimizer, clip_factor, scaled

HOST = "pinned_host"
_LEAST = 128  # the number of values from which on a layer's leaf is moved to the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class HostState:
    """The state of a rule.

    Attributes:
        stacks: for each number of layers, the stacked states of the parameters with that many layers.
        rest: the state of the parameters without layers; None if there are none.
    """

    stacks: tuple[Any, ...]
    rest: Any


def memory_kinds(state: HostState) -> HostState:
    """Return the memory of each leaf of a state: "pinned_host", or "device" for counters and other small leaves."""
    stacks = jax.tree.map(lambda leaf: _kind(leaf.shape[1:]), state.stacks)
    return HostState(stacks, jax.tree.map(lambda leaf: _kind(leaf.shape), state.rest))


def _kind(shape: tuple[int, ...]) -> str:
    return HOST if math.prod(shape) >= _LEAST else "device"


def chosen(condition: Array, new: Any, old: Any) -> Any:
    """Return the new tree where a scalar condition holds, else the old one, bit for bit."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), new, old)


@dataclasses.dataclass(frozen=True)
class _Factor:
    """What an update needs to know of the whole gradient.

    Attributes:
        clip: the factor that clips it.
        allowed: whether the update is done, a bool scalar; None: it always is.
    """

    clip: Array
    allowed: Array | None


@dataclasses.dataclass(frozen=True)
class HostOffload:
    """An optimizer with its state in host memory; `host_offload` makes it.

    Attributes:
        tx: the optimizer, whose rule treats each matrix by itself.
        adapter: whether the parameters are in host memory too.
    """

    tx: Optimizer
    adapter: bool

    def init(self, params: Any) -> HostState:
        """Return the state before the first update, in host memory, for use under `jax.jit` with such output shardings."""
        stacks, rest = _groups(jax.tree.leaves(params))
        states = tuple(jax.vmap(self.tx.rule.init)(stack) for stack in stacks.values())
        state = HostState(states, self.tx.rule.init(rest) if rest else None)
        return jax.tree.map(lambda leaf, kind: to_host(leaf) if kind == HOST else leaf, state, memory_kinds(state))

    def apply(
        self, gradient: Any, state: HostState, params: Any, allowed: Array | None = None
    ) -> tuple[Any, HostState, Array]:
        """Return (new parameters, new state, norm of the gradient) of one update.

        If `allowed`, a bool scalar, is false or the norm is not finite, parameters and state stay as they are; None: every
        update is done.
        """
        leaves, tree = jax.tree.flatten(params)
        norm = self._norm(jax.tree.leaves(gradient))
        factor = _Factor(clip_factor(norm, self.tx.max_grad_norm), None if allowed is None else allowed & jnp.isfinite(norm))
        gradients, other_gradients = _groups(jax.tree.leaves(gradient))
        stacks, rest = _groups(leaves)
        rates, other_rates = _groups(leaves, self.tx.rates(params))
        done = [
            self._stack(gradients[layers], old, stack, factor, rates[layers])
            for (layers, stack), old in zip(stacks.items(), state.stacks, strict=True)
        ]
        other, new_rest = self._update(other_gradients, state.rest, rest, factor, other_rates) if rest else ([], None)
        stacked = [iter(new) for new, _ in done]
        of, others = dict(zip(stacks, stacked, strict=True)), iter(other)
        new = [next(of[leaf.shape[0]] if _is_stack(leaf) else others) for leaf in leaves]
        return tree.unflatten(new), HostState(tuple(state for _, state in done), new_rest), norm

    def _stack(
        self, gradient: Any, state: Any, params: list[Array], factor: _Factor, rates: list[float]
    ) -> tuple[list[Array], Any]:
        """Return the parameters of a stack and their state after an update, one layer at a time."""
        if self.adapter:

            def move(_: None, layer: tuple[Any, Any, Any]) -> tuple[None, tuple[Any, Any]]:
                return None, self._update(*layer, factor, rates)

            _, (new, new_state) = jax.lax.scan(move, None, (gradient, state, params))
            return new, new_state

        # Parameters on the device are updated in place.
        def change(params: list[Array], layer: tuple[Array, Any, Any]) -> tuple[list[Array], Any]:
            index, gradient, state = layer
            old = [jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False) for leaf in params]
            new, new_state = self._update(gradient, state, old, factor, rates)
            pairs = zip(params, new, strict=True)
            return [jax.lax.dynamic_update_index_in_dim(leaf, value, index, 0) for leaf, value in pairs], new_state

        layers = jnp.arange(params[0].shape[0])
        return jax.lax.scan(change, params, (layers, gradient, state))

    def _update(self, gradient: Any, state: Any, params: Any, factor: _Factor, rates: list[float]) -> tuple[Any, Any]:
        gradient, state, params = to_device((gradient, state, params))
        updates, new_state = self.tx.rule.update([leaf * factor.clip for leaf in gradient], state, params)
        new = optax.apply_updates(params, scaled(updates, rates))
        if factor.allowed is not None:
            new, new_state = chosen(factor.allowed, (new, new_state), (params, state))
        params, state = new, new_state
        state = jax.tree.map(lambda leaf: to_host(leaf) if _kind(leaf.shape) == HOST else leaf, state)
        return to_host(params) if self.adapter else params, state

    def _norm(self, gradient: list[Array]) -> Array:
        if not self.adapter:
            return optax.tree.norm(gradient)
        stacks, rest = _groups(gradient)

        def squares(leaves: list[Array]) -> Array:
            return sum((jnp.sum(leaf * leaf) for leaf in to_device(leaves)), jnp.float32(0))

        def add(total: Array, leaves: list[Array]) -> tuple[Array, None]:
            return total + squares(leaves), None

        total = squares(rest)
        for stack in stacks.values():
            total, _ = jax.lax.scan(add, total, stack)
        return jnp.sqrt(total)


def host_offload(tx: Optimizer, *, adapter: bool = False) -> HostOffload:
    """Return the optimizer with its state in pinned host memory between updates.

    Args:
        tx: an optimizer of `optimizer`, or one made of any Optax rule that treats each matrix by itself.
        adapter: whether the parameters stay in host memory too, and their gradient is gathered there.

    Raises:
        OptionError: `tx` is not an `Optimizer`.
    """
    if not isinstance(tx, Optimizer):
        raise OptionError(
            f"host_offload: expected an Optimizer (what optimizer() and adamw() return, or Optimizer(rule)), found {tx}"
        )
    return HostOffload(tx, adapter)


def host_gradient(function: Callable[[Any], tuple[Array, Any]], params: Any) -> tuple[Any, Any]:
    """Return (gradient in host memory, auxiliary result) of a function whose parameters are `HostArray`s in host memory."""
    return jax.grad(lambda slots: function(jax.tree.map(HostArray, params, slots)), has_aux=True)(to_host(params))


def host_zeros(params: Any) -> Any:
    """Return zeros of the parameters' shapes, in host memory."""
    return to_host(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params))


def host_add(a: Any, b: Any) -> Any:
    """Return the sum of two trees in host memory, computed one layer at a time."""

    def layer(_: None, pair: tuple[Any, Any]) -> tuple[None, Any]:
        return None, whole(*pair)

    def whole(a: Any, b: Any) -> Any:
        return to_host(jnp.add(to_device(a), to_device(b)))

    def one(a: Array, b: Array) -> Array:
        return jax.lax.scan(layer, None, (a, b))[1] if _is_stack(a) else whole(a, b)

    return jax.tree.map(one, a, b)


def _is_stack(leaf: Array) -> bool:
    return leaf.ndim > 2


def _groups(leaves: Sequence[Array], values: Sequence[Any] | None = None) -> tuple[dict[int, list[Any]], list[Any]]:
    """Return (stacks by their number of layers, the rest), each in the order of the leaves.

    If `values` is given, one for each leaf, the groups hold these values in place of the leaves.
    """
    stacks: dict[int, list[Any]] = {}
    rest: list[Any] = []
    for leaf, value in zip(leaves, leaves if values is None else values, strict=True):
        (stacks.setdefault(leaf.shape[0], []) if _is_stack(leaf) else rest).append(value)
    return stacks, rest
