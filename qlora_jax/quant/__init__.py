"""4-bit data types: codebooks, the packed tensor, and its product with activations; arrays in 8 bits, block by block."""

from qlora_jax.quant.blocks import from_blocks, to_blocks
from qlora_jax.quant.codebooks import BLOCK_SIZES, DATA_TYPES, SCALE_BLOCK_SIZE, DataType, codebook, dynamic_map
from qlora_jax.quant.dynamic import BlockwiseArray, dequantize_blockwise, quantize_blockwise
from qlora_jax.quant.matmul import matmul, with_implementation
from qlora_jax.quant.spec import Quantization
from qlora_jax.quant.stacked import StackedTensor, keep_stacked
from qlora_jax.quant.tensor import Implementation, QuantizedTensor, dequantize, quantize

__all__ = [
    "BLOCK_SIZES",
    "DATA_TYPES",
    "SCALE_BLOCK_SIZE",
    "BlockwiseArray",
    "DataType",
    "Implementation",
    "Quantization",
    "QuantizedTensor",
    "StackedTensor",
    "codebook",
    "dequantize",
    "dequantize_blockwise",
    "dynamic_map",
    "from_blocks",
    "keep_stacked",
    "matmul",
    "quantize",
    "quantize_blockwise",
    "to_blocks",
    "with_implementation",
]
