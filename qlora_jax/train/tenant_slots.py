"""The state of many tenants, in slots: what a slot holds, and how a tenant comes into one and leaves it.

The state of a slot is its A and B, the two moments of AdamW, the count of its updates and its settings (learning rate,
schedule, decays). All of it is stacked over the K slots of a bank (`peft.bank`), so that its bytes are K times those of a
slot. Tenants join, pause, finish and leave between steps without a compilation.

Tenants beyond the slots may take turns in them: a tenant without a slot then has its state in pinned host memory
(`slot_to_host`), so that device memory bounds the slots of a step, and host memory the tenants.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Sharding

from qlora_jax.errors import OptionError
from qlora_jax.nn.host import to_device, to_host
from qlora_jax.peft.bank import SlotScale
from qlora_jax.train.offload import HOST
from qlora_jax.train.optim import SCHEDULES, Schedule
from qlora_jax.train.spec import OptimizerSpec

__all__ = [
    "TenantsState",
    "get_slot",
    "host_program",
    "init_tenants",
    "new_slot",
    "put_slot",
    "slot_settings",
    "slot_to_host",
    "split_tenants",
]


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
    """Return the state with a tenant in a slot, in place: the old state is donated. One program serves all slots.

    Args:
        state: of all slots.
        slot: the index.
        values: of `new_slot`, `get_slot` or `slot_to_host`. There is a program for values in host memory and one for others.
    """
    new = (to_device(values.adapter), values.scale, to_device(values.mu), to_device(values.nu))
    adapter, scale, mu, nu = jax.tree.map(lambda leaf, one: leaf.at[:, slot].set(one), state.stacks, new)
    count = state.count.at[slot].set(values.count)
    settings = {name: leaf.at[slot].set(values.settings[name]) for name, leaf in state.settings.items()}
    return TenantsState(adapter, scale, mu, nu, count, settings)


@jax.jit
def get_slot(state: TenantsState, slot: int | Array) -> TenantsState:
    """Return the state of the tenant in a slot, which may be kept in main memory and put into any slot later."""
    adapter, scale, mu, nu = jax.tree.map(lambda leaf: leaf[:, slot], state.stacks)
    settings = {name: leaf[slot] for name, leaf in state.settings.items()}
    return TenantsState(adapter, scale, mu, nu, state.count[slot], settings)


def slot_to_host(state: TenantsState, slot: int) -> TenantsState:
    """Return the state of the tenant in a slot with its matrices in pinned host memory, until `put_slot` takes it back.

    Tenants can so take turns in the slots.
    """
    return host_program(jax.tree.leaves(state.adapter)[0].sharding)(state, slot)


@cache
def host_program(device: Sharding) -> Callable[[TenantsState, Any], TenantsState]:
    """Return the jitted function of `slot_to_host` for a state with this sharding; it compiles when it is first called."""
    host = device.with_memory_kind(HOST)

    def away(state: TenantsState, slot: Array) -> TenantsState:
        own = get_slot(state, slot)
        adapter, mu, nu = to_host((own.adapter, own.mu, own.nu))
        return TenantsState(adapter, own.scale, mu, nu, own.count, own.settings)

    where: Any = TenantsState(host, device, host, host, device, device)  # pyright: ignore[reportArgumentType]
    return jax.jit(away, out_shardings=where)
