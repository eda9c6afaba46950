"""The token table and head of a base that PEFT had resized, which its adapters hold beside what they train:

    name of the module + .weight                             of one that the adapter leaves alone
                         .original_module.weight             of one in modules_to_save
                         .token_adapter.base_layer.weight    of one in trainable_token_indices

They take the place of the checkpoint's table and head, and may have more rows or fewer. Where the head is the token table,
the files hold it under both names.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.files import PREFIX, TABLE_ENDINGS, Adapter
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.models import ParameterMapping, family_of, tied_head
from qlora_jax.models.trainable import EMBEDDING, HEAD

__all__ = ["names_of", "with_tables"]

SHARED = ("shared", "weight")  # the token table of an encoder-decoder


def with_tables(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with an adapter's tables in place of its own.

    Raises:
        CheckpointError: they do not fit the checkpoint or each other; one message with all that does not.
    """
    if not adapter.tables:
        return checkpoint
    keys = family_of(checkpoint.config).config(checkpoint.config).parameter_mappings
    left, chosen, rows = dict(adapter.tables), dict[str, np.ndarray](), dict[str, int]()
    problems: list[str] = []
    for key in (key for key in keys if key.path in (EMBEDDING, HEAD, SHARED)):
        names = _names_of_base(keys, key)
        copies = {name: left.pop(name) for name in _spellings(names) if name in left}
        if not copies:  # the base's own is of no consequence where another is trained in its place
            trained = (PREFIX + name for name in names)
            copies = {name: adapter.tensors[name] for name in trained if name in adapter.tensors}
        problems += _problems(copies, checkpoint.shapes[key.name][1])
        rows[key.name] = checkpoint.shapes[key.name][0]
        for table in [*copies.values()][:1]:
            chosen[key.name], rows[key.name] = table, len(table)
    if left:
        problems.append(f"tables that the model has no place for ({len(left)}): {list_names([*left])}")
    if len({*rows.values()}) > 1:
        problems.append(f"expected as many rows in the token table and the head, found {rows}")
    if problems:
        where = f"{adapter.source}: this adapter holds the tables of a resized base, which do not fit {checkpoint.source}"
        raise CheckpointError.of(where, problems)
    return dataclasses.replace(
        checkpoint,
        config=checkpoint.config | {"vocab_size": next(iter(rows.values()))},
        shapes={name: chosen[name].shape if name in chosen else shape for name, shape in checkpoint.shapes.items()},
        read=lambda name: chosen[name] if name in chosen else checkpoint.read(name),
    )


def names_of(keys: Sequence[ParameterMapping], path: tuple[str, ...]) -> list[str]:
    """What the files of an adapter call the token table or the head, also where the head is the table."""
    names = [key.name for key in keys if key.path == path] or [str(tied_head(keys))]
    # As transformers calls the head of GPT-NeoX from version 5 on.
    return [*names, "lm_head.weight"] if names == ["embed_out.weight"] else names


def _names_of_base(keys: Sequence[ParameterMapping], key: ParameterMapping) -> list[str]:
    """What the files call a table of the base; that of a table includes those of the head that it also is."""
    if key.path == HEAD or any(other.path == HEAD for other in keys):
        return names_of(keys, key.path)
    return [key.name, *(names_of(keys, HEAD) if key.path == EMBEDDING else ["lm_head.weight"])]


def _spellings(names: Sequence[str]) -> list[str]:
    return [PREFIX + name.removesuffix(".weight") + end for name in names for end in TABLE_ENDINGS]


def _problems(copies: Mapping[str, np.ndarray], features: int) -> list[str]:
    """What makes these no token table of that many features."""
    first = next(iter(copies.values()), None)
    problems = []
    for name, table in copies.items():
        if table.ndim != 2 or table.shape[1] != features:
            problems.append(f"{name}: expected [rows, {features}], found {list(table.shape)}")
        elif not jnp.issubdtype(table.dtype, jnp.floating) or not np.isfinite(table).all():
            problems.append(f"{name}: expected finite floats, found {table.dtype}, or NaN or infinite values")
        elif first is not None and not np.array_equal(table, first):
            problems.append(f"{name}: expected a copy of {next(iter(copies))}, found other values")
    return problems
