"""The options of the base model."""

import dataclasses
from typing import Literal

from qlora_jax.errors import OptionError
from qlora_jax.models import Remat
from qlora_jax.quant import DataType, EmbeddingStorage, Quantization


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The base model and how its frozen weights are stored."""

    model: str | None = None
    """Folder, .gguf file or Hugging Face hub id; SmolLM2-135M-Instruct, fetched once, if left out."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    adapter: str | None = None
    """Folder or hub id of an adapter in PEFT's format to continue from, with its rank, alpha and targets; a new adapter if
    left out. For DPO it is the reference as well."""
    data_type: DataType | Literal["none"] = Quantization.data_type
    """Storage of the linear layers; none: dense, which is LoRA instead of QLoRA."""
    block_size: int = Quantization.block_size
    """Number of weights that share a scale."""
    double_quantization: bool = Quantization.double_quantization
    """Quantise the scales as well."""
    embedding_storage: EmbeddingStorage = "none"
    """Storage of the token embedding and the output head: int8, nf4 (double-quantised), or none (dense)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; auto: bfloat16 on GPU and TPU, float32 on CPU."""
    remat: Remat | Literal["auto"] = "auto"
    """What the backward pass recomputes; auto: whole layers on GPU and TPU, all but matrix products on CPU."""

    def quantization(self) -> Quantization | None:
        """Return how the linear layers are stored, None for dense ones; raise OptionError for unknown values."""
        if self.data_type == "none":
            if (self.block_size, self.double_quantization) != (Quantization.block_size, Quantization.double_quantization):
                raise OptionError("block_size, double_quantization: expected a 4-bit data_type, found none")
            return None
        return Quantization(self.data_type, self.block_size, self.double_quantization)
