"""The slots of the bank while many tenants train: who is in which, and who takes turns.

a slot for each           a tenant keeps its slot until it ends; others wait for one
turns (`host_states`)     all tenants train; before a step the slots are given to its tenants, and the state of a tenant
                          that leaves its slot for another's step is in pinned host memory until its next turn
"""

from collections.abc import Sequence

import jax
import numpy as np

from qlora_jax.finetune.tenants.tenant import Tenant
from qlora_jax.train.tenant_slots import TenantsState, get_slot, init_tenants, put_slot, slot_to_host

__all__ = ["Slots"]


class Slots:
    """The state of the slots 1 to `count`, and of the tenants that have none at the moment.

    Attributes:
        state: of all slots, slot 0 for the bare base among them.
        count: how many tenants can be in a slot.
    """

    def __init__(self, adapter: object, scale: object, count: int, *, turns: bool) -> None:
        """Make empty slots.

        Args:
            adapter, scale: of the bank's model, which are donated.
            count: the number of slots beside slot 0.
            turns: whether tenants take turns.
        """
        state = jax.jit(init_tenants, donate_argnums=(0, 1))(adapter, scale)
        # Committed to its device, as what the programs return is; otherwise each would be compiled once more.
        self.state: TenantsState = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, state))
        self.count, self._turns = count, turns
        self._in: dict[int, Tenant] = {}
        self._away: dict[str, TenantsState] = {}

    def free(self) -> bool:
        """Return whether one more tenant can train."""
        return self._turns or len(self._in) < self.count

    def put(self, tenant: Tenant, values: TenantsState) -> None:
        """Put a tenant's state into its slot, or into a free one, which another tenant may leave for it."""
        slot = tenant.slot or self._free_slot({tenant.name})
        self.state = put_slot(self.state, slot, values)
        tenant.slot, self._in[slot] = slot, tenant

    def bring(self, tenants: Sequence[Tenant]) -> np.ndarray:
        """Give a slot to each of these tenants, at most `count`; return the slots, int32 `[count]`, for `update`."""
        names = {tenant.name for tenant in tenants}
        for tenant in tenants:
            if not tenant.slot:
                slot = self._free_slot(names)
                self.state = put_slot(self.state, slot, self._away.pop(tenant.name))
                tenant.slot, self._in[slot] = slot, tenant
        slots = np.full(self.count, self.count + 1, np.int32)  # beyond the bank: no tenant
        slots[: len(tenants)] = [tenant.slot for tenant in tenants]
        return slots

    def values(self, tenant: Tenant) -> TenantsState:
        """Return the state of a tenant, wherever it is."""
        return get_slot(self.state, tenant.slot) if tenant.slot else self._away[tenant.name]

    def leave(self, tenant: Tenant) -> None:
        """Let a tenant leave its slot for good; what is in it is overwritten by the next one."""
        self._in.pop(tenant.slot, None)
        self._away.pop(tenant.name, None)
        tenant.slot = 0

    def _free_slot(self, names: set[str]) -> int:
        """Return a slot without a tenant; if all are taken, one whose tenant, none of these, leaves it for host memory."""
        for slot in range(1, self.count + 1):
            if slot not in self._in:
                return slot
        slot, other = next((slot, other) for slot, other in self._in.items() if other.name not in names)
        self._away[other.name] = slot_to_host(self.state, slot)
        del self._in[slot]
        other.slot = 0
        return slot
