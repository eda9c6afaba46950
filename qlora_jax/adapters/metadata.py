"""`qlora_jax.json`, which a run writes beside the adapter for what PEFT's configuration has no field for.

An adapter fits the base that it was trained on and prompts of the form that it was trained with. PEFT's files name the base,
but not how its weights were quantised, how its positions were scaled, and how prompts were written. Generation and merging
read all of that from this file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from qlora_jax.adapters.peft_config import resolve_adapter
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.hub import Snapshot
from qlora_jax.errors import CheckpointError, OptionError, QLoRAError, shortened
from qlora_jax.models import RopeScaling, scaled
from qlora_jax.quant import EMBEDDING_STORAGES, DataType, EmbeddingStorage, Quantization

__all__ = ["AdapterMetadata", "QuantizationChoice", "read_adapter_metadata", "with_scaling"]

METADATA = "qlora_jax.json"
_MOST_SCALED = 100_000  # times the context: beyond it a factor is damaged


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """How an adapter was trained.

    Attributes:
        quantization: storage of the base's linear layers; None: they were dense.
        template: the form of the prompts (data.Template, never "auto"); None: unknown.
        embedding_storage: storage of the base's token embedding and head.
        converted_from: the initialization (LoRA's `init_lora_weights`) that was subtracted from the base before it was
            stored, and is the second half of the adapter's rank (weight_init.py); None: nothing was subtracted.
        scaling: the scaling of the base's positions; None: its own positions.
    """

    quantization: Quantization | None
    template: str | None
    embedding_storage: EmbeddingStorage = "none"
    converted_from: str | None = None
    scaling: RopeScaling | None = None

    def save(self, adapter: Path) -> None:
        """Write the metadata into the adapter's folder."""
        values = {
            "quantization": None if self.quantization is None else dataclasses.asdict(self.quantization),
            "template": self.template,
            "tables": self.embedding_storage,
            **({} if self.converted_from is None else {"converted_from": self.converted_from}),
            "rope_scaling": None if self.scaling is None else dataclasses.asdict(self.scaling),
        }
        (adapter / METADATA).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter_metadata(name: str | Path | Snapshot) -> AdapterMetadata | None:
    """Return the metadata of an adapter; None where there are none, as in adapters of other programs.

    Args:
        name: a folder, the repository id of an adapter, or a snapshot that was resolved before.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = resolve_adapter(name).path / METADATA
    values = read_object(path)
    if values is None:
        return None
    try:
        if missing := [field for field in ("quantization", "template") if field not in values]:
            raise CheckpointError(f"expected quantization and template, as train.py writes them, found no {missing[0]}")
        embedding_storage = values.get("tables", "none")  # files of earlier versions do not have it
        if embedding_storage not in EMBEDDING_STORAGES:
            known = ", ".join(EMBEDDING_STORAGES)
            raise CheckpointError(f"tables: expected one of {known}, found {shortened(embedding_storage)}")
        for field in ("template", "converted_from"):
            if not isinstance(values.get(field), str | None):
                raise CheckpointError(f"{field}: expected a name, found {shortened(values[field])}")
        return AdapterMetadata(
            _quantization(values["quantization"]),
            values["template"],
            embedding_storage,
            values.get("converted_from"),
            _scaling(values.get("rope_scaling")),
        )
    except QLoRAError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _quantization(stored: Any) -> Quantization | None:
    """Return the storage that a record describes; raise QLoRAError where it is none."""
    if stored is None:
        return None
    _check_fields("quantization", stored, Quantization)
    if type(stored.get("block_size", 64)) is not int:
        raise CheckpointError(f"block_size: expected a whole number, found {shortened(stored['block_size'])}")
    if not isinstance(stored.get("double_quantization", True), bool):
        raise CheckpointError(
            f"double_quantization: expected true or false, found {shortened(stored['double_quantization'])}"
        )
    return Quantization(**stored)


def _scaling(stored: Any) -> RopeScaling | None:
    """Return the scaling of positions that a record describes; raise QLoRAError where it is none."""
    if stored is None:
        return None
    _check_fields("rope_scaling", stored, RopeScaling)
    factor = stored.get("factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor <= _MOST_SCALED:
        raise CheckpointError(f"rope_scaling: expected a factor up to {_MOST_SCALED}, found {shortened(factor)}")
    return RopeScaling(**stored)


def _check_fields(name: str, stored: Any, kind: type[Any]) -> None:
    """Raise CheckpointError where a part of a record is no object, or has other fields than `kind`."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    if not isinstance(stored, dict) or stored.keys() - fields or not stored.keys() >= set(required):
        raise CheckpointError(f"{name}: expected an object with {', '.join(fields)}, found {shortened(stored)}")


def with_scaling(checkpoint: Checkpoint, scaling: RopeScaling | None) -> Checkpoint:
    """Return the checkpoint with a config of scaled positions; None returns it as it is.

    Raises:
        QLoRAError: the model's positions cannot be scaled (see `models.scaled`).
    """
    if scaling is None:
        return checkpoint
    return dataclasses.replace(checkpoint, config=scaled(checkpoint.config, checkpoint.model_config, scaling))


@dataclasses.dataclass(frozen=True)
class QuantizationChoice:
    """What a user chose of the storage of the linear layers. A field that is None is as the adapter was trained.

    Attributes:
        data_type: "none" stores them dense.
        block_size: weights that share a scale.
        double_quantization: whether the scales are quantised as well.
    """

    data_type: DataType | Literal["none"] | None = None
    block_size: int | None = None
    double_quantization: bool | None = None

    def complete(self, metadata: AdapterMetadata | None) -> Quantization | None:
        """Return the storage of the linear layers; None: dense.

        Args:
            metadata: of the adapter; where there are none, the open fields are those of `Quantization()`.

        Raises:
            OptionError: a block size or double quantisation for weights that are dense.
        """
        trained = Quantization() if metadata is None else metadata.quantization
        if self.data_type == "none" or (self.data_type is None and trained is None):
            if self.block_size is not None or self.double_quantization is not None:
                raise OptionError("--block-size, --double-quantization: expected a 4-bit data type, found dense weights")
            return None
        trained = trained or Quantization()
        return Quantization(
            trained.data_type if self.data_type is None else self.data_type,
            trained.block_size if self.block_size is None else self.block_size,
            trained.double_quantization if self.double_quantization is None else self.double_quantization,
        )
