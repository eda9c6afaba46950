"""The entries of a GGUF file that belong to its architecture, read one by one with their bounds.

Every entry is either read or known to change nothing. Any other entry is an error, because it could stand for a factor that
the model then lacks. These values change nothing, whatever the entry: zero, false and empty, by which llama.cpp means that
the file has no such part; one, for a factor; and the value that the model has without the entry.
"""

import math
from collections.abc import Mapping
from typing import Any

from qlora_jax.checkpoint.gguf.header import Header
from qlora_jax.errors import shortened

__all__ = ["Metadata"]

# Entries that change nothing: how the context was trained, how an embedding model pools, a layout of the first converters,
# and a flag that early converters wrote for all models, though only GPT-NeoX has parallel layers.
HARMLESS = ("rope.scaling.finetuned", "pooling_type", "tensor_data_layout", "use_parallel_residual", "expert_used_count")
FACTORS = ("scale", "factor", "multiplier")
LARGEST = 2**31 - 1


class Metadata:
    """The entries of the file's architecture. It records which entries were read, and which are wrong."""

    def __init__(self, header: Header, architecture: str, problems: list[str]) -> None:
        self.header, self.architecture, self.problems = header, architecture, problems
        self.known: set[str] = {f"{architecture}.{key}" for key in HARMLESS}

    def get(self, key: str, default: Any = None) -> Any:
        """Return an entry as it is."""
        self.known.add(f"{self.architecture}.{key}")
        return self.header.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Return a whole number of at least `least`. Where it is wrong, the problem is recorded and `least` returned."""
        value = self.get(key, default)
        if type(value) is int and least <= value <= LARGEST:
            return value
        self.problem(key, f"expected one number, found {_described(value)}.")
        return least

    def number(self, key: str, default: float | None = None) -> float:
        """Return a positive number. Where it is wrong, the problem is recorded and 1 returned."""
        value = self.get(key, default)
        if type(value) in (int, float) and 0 < value < math.inf:
            return value
        self.problem(key, f"expected one number, found {_described(value)}.")
        return 1.0

    def optional_number(self, key: str) -> float | None:
        """Return a positive number; None where there is none, or zero."""
        return self.number(key) if self.get(key) not in (None, 0) else None

    def problem(self, key: str, text: str) -> None:
        """Record that an entry is wrong."""
        self.problems.append(f"metadata {self.architecture}.{key}: {text}")

    def check_all_known(self, without: Mapping[str, Any]) -> None:
        """Report each entry that was not read and might change the mathematics.

        Args:
            without: by the key of an entry, the value that the model has without it.
        """
        for name, value in self.header.metadata.items():
            key = name.removeprefix(f"{self.architecture}.")
            if key != name and name not in self.known and not _changes_nothing(key, value, without):
                text = f"{shortened(value)}" if not isinstance(value, list) else f"{len(value)} values"
                self.problems.append(f"metadata {name}: expected none of this name, found {text}.")

    def has(self, *parts: str) -> bool:
        """Return whether a tensor with one of these endings is in the file."""
        return any(name.endswith(parts) for name in self.header.tensors)


def _described(value: object) -> str:
    if value is None:
        return "nothing"
    return f"{shortened(value)}" if type(value) in (int, float) else f"a {type(value).__name__}"


def _changes_nothing(key: str, value: Any, without: Mapping[str, Any]) -> bool:
    if isinstance(value, list):
        return all(_changes_nothing(key, item, without) for item in value)
    if key == "rope.scaling.yarn_ext_factor":  # how much of YaRN is applied; -1: as the type of the scaling says
        return value in (-1, without[key])
    if value in (0, "", "none") or (key in without and value == without[key]):
        return True
    if key == "attention.chunk_size":  # chunks of at least the whole context
        return type(value) is int and value >= without["context_length"]
    return type(value) in (int, float) and value == 1 and key.endswith(FACTORS)
