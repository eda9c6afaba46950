"""The storage of frozen matrices; the defaults of quantisation are defined only here."""

import dataclasses

from qlora_jax.errors import OptionError, shortened
from qlora_jax.quant.codebooks import BLOCK_SIZES, DATA_TYPES, DataType


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The storage of frozen linear weights; the defaults are QLoRA's: NF4, blocks of 64, double quantisation.

    Attributes:
        data_type: one of `DATA_TYPES`.
        block_size: number of values that share a scale, one of `BLOCK_SIZES`.
        double_quantization: whether the scales are quantised to 8 bits.

    Raises:
        OptionError: an unknown data type or block size.
    """

    data_type: DataType = "nf4"
    block_size: int = 64
    double_quantization: bool = True

    def __post_init__(self) -> None:
        if self.data_type not in DATA_TYPES:
            raise OptionError(f"unknown data type {shortened(self.data_type)}; expected one of {', '.join(DATA_TYPES)}")
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise OptionError(f"unknown block size {self.block_size}; expected one of {sizes}")
