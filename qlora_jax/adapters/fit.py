"""Checks that a checkpoint, an adapter and a model belong together. Only names and shapes are compared."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from qlora_jax.adapters.files import EMBEDDING_NAMES, Adapter
from qlora_jax.adapters.names import rows_name, tensor_name
from qlora_jax.adapters.places import adapted_layers, places_of, variable_at
from qlora_jax.adapters.virtual_tokens import prompt_problems
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.load import check_tensors, with_tied
from qlora_jax.errors import CheckpointError, list_names, shortened
from qlora_jax.models import FAMILIES, Model, families_with, tied_head
from qlora_jax.models.trainable import EMBEDDING
from qlora_jax.peft import LoRA, LowRankAdapter
from qlora_jax.peft.lora_embedding import EMBEDDING_A, EMBEDDING_B

__all__ = ["check_all", "check_family", "check_fit", "check_scaling"]


def check_all(checkpoint: Checkpoint, adapter: Adapter | None, abstract: Model) -> None:
    """Raise CheckpointError where the checkpoint or the adapter does not fit a model.

    Args:
        abstract: the model that the checkpoint is to be loaded into, with the method of the adapter.
    """
    check_tensors(with_tied(checkpoint), nnx.state(abstract))
    if adapter is not None:
        check_fit(adapter, abstract)


def check_family(adapter: Adapter, family: str) -> None:
    """Raise CheckpointError where an adapter was made for another family, as far as its files show.

    Its files show the base model, where that is a local folder, and the names of the modules.

    Args:
        family: the model_type of the model that the adapter is to be used with.
    """
    base = _family_of_base(adapter)
    named = families_with(name for name in adapter.modules if name.rpartition(".")[2] not in EMBEDDING_NAMES)
    if base is not None and base != family:
        found = f"one of a {base} model, {adapter.base}"
    elif adapter.modules and named and family in FAMILIES and family not in named:
        example = f"e.g. {adapter.modules[0]}"
        found = f"one whose modules are named as in {', '.join(named)} ({example}), base {_named_base(adapter)}"
    else:
        return
    raise CheckpointError(f"{adapter.name}: expected an adapter of a {family} model, found {found}.")


def check_fit(adapter: Adapter, model: Model) -> None:
    """Raise CheckpointError where an adapter's tensors differ from those of a model, or where it is of another family.

    The message lists all tensors that are missing, extra or misshapen.

    Args:
        model: may be abstract.
    """
    check_family(adapter, model.config.family)
    base = f"its configuration names the base {_named_base(adapter)}" if adapter.base else "its configuration names no base"
    place = f"{adapter.name}: this adapter does not fit this model, a {model.config.family} ({base})"
    if model.prompt is not None:
        if problems := prompt_problems(model.prompt, adapter.tensors, adapter.encoder):
            raise CheckpointError.of(place, problems)
        return
    places, found = places_of(model), adapter.tensors
    if model.method is None:
        raise CheckpointError(
            f"{adapter.name}: the model has no adapter; make it with method=read_adapter_method({adapter.name!r})."
        )
    expected = {
        name: place.read(np.broadcast_to(np.float32(0), variable_at(model, place.path).shape)).shape
        for name, place in places.items()
    }
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not _is_copy(name, found, model)]
    misshapen = [
        f"{name}: expected {list(expected[name])}, found {list(found[name].shape)}"
        for name in expected
        if name in found and tuple(found[name].shape) != tuple(expected[name])
    ]
    kinds = {
        "tensors that the adapter lacks": missing,
        "tensors that the model has no place for": extra,
        "tensors of another shape than the model's": misshapen,
    }
    problems = [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise CheckpointError.of(place, problems)


def check_scaling(adapter: Adapter, model: Model) -> None:
    """Raise CheckpointError where a model was made for a LoRA of another scaling than the adapter's.

    The scaling is part of the model's graph, not of its state: with another one the model would compute something else.
    """
    method = adapter.method
    for adapted in adapted_layers(model):
        if not isinstance(method, LoRA) or not isinstance(adapted.adapter, LowRankAdapter):
            continue
        spec = adapted.adapter.spec
        for module, rank, scaling in zip(adapted.modules, spec.ranks, spec.scalings, strict=True):
            expected = method.scaling_of(module)
            if rank and not math.isclose(scaling, expected):
                raise CheckpointError(
                    f"{adapter.name}: expected a model whose LoRA scaling is {expected:g} at {module} (alpha "
                    f"{method.alpha:g}, r {method.rank}, rsLoRA {'on' if method.use_rslora else 'off'}), found {scaling:g}; "
                    f"make it with method=read_adapter_method({adapter.name!r})."
                )


def _is_copy(name: str, tensors: Mapping[str, np.ndarray], model: Model) -> bool:
    """Return whether a tensor is that of a head which is the token embedding, written a second time by PEFT."""
    head = tied_head(model.config.parameter_mappings)
    if head is None:
        return False
    embedding = next(mapping for mapping in model.config.parameter_mappings if mapping.path == EMBEDDING).modules()[0]
    if name in (rows_name(head.removesuffix(".weight")), rows_name("lm_head")):
        original = tensors.get(rows_name(embedding))
    elif name in (tensor_name("lm_head", "lora_A.weight"), tensor_name("lm_head", "lora_B.weight")):
        suffix = EMBEDDING_B if name.endswith("lora_A.weight") else EMBEDDING_A
        found = tensors.get(tensor_name(embedding, suffix))
        original = None if found is None else found.T
    else:
        return False
    return original is not None and np.array_equal(original, tensors[name])


def _named_base(adapter: Adapter) -> str:
    """Return the base that an adapter names, as messages show it: a whole path, but not the megabytes of a damaged file."""
    return shortened(adapter.base, 500)


def _family_of_base(adapter: Adapter) -> str | None:
    """Return the model_type of the base that an adapter names, where the base is a local folder; else None."""
    if not adapter.base:
        return None
    try:
        kind = (read_object(Path(os.path.expanduser(adapter.base)) / "config.json") or {}).get("model_type")
    except (OSError, ValueError):  # a name that is no path, or a file that is damaged
        return None
    return kind if isinstance(kind, str) and kind in FAMILIES else None
