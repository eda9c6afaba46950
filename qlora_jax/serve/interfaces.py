"""What the engine is given besides a model: the slots of adapters, and grammars that answers must obey."""

from typing import Any, Protocol

import numpy as np

from qlora_jax.errors import OptionError

__all__ = ["Adapters", "Grammar", "NoAdapters"]


class Adapters(Protocol):
    """The slots of the adapters of a model; `serve.adapter_slots` has many, `NoAdapters` none."""

    @property
    def banked(self) -> bool:
        """Whether the model takes `adapter_ids`."""
        ...

    def check(self, name: str) -> None:
        """Raise OptionError if there is no adapter of that name."""
        ...

    def ready(self, name: str) -> bool:
        """Return whether `acquire` need not wait for the values of an adapter, which are being read otherwise."""
        ...

    def acquire(self, name: str) -> tuple[int, object] | None:
        """Return (the slot of an adapter, which it has until `release`, its version), or None: it is not ready yet.

        The version changes when another adapter gets the name.

        Raises:
            Exception: the adapter is gone, or cannot be loaded; only the answer that asks for it ends.
        """
        ...

    def release(self, slot: int) -> None:
        """Take back one `acquire`."""
        ...

    def install(self, state: Any) -> Any:
        """Return the model's state with the adapters that were acquired since the last call."""
        ...

    def warm_up(self, state: Any) -> Any:
        """Return the model's state after all programs for adapters were compiled."""
        ...


class NoAdapters:
    """A model as it is, whose only adapter has the name ""."""

    banked = False

    def check(self, name: str) -> None:
        """Raise OptionError for any name but ""."""
        if name:
            raise OptionError(f"adapter: expected none, found {name}")

    def ready(self, name: str) -> bool:
        """Return True."""
        return True

    def acquire(self, name: str) -> tuple[int, object] | None:
        """Return slot 0."""
        return 0, 0

    def release(self, slot: int) -> None:
        """Do nothing."""

    def warm_up(self, state: Any) -> Any:
        """Return the state unchanged."""
        return state

    def install(self, state: Any) -> Any:
        """Return the state unchanged."""
        return state


class Grammar(Protocol):
    """What one answer must obey."""

    def copy(self) -> "Grammar":
        """Return the same place in the same grammar, for another answer."""
        ...

    def allowed(self) -> np.ndarray:
        """Return the tokens that may be next, int32 `[ceil(v / 32)]` (`row_sampling.all_allowed`)."""
        ...

    def accept(self, token: int) -> bool:
        """Add a token to the answer; return whether the answer is complete."""
        ...
