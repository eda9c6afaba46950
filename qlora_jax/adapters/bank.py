"""Adapters of PEFT's files as slots of a bank (`peft.bank`)."""

from typing import Any

import numpy as np

from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.fit import check_family
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.names import split_name
from qlora_jax.errors import UnsupportedError
from qlora_jax.models import Model, linear_modules
from qlora_jax.peft.bank import Bank, check_held, fill_slot, split_bank

__all__ = ["slot_values"]

A, B = "lora_A.weight", "lora_B.weight"


def slot_values(model: Model, adapter: Adapter, metadata: AdapterMetadata | None = None) -> Any:
    """Return an adapter's values for `peft.bank.write_slot`, as NumPy arrays in main memory. Nothing is compiled.

    Args:
        model: made with a `Bank`; it may be abstract.
        adapter: of `read_adapter`.
        metadata: of `read_adapter_metadata`; None: nothing is known of the base that the adapter was trained on, beyond what
            names and shapes show.

    Raises:
        UnsupportedError: something that a bank cannot hold, by name.
        CheckpointError: an adapter of another base.
    """
    method = model.method
    if not isinstance(method, Bank):
        raise UnsupportedError(f"expected a model that was made with a Bank, found {type(method).__name__}")
    check_held(adapter.name, adapter.method, method.bank_rank)
    if metadata is not None:
        _check_base(model, adapter, metadata)
    check_family(adapter, model.config.family)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in adapter.tensors.items():
        module, suffix = split_name(name, adapter.method)
        if suffix not in (A, B):
            raise UnsupportedError(f"{adapter.name}: a bank cannot hold {name}: expected lora_A and lora_B alone")
        pairs.setdefault(module, {})[suffix] = np.asarray(tensor, np.float32)
    if alone := [module for module, pair in pairs.items() if len(pair) < 2]:
        raise UnsupportedError(f"{adapter.name}: {alone[0]}: expected lora_A and lora_B, found one of them")
    tensors = {module: (pair[A], pair[B].T) for module, pair in pairs.items()}
    _, bank, _ = split_bank(model)
    stacks = linear_modules(model.config.parameter_mappings)
    return fill_slot(bank, stacks, adapter.method, tensors, adapter.name)  # pyright: ignore[reportArgumentType]


def _check_base(model: Model, adapter: Adapter, metadata: AdapterMetadata) -> None:
    """Raise UnsupportedError where an adapter was trained on a base that is stored or scaled otherwise."""
    if metadata.converted_from is not None:
        raise UnsupportedError(
            f"{adapter.name}: a bank of adapters cannot hold init_lora_weights {metadata.converted_from}, whose base is "
            "another one than that of the other adapters"
        )
    scaling = None if model.origin is None else model.origin.scaling
    for what, own, trained in (
        ("linear layers", model.quantization, metadata.quantization),
        ("embedding_storage", model.embedding_storage, metadata.embedding_storage),
        ("scaled positions", scaling, metadata.scaling),
    ):
        if own != trained:
            raise UnsupportedError(f"{adapter.name}: made for another base: {what}: expected {own}, found {trained}")
