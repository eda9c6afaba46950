"""The adapters that an engine serves: many registered, some in main memory, those in use in the slots of a bank.

    registered    a name and where its files are; any number
    held          its values in main memory; the `held` that were used last
    installed     its values in a slot of the bank (`peft.bank`); those that were used last, never one that an answer uses

An answer whose adapter is not held waits while a thread reads it, and the others go on. Writing a slot is one program for
all slots and adapters, which runs between two steps.
"""

import dataclasses
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.errors import OptionError
from qlora_jax.peft.bank import SlotScale, write_slot

__all__ = ["AdapterSlots"]

_Key = tuple[str, int]  # a name and the number of its registration


@dataclasses.dataclass
class _Slot:
    """A slot of the bank: the adapter in it, and how many answers use it."""

    key: _Key | None = None
    users: int = 0


class AdapterSlots:
    """The adapters of an engine (`interfaces.Adapters`); names may be registered and removed in any thread."""

    banked = True

    def __init__(self, slots: int, load: Callable[[Any], Any], *, held: int = 32) -> None:
        """Create slots without adapters.

        Args:
            slots: the slots of the bank, with slot 0 for the bare base.
            load: returns the values of an adapter for `peft.bank.write_slot` for what it was registered with.
            held: the number of adapters whose values stay in main memory.
        """
        self._load, self._most_held = load, held
        self._slots = [_Slot() for _ in range(slots)]
        self._recent: OrderedDict[int, None] = OrderedDict((slot, None) for slot in range(1, slots))
        self._registered: dict[str, tuple[int, Any]] = {}
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self._held: OrderedDict[_Key, Any] = OrderedDict()
        self._loading: dict[_Key, Future[Any]] = {}
        self._pending: list[tuple[int, Any]] = []
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def names(self) -> list[str]:
        """Return the names that are registered."""
        with self._lock:
            return sorted(self._registered)

    def register(self, name: str, source: Any) -> None:
        """Register an adapter after reading it once, so that one that cannot be served is refused here.

        Raises:
            OptionError: the name is empty or taken.
            QLoRAError: `load` refuses the adapter.
        """
        self._check_new(name)
        values = self._load(source)
        with self._lock:
            number = next(self._numbers)
        self._hold((name, number), values)
        with self._lock:
            if name in self._registered:
                raise OptionError(f"adapter: expected a new name, found {name}, which is taken")
            self._registered[name] = number, source

    def remove(self, name: str) -> None:
        """Remove an adapter; answers in a row are finished with it, and those that wait for a row end with an error.

        Raises:
            OptionError: there is none of that name.
        """
        with self._lock:
            if self._registered.pop(name, None) is None:
                raise OptionError(f"adapter: expected the name of one that is registered, found {name}")

    def check(self, name: str) -> None:
        """Raise OptionError if there is no adapter of that name; "" is the bare base."""
        with self._lock:
            if name and name not in self._registered:
                raise OptionError(f"adapter: expected the name of one that is registered, found {name}")

    def ready(self, name: str) -> bool:
        """Return whether `acquire` has a result or an error; start to read the adapter otherwise."""
        with self._lock:
            number, source = self._registered.get(name, (0, None))
            key = name, number
            if not number or key in self._held or any(slot.key == key for slot in self._slots):
                return True
        if key not in self._loading:
            self._start_loading(key, source)
        return self._loading[key].done()

    def acquire(self, name: str) -> tuple[int, object] | None:
        """Return (the slot of an adapter, its version), or None while it is read or all slots are in use."""
        if not name:
            return 0, 0
        self.check(name)
        with self._lock:
            number, source = self._registered[name]
        key = name, number
        slot = next((index for index, one in enumerate(self._slots) if one.key == key), None)
        if slot is None:
            values = self._values(key, source)
            slot = None if values is None else next((one for one in self._recent if not self._slots[one].users), None)
            if slot is None:
                return None
            self._slots[slot].key = key
            self._pending.append((slot, values))
        self._slots[slot].users += 1
        self._recent.move_to_end(slot)
        return slot, number

    def release(self, slot: int) -> None:
        """Take back one `acquire`."""
        if slot:
            self._slots[slot].users -= 1

    def install(self, state: Any) -> Any:
        """Return the model's state with the adapters that were acquired since the last call."""
        if not self._pending:
            return state
        bank, frozen = nnx.split_state(state, nnx.Any(nnx.LoRAParam, SlotScale), ...)
        for slot, values in self._pending:
            bank = write_slot(bank, slot, values)
        self._pending.clear()
        return nnx.merge_state(bank, frozen)

    def warm_up(self, state: Any) -> Any:
        """Return the model's state after writing a slot was compiled; all slots must be empty."""
        bank, frozen = nnx.split_state(state, nnx.Any(nnx.LoRAParam, SlotScale), ...)
        zeros = jax.tree.map(lambda leaf: np.zeros((leaf.shape[0], *leaf.shape[2:]), np.float32), bank)
        return nnx.merge_state(write_slot(bank, 1, zeros), frozen)

    def close(self) -> None:
        """End the thread that reads adapters."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def users(self) -> int:
        """The number of times that slots are in use."""
        return sum(slot.users for slot in self._slots)

    def _check_new(self, name: str) -> None:
        with self._lock:
            if not name or name in self._registered:
                raise OptionError(f"adapter: expected a new name, found {name or 'an empty one'}, which is taken")

    def _values(self, key: _Key, source: Any) -> Any:
        """Return the values of an adapter, or None while they are read."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
        future = self._loading.get(key)
        if future is None:
            self._start_loading(key, source)
            return None
        if not future.done():
            return None
        del self._loading[key]
        values = future.result()
        self._hold(key, values)
        return values

    def _start_loading(self, key: _Key, source: Any) -> None:
        """Start to read an adapter; hold those that were read for answers that have gone, so that `held` limits them too."""
        for other, future in list(self._loading.items()):
            if future.done():
                del self._loading[other]
                if future.exception() is None:
                    self._hold(other, future.result())
        self._loading[key] = self._threads.submit(self._load, source)

    def _hold(self, key: _Key, values: Any) -> None:
        with self._lock:
            self._held[key] = values
            while len(self._held) > self._most_held:
                self._held.popitem(last=False)
