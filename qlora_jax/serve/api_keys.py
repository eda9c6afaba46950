"""API keys: who may use which adapters. A file has the keys' hashes, never the keys.

    [[key]]
    name = "alice"                       # the tenant, for fair scheduling and in logs
    sha256 = "9f86d081884c7d65…"         # of the key
    models = ["alice", "shared"]         # names of adapters, or of the base; "*" stands for all

A key is 256 random bits (`new_key`), so that a plain hash of it says nothing about it. A key that a client sends is compared
with all hashes, each in constant time.
"""

import dataclasses
import hashlib
import hmac
import json
import os
import secrets
import tomllib
from pathlib import Path
from typing import Any

from qlora_jax.errors import OptionError, shortened

__all__ = ["ApiKey", "find_key", "new_key", "read_api_keys"]

_FIELDS = {"name", "sha256", "models"}


@dataclasses.dataclass(frozen=True)
class ApiKey:
    """A key.

    Attributes:
        name: the tenant.
        sha256: the hash of the key, 64 hexadecimal digits.
        models: the names of the models that it may use; "*": all of them.
    """

    name: str
    sha256: str
    models: frozenset[str]

    @classmethod
    def of(cls, name: str, key: str, models: tuple[str, ...] = ("*",)) -> "ApiKey":
        """Return what is kept of a key."""
        return cls(name, hashlib.sha256(key.encode()).hexdigest(), frozenset(models))

    def allows(self, model: str) -> bool:
        """Return whether the key may use a model."""
        return model in self.models or "*" in self.models


def find_key(keys: tuple[ApiKey, ...], sent: str) -> ApiKey | None:
    """Return the key that a client sent, or None, in a time that does not depend on it."""
    digest, found = hashlib.sha256(sent.encode("utf-8", "surrogateescape")).hexdigest(), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    return found


def new_key(name: str, models: tuple[str, ...] = ("*",)) -> tuple[str, str]:
    """Return (a new key, the lines for the file).

    Raises:
        OptionError: the name is empty or has characters that cannot be printed.
    """
    if not name or not name.isprintable():
        raise OptionError(f"name of a key: expected a text that can be printed, found {name!r}")
    key = f"sk-{secrets.token_urlsafe(32)}"
    # A text in JSON is one in TOML, if it can be printed.
    tenant, names = json.dumps(name, ensure_ascii=False), json.dumps(list(models), ensure_ascii=False)
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, f'[[key]]\nname = {tenant}\nsha256 = "{digest}"\nmodels = {names}\n'


def read_api_keys(path: str | Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file.

    Raises:
        OptionError: the file is no TOML, has no keys, or one of them is not as described above.
        OSError: the file cannot be read.
    """
    try:
        content = tomllib.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OptionError(f"{path}: expected TOML, found an error: {error}") from error
    entries = content.get("key")
    if content.keys() != {"key"} or not isinstance(entries, list) or not entries:
        raise OptionError(f"{path}: expected tables [[key]] and nothing else, found {shortened(sorted(content))}")
    problems: list[str] = []
    keys = tuple(_read_key(entry, f"key {number}", problems) for number, entry in enumerate(entries, 1))
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        problems += [f"{field}: expected different ones, found {shortened(one)} twice" for one in _twice(values)]
    if problems:
        raise OptionError.of(path, problems)
    return keys


def _read_key(entry: Any, place: str, problems: list[str]) -> ApiKey:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        found = sorted(entry) if isinstance(entry, dict) else entry
        problems.append(f"{place}: expected {', '.join(sorted(_FIELDS))}, found {shortened(found)}")
        return ApiKey(place, place, frozenset())
    name, digest, models = entry["name"], entry["sha256"], entry["models"]
    if not isinstance(name, str) or not name:
        problems.append(f"{place}: name: expected a text, found {shortened(name)}")
    if not isinstance(digest, str) or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        problems.append(f"{place}: sha256: expected 64 hexadecimal digits, found another text")  # it may be the key itself
    if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
        problems.append(f"{place}: models: expected a list of names, found {shortened(models)}")
        models = []
    return ApiKey(str(name), str(digest), frozenset(models))


def _twice(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})
