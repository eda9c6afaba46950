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

    def acquire(self, name: str) -> int | None:
        """Return the slot of an adapter, which it has until `release`; None: not now, because it is being loaded."""
        ...

    def release(self, name: str) -> None:
        """Take back one `acquire`."""
        ...

    def version(self, name: str) -> object:
        """Return a value that changes when another adapter gets the name."""
        ...

    def install(self, state: Any) -> Any:
        """Return the model's state with the adapters that were acquired since the last call."""
        ...


class NoAdapters:
    """A model as it is, whose only adapter has the name ""."""

    banked = False

    def check(self, name: str) -> None:
        """Raise OptionError for any name but ""."""
        if name:
            raise OptionError(f"adapter: expected none, found {name}")

    def acquire(self, name: str) -> int | None:
        """Return slot 0."""
        return 0

    def release(self, name: str) -> None:
        """Do nothing."""

    def version(self, name: str) -> object:
        """Return the name."""
        return name

    def install(self, state: Any) -> Any:
        """Return the state unchanged."""
        return state


class Grammar(Protocol):
    """What one answer must obey."""

    def allowed(self) -> np.ndarray:
        """Return the tokens that may be next, int32 `[ceil(v / 32)]` (`row_sampling.all_allowed`)."""
        ...

    def accept(self, token: int) -> bool:
        """Add a token to the answer; return whether the answer is complete."""
        ...
