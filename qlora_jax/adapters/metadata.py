"""What a run leaves beside the adapter that PEFT's configuration has no field for: `qlora_jax.json`.

An adapter is right for the base that it was trained on and for prompts of the form that it has seen. PEFT's files name the
base, but not how its weights were rounded, its positions scaled, or prompts written. Generation and merging take all of it
from here.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.hub import resolve
from qlora_jax.errors import CheckpointError
from qlora_jax.models import RopeScaling, family_of, scaled
from qlora_jax.quant import EMBEDDING_STORAGES, DataType, EmbeddingStorage, Quantization

NAME = "qlora_jax.json"


@dataclasses.dataclass(frozen=True)
class AdapterMetadata:
    """How an adapter was trained.

    Attributes:
        quantization: of the base's linear layers; None: they were dense.
        template: the form of the prompts (data.Template, never "auto"); None: unknown.
        embedding_storage: storage of the base's token table and head.
        converted_from: the start (LoRA's `init_lora_weights`) that was taken off the base before it was stored, and is the
            second half of the adapter's rank (from_weights.py); None: nothing was.
        scaling: of the base's positions; None: its own.
    """

    quantization: Quantization | None
    template: str | None
    embedding_storage: EmbeddingStorage = "none"
    converted_from: str | None = None
    scaling: RopeScaling | None = None

    def save(self, adapter: Path) -> None:
        """Writes the record into the adapter's folder."""
        values = {
            "quantization": None if self.quantization is None else dataclasses.asdict(self.quantization),
            "template": self.template,
            "tables": self.embedding_storage,
            **({} if self.converted_from is None else {"converted_from": self.converted_from}),
            "rope_scaling": None if self.scaling is None else dataclasses.asdict(self.scaling),
        }
        (adapter / NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_adapter_metadata(adapter: str | Path) -> AdapterMetadata | None:
    """The record in an adapter's folder or hub id; None where there is none, as in adapters of other programs.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = resolve(adapter) / NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        stored, template = values["quantization"], values["template"]
        if template is not None and not isinstance(template, str):
            raise ValueError(f"template: expected a name, found {template!r}")
        embedding_storage = values.get("tables", "none")  # records of before there was a choice lack it
        if embedding_storage not in EMBEDDING_STORAGES:
            raise ValueError(f"tables: expected one of {', '.join(EMBEDDING_STORAGES)}, found {embedding_storage!r}")
        start = values.get("converted_from")
        if start is not None and not isinstance(start, str):
            raise ValueError(f"converted_from: expected a name, found {start!r}")
        scaling = values.get("rope_scaling")
        return AdapterMetadata(
            None if stored is None else Quantization(**stored),
            template,
            embedding_storage,
            start,
            None if scaling is None else RopeScaling(**scaling),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: expected quantization and template, as train.py writes them: {error!r}") from error


def with_scaling(checkpoint: Checkpoint, scaling: RopeScaling | None) -> Checkpoint:
    """The checkpoint as that of a model with such positions; None: as it is.

    Raises:
        ValueError: see `models.scaled`.
    """
    if scaling is None:
        return checkpoint
    config = family_of(checkpoint.config).config(checkpoint.config)
    return dataclasses.replace(checkpoint, config=scaled(checkpoint.config, config, scaling))


def chosen_quantization(
    record: AdapterMetadata | None,
    data_type: DataType | Literal["none"] | None,
    block_size: int | None,
    double_quantization: bool | None,
) -> Quantization | None:
    """The storage of the base that flags ask for; what they leave open is as in training, or
    the default where that is unknown.

    Raises:
        ValueError: a block size or double quantisation of weights that are dense.
    """
    trained = Quantization() if record is None else record.quantization
    if data_type == "none" or (data_type is None and trained is None):
        if block_size is not None or double_quantization is not None:
            raise ValueError("--block-size, --double-quantization: expected a 4-bit data type, found dense weights")
        return None
    trained = trained or Quantization()
    return Quantization(
        data_type or trained.data_type,
        block_size or trained.block_size,
        trained.double_quantization if double_quantization is None else double_quantization,
    )
