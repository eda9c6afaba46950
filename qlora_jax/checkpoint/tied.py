"""Heads that config.json says to be the token embedding: whether they are.

Checkpoints whose head was trained or merged by itself often keep `tie_word_embeddings: true` in their config.json. The
values decide, as they do in transformers: where the file has a head of its own and any value of it differs, the head is
used.
"""

import dataclasses
import hashlib
import warnings

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import QLoRAError
from qlora_jax.models import FAMILIES, tied_head
from qlora_jax.models.trainable import EMBEDDING

__all__ = ["with_own_head"]

_CHUNK = 2**24  # values that are converted to float32 at a time


def with_own_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a config that says whether its head is the token embedding; a warning says where it is not.

    The two are read, one after the other, only where the config ties them and the files have both.
    """
    if checkpoint.config.get("model_type") not in FAMILIES:
        return checkpoint
    try:
        mappings = checkpoint.model_config.parameter_mappings
    except QLoRAError:  # which is raised again where the config is needed
        return checkpoint
    head = tied_head(mappings)
    if head is None or head not in checkpoint.shapes:
        return checkpoint
    embedding = next(mapping.name for mapping in mappings if mapping.path == EMBEDDING)
    if embedding not in checkpoint.shapes or _same(checkpoint, head, embedding):
        return checkpoint
    warnings.warn(
        f"{checkpoint.name}: config.json says that the head is the token embedding, but {head} differs from {embedding}; "
        "the head is used as it is",
        stacklevel=3,
    )
    return dataclasses.replace(checkpoint, config=checkpoint.config | {"tie_word_embeddings": False})


def _same(checkpoint: Checkpoint, one: str, other: str) -> bool:
    """Return whether two tensors have the same values. Only one of them is in memory at a time."""
    if checkpoint.shapes[one] != checkpoint.shapes[other]:
        return False
    return _digest(checkpoint.read(one)) == _digest(checkpoint.read(other))


def _digest(tensor: np.ndarray) -> bytes:
    """Return a hash of the values, whatever float type they are stored in: float32 holds 16 bits and less exactly."""
    digest, flat = hashlib.blake2b(), tensor.reshape(-1)
    wide = np.float64 if flat.dtype == np.float64 else np.float32
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        digest.update(np.ascontiguousarray(part, wide if jnp.issubdtype(part.dtype, jnp.floating) else None).data)
    return digest.digest()
