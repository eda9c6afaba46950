"""The token embedding and head of a base that PEFT had resized. The files of its adapters hold them beside what is trained:

    name of the module + .weight                             one that the adapter does not train
                         .original_module.weight             one in modules_to_save
                         .token_adapter.base_layer.weight    one in trainable_token_indices

They replace the checkpoint's embedding and head, and may have more rows or fewer. Where the head is the token embedding, the
files hold it under both names.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from qlora_jax.adapters.files import EMBEDDING_ENDINGS, Adapter
from qlora_jax.adapters.names import PREFIX
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.models import ParameterMapping, tied_head
from qlora_jax.models.trainable import EMBEDDING, HEAD

__all__ = ["embedding_names", "with_resized_embeddings"]

SHARED = ("shared", "weight")  # the token embedding of an encoder-decoder


def with_resized_embeddings(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint with the resized embeddings of an adapter in place of its own.

    Raises:
        CheckpointError: they do not fit the checkpoint or each other; one message lists all problems.
    """
    if not adapter.resized_embeddings:
        return checkpoint
    mappings = checkpoint.model_config.parameter_mappings
    left, chosen, rows = dict(adapter.resized_embeddings), dict[str, np.ndarray](), dict[str, int]()
    problems: list[str] = []
    for mapping in (mapping for mapping in mappings if mapping.path in (EMBEDDING, HEAD, SHARED)):
        names = _names_of_base(mappings, mapping)
        copies = {name: left.pop(name) for name in _spellings(names) if name in left}
        if not copies:  # the base's own embedding is not used where another one is trained in its place
            trained = (PREFIX + name for name in names)
            copies = {name: adapter.tensors[name] for name in trained if name in adapter.tensors}
        problems += _problems(copies, checkpoint.shapes[mapping.name][1])
        rows[mapping.name] = checkpoint.shapes[mapping.name][0]
        for embedding in [*copies.values()][:1]:
            chosen[mapping.name], rows[mapping.name] = embedding, len(embedding)
    if left:
        problems.append(f"embeddings that the model has no place for ({len(left)}): {list_names([*left])}")
    if len({*rows.values()}) > 1:
        problems.append(f"expected as many rows in the token embedding and the head, found {rows}")
    if problems:
        place = f"{adapter.name}: this adapter holds the embeddings of a resized base, which do not fit {checkpoint.name}"
        raise CheckpointError.of(place, problems)
    return dataclasses.replace(
        checkpoint,
        config=checkpoint.config | {"vocab_size": next(iter(rows.values()))},
        shapes={name: chosen[name].shape if name in chosen else shape for name, shape in checkpoint.shapes.items()},
        read=lambda name: chosen[name] if name in chosen else checkpoint.read(name),
    )


def embedding_names(mappings: Sequence[ParameterMapping], path: tuple[str, ...]) -> list[str]:
    """Return the names that the files of an adapter give to the token embedding or the head at a path of the model.

    A head that is the token embedding has a name of its own in these files.
    """
    names = [mapping.name for mapping in mappings if mapping.path == path] or [str(tied_head(mappings))]
    # transformers 5 calls the head of GPT-NeoX lm_head.
    return [*names, "lm_head.weight"] if names == ["embed_out.weight"] else names


def _names_of_base(mappings: Sequence[ParameterMapping], mapping: ParameterMapping) -> list[str]:
    """Return the files' names of an embedding of the base, with those of the head where the embedding is also the head."""
    if mapping.path == HEAD or any(other.path == HEAD for other in mappings):
        return embedding_names(mappings, mapping.path)
    return [mapping.name, *(embedding_names(mappings, HEAD) if mapping.path == EMBEDDING else ["lm_head.weight"])]


def _spellings(names: Sequence[str]) -> list[str]:
    return [PREFIX + name.removesuffix(".weight") + end for name in names for end in EMBEDDING_ENDINGS]


def _problems(copies: Mapping[str, np.ndarray], features: int) -> list[str]:
    """Return what is wrong with copies of one embedding of that many features."""
    first = next(iter(copies.values()), None)
    problems = []
    for name, embedding in copies.items():
        if embedding.ndim != 2 or embedding.shape[1] != features:
            problems.append(f"{name}: expected [rows, {features}], found {list(embedding.shape)}")
        elif not jnp.issubdtype(embedding.dtype, jnp.floating) or not np.isfinite(embedding).all():
            problems.append(f"{name}: expected finite floats, found {embedding.dtype}, or NaN or infinite values")
        elif first is not None and not np.array_equal(embedding, first):
            problems.append(f"{name}: expected a copy of {next(iter(copies))}, found other values")
    return problems
