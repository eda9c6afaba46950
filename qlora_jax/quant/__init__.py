"""4-bit data types: codebooks, the packed tensor, and its product with activations; token tables in 8 or 4 bits;
arrays in 8 bits, block by block."""

from qlora_jax.quant.blocks import from_blocks, to_blocks
from qlora_jax.quant.codebooks import (
    BLOCK_SIZES,
    DATA_TYPES,
    SCALE_BLOCK_SIZE,
    DataType,
    code_bits,
    codebook,
    dynamic_map,
)
from qlora_jax.quant.dynamic import BlockwiseArray, dequantize_blockwise, quantize_blockwise
from qlora_jax.quant.matmul import matmul, with_implementation
from qlora_jax.quant.rows import (
    TABLE_STORAGES,
    Int8Rows,
    PackedTable,
    TableStorage,
    empty_rows,
    put_rows,
    quantize_rows,
    rows_product,
    rows_sum,
    table_shape,
    take_rows,
    with_single_scales,
)
from qlora_jax.quant.spec import Quantization
from qlora_jax.quant.stacked import StackedTensor, keep_stacked
from qlora_jax.quant.tensor import Implementation, QuantizedTensor, dequantize, quantize, with_double_quantization

__all__ = [
    "BLOCK_SIZES",
    "DATA_TYPES",
    "SCALE_BLOCK_SIZE",
    "TABLE_STORAGES",
    "BlockwiseArray",
    "DataType",
    "Implementation",
    "Int8Rows",
    "PackedTable",
    "Quantization",
    "QuantizedTensor",
    "StackedTensor",
    "TableStorage",
    "code_bits",
    "codebook",
    "dequantize",
    "dequantize_blockwise",
    "dynamic_map",
    "empty_rows",
    "from_blocks",
    "keep_stacked",
    "matmul",
    "put_rows",
    "quantize",
    "quantize_blockwise",
    "quantize_rows",
    "rows_product",
    "rows_sum",
    "table_shape",
    "take_rows",
    "to_blocks",
    "with_double_quantization",
    "with_implementation",
    "with_single_scales",
]
