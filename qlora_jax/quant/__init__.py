"""Quantised arrays: 4-bit matrices and their products with activations, embeddings in 8 or 4 bits, and block-wise 8-bit
arrays."""

from qlora_jax.quant.blocks import from_blocks, to_blocks
from qlora_jax.quant.codebooks import BLOCK_SIZES, DATA_TYPES, SCALE_BLOCK_SIZE, DataType, code_bits, codebook, dynamic_map
from qlora_jax.quant.dense_matmul import einsum
from qlora_jax.quant.dynamic import BlockwiseArray, dequantize_blockwise, quantize_blockwise
from qlora_jax.quant.embedding import (
    EMBEDDING_STORAGES,
    EmbeddingStorage,
    Int8Embedding,
    PackedEmbedding,
    embedding_lookup,
    embedding_matmul,
    embedding_rows_sum,
    embedding_shape,
    empty_embedding,
    quantize_embedding,
    with_single_scales,
    write_embedding_rows,
)
from qlora_jax.quant.matmul import matmul, with_implementation
from qlora_jax.quant.mixed import MixedStack, MixedTensor, mixed_stack
from qlora_jax.quant.parts import can_split_rows, with_parts
from qlora_jax.quant.slots import IndexedSlots, RowMatrices, SlotMatrices
from qlora_jax.quant.spec import Quantization
from qlora_jax.quant.stacked import StackedTensor, index_in_stack
from qlora_jax.quant.targets import by_platform, tracing_for
from qlora_jax.quant.tensor import Implementation, QuantizedTensor, dequantize, quantize, with_double_quantization

__all__ = [
    "BLOCK_SIZES",
    "DATA_TYPES",
    "EMBEDDING_STORAGES",
    "SCALE_BLOCK_SIZE",
    "BlockwiseArray",
    "DataType",
    "EmbeddingStorage",
    "Implementation",
    "IndexedSlots",
    "Int8Embedding",
    "MixedStack",
    "MixedTensor",
    "PackedEmbedding",
    "Quantization",
    "QuantizedTensor",
    "RowMatrices",
    "SlotMatrices",
    "StackedTensor",
    "by_platform",
    "can_split_rows",
    "code_bits",
    "codebook",
    "dequantize",
    "dequantize_blockwise",
    "dynamic_map",
    "einsum",
    "embedding_lookup",
    "embedding_matmul",
    "embedding_rows_sum",
    "embedding_shape",
    "empty_embedding",
    "from_blocks",
    "index_in_stack",
    "matmul",
    "mixed_stack",
    "quantize",
    "quantize_blockwise",
    "quantize_embedding",
    "to_blocks",
    "tracing_for",
    "with_double_quantization",
    "with_implementation",
    "with_parts",
    "with_single_scales",
    "write_embedding_rows",
]
