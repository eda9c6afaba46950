"""Adapters whose initialization was subtracted from the base (PiSSA, LoftQ): how their files are written and read.

    in training     4 bits of (W - s A0 B0) + s A B        A0 B0 is subtracted from each matrix while it is loaded
    in the files    s (A B - A0 B0)                        an ordinary LoRA of rank 2r for the original W, as PEFT's:
                                                           lora_A [A; A0], lora_B [B, -B0], twice the alpha
    read again      A, B and A0, B0 are the two halves, where `converted_from` in qlora_jax.json says that there are two

PEFT and other programs use the files as an ordinary LoRA on the original weights. Here the same base is made again, to the
bit. LoftQ of one iteration subtracts nothing, and its files are an ordinary LoRA of rank r for the quantised base. The files
of an adapter that PEFT saved without converting it (`init_lora_weights` "pissa") can be read as well.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.names import tensor_name
from qlora_jax.errors import CheckpointError
from qlora_jax.peft import LoRA, Method, Subtracted

__all__ = ["converted_from", "split_initialization", "to_plain_lora"]

A, B = "lora_A.weight", "lora_B.weight"


def converted_from(method: Method) -> str | None:
    """Return the initialization that makes files of two halves, for `AdapterMetadata`; None for any other method."""
    return str(method.init_lora_weights) if method.changes_base else None


def to_plain_lora(
    tensors: Mapping[str, np.ndarray], method: LoRA, subtracted: Subtracted
) -> tuple[dict[str, np.ndarray], LoRA]:
    """Return (tensors, method) of one ordinary LoRA for the original weights.

    Args:
        tensors: those of the adapter on the changed base, by the files' names.
        subtracted: what was subtracted from the base.
    """
    result = dict(tensors)
    for module, (a, b) in subtracted.matrices.items():
        name_a, name_b = tensor_name(module, A), tensor_name(module, B)
        result[name_a] = np.concatenate((tensors[name_a], a.T), 0)
        result[name_b] = np.concatenate((tensors[name_b], -b.T), 1)
    return result, _with_rank(method, 2.0)


def split_initialization(adapter: Adapter, metadata: AdapterMetadata | None) -> tuple[Adapter, Subtracted | None]:
    """Return (the adapter that was trained, what was subtracted from its base) of files that `to_plain_lora` made.

    Other adapters are returned as they are, with None.

    Raises:
        CheckpointError: the metadata say that there are two halves, but the adapter is no LoRA of an even rank.
    """
    if metadata is None or metadata.converted_from is None:
        return adapter, None
    method, tensors, matrices = adapter.method, dict(adapter.tensors), dict[str, tuple[np.ndarray, np.ndarray]]()
    if not isinstance(method, LoRA) or method.use_dora:
        raise CheckpointError(f"{adapter.name}: expected a LoRA, which qlora_jax.json says it is, found {method}")
    for module in adapter.modules:
        initial = []
        for name, axis, sign in ((tensor_name(module, A), 0, 1), (tensor_name(module, B), 1, -1)):
            if tensors[name].shape[axis] % 2:
                raise CheckpointError(f"{adapter.name}: {name}: expected an even rank, found {tensors[name].shape}")
            tensors[name], half = np.split(tensors[name].astype(np.float32), 2, axis)
            initial.append((sign * half).T)
        matrices[module] = (initial[0], initial[1])
    method = _with_rank(method, 0.5)
    return dataclasses.replace(adapter, method=method, tensors=tensors), Subtracted(
        method, metadata.converted_from, matrices
    )


def _with_rank(method: LoRA, factor: float) -> LoRA:
    """Return the method with `factor` times the rank and the same scaling."""
    of_alpha = math.sqrt(factor) if method.use_rslora else factor
    return dataclasses.replace(
        method,
        rank=int(method.rank * factor),
        alpha=method.alpha * of_alpha,
        rank_pattern=tuple((name, int(rank * factor)) for name, rank in method.rank_pattern),
        alpha_pattern=tuple((name, alpha * of_alpha) for name, alpha in method.alpha_pattern),
        init_lora_weights=True,
        loftq_iter=1,
    )
