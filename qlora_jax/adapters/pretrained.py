"""A base model, with an adapter or without, as programs that ask it open it.

    TunedOptions     which: folders or hub ids, and the storage of the base where it is not to be that of the training
    open_tuned       the small files; what is wrong with them shows before gigabytes are read
    Tuned.load       the weights

The base is held as the adapter was trained, and the tokenizer is the adapter's own where it has one.
"""

import dataclasses
from typing import TYPE_CHECKING, Literal

from jax.sharding import Mesh

from qlora_jax.adapters.bind import check_family, load_adapter
from qlora_jax.adapters.files import Adapter, read_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, chosen_quantization, read_adapter_metadata, with_scaling
from qlora_jax.adapters.special_tokens import grown
from qlora_jax.adapters.weight_init import TakenOff, parted, rewriting
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model, storage_of
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, tokenizer_source
from qlora_jax.models import Model
from qlora_jax.quant import DataType, EmbeddingStorage, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Tuned", "TunedOptions", "open_tuned"]


@dataclasses.dataclass(frozen=True)
class TunedOptions:
    """Which model."""

    model: str | None = None
    """Folder, .gguf file or hub id; SmolLM2-135M-Instruct, fetched once (98 MB), if left out."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter in PEFT's format."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    data_type: DataType | Literal["none"] | None = None
    """Storage of the linear layers, as the adapter was trained (else nf4) if left out; none keeps them dense, which is
    faster on a CPU and takes more memory."""
    block_size: int | None = None
    """Weights that share a scale; as the adapter was trained, else 64, if left out."""
    double_quantization: bool | None = None
    """Whether the scales are quantised as well; as the adapter was trained, else yes, if left out."""
    embedding_storage: EmbeddingStorage | None = None
    """Storage of the token table and the output head; as the adapter was trained, else none (dense), if left out."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto: bfloat16 on GPU and TPU, float32 on CPU."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What is known before the weights are read.

    Attributes:
        source: of the base.
        checkpoint: the base, with room for the rows that the adapter trained beyond its table, and positions scaled as they
            were in training.
        embedding_storage: storage of the token table and the head.
        record: of the training, where the adapter has one.
        dtype: compute type; None for that of the platform.
        taken: what was taken off the base before it was stored.
    """

    source: str
    checkpoint: Checkpoint
    adapter: Adapter | None
    tokenizer: "PreTrainedTokenizerFast"
    quantization: Quantization | None
    embedding_storage: EmbeddingStorage
    record: AdapterMetadata | None
    dtype: str | None
    taken: TakenOff | None = None

    def load(self, *, mesh: Mesh | None = None, progress: bool = True) -> Model:
        """The model with its adapter."""
        method = None if self.adapter is None else self.adapter.method
        model = load_model(
            self.checkpoint,
            quantization=self.quantization,
            embedding_storage=self.embedding_storage,
            method=method,
            rewrite=rewriting(method, self.taken, self.quantization),
            dtype=self.dtype,
            mesh=mesh,
            progress=progress,
        )
        return model if self.adapter is None else load_adapter(model, self.adapter)


def open_tuned(chosen: TunedOptions) -> Tuned:
    """Opens what the options name.

    Raises:
        ValueError, OSError: files that are missing, damaged, or do not go together.
    """
    source = chosen.model or str(fetch_default_model())
    adapter = None if chosen.adapter is None else read_adapter(chosen.adapter)
    record, taken = None if chosen.adapter is None else read_adapter_metadata(chosen.adapter), None
    if adapter is not None:
        adapter, taken = parted(adapter, record)
    quantization = chosen_quantization(record, chosen.data_type, chosen.block_size, chosen.double_quantization)
    embedding_storage = chosen.embedding_storage or ("none" if record is None else record.embedding_storage)
    checkpoint = open_checkpoint(source, chosen.revision)
    if adapter is not None:
        check_family(adapter, checkpoint.config["model_type"])
        checkpoint = with_scaling(grown(checkpoint, adapter), None if record is None else record.scaling)
    own = tokenizer_source(source, chosen.adapter)
    tokenizer = load_tokenizer(own, chosen.revision if own == source else None)
    check_tokenizer(tokenizer, checkpoint.config)
    dtype = None if chosen.dtype == "auto" else chosen.dtype
    quantization = storage_of(checkpoint, quantization)
    return Tuned(source, checkpoint, adapter, tokenizer, quantization, embedding_storage, record, dtype, taken)
