"""Reads and writes checkpoints in bitsandbytes' 4 bits. Their matrices are used as they are, and never quantised again.

In a Hugging Face folder whose config.json says `quantization_config: {quant_method: bitsandbytes, load_in_4bit: true}` a
quantised matrix `name` (`….weight`) is several tensors:

    name                                       uint8 [(n + 1) // 2, 1], or the same bytes under a float type (quant_storage)
    name.absmax                                [blocks] float32, or uint8 under double quantisation
    name.quant_map                             float32 [16], the codebook
    name.nested_absmax, name.nested_quant_map  float32 [ceil(blocks / 256)], [256]; under double quantisation
    name.quant_state.bitsandbytes__nf4         uint8: JSON with quant_type, blocksize, dtype, shape, nested_offset …

Layers that the file holds dense (`llm_int8_skip_modules`, "dynamic" quantisation) stay dense.

For the rest of the program the folder is a `Checkpoint` whose shapes are those of the matrices: `read` returns dequantised
values, `read_quantized` the codes and scales.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.files import parse_object
from qlora_jax.errors import CheckpointError, UnsupportedError, shortened
from qlora_jax.quant import (
    SCALE_BLOCK_SIZE,
    DataType,
    Quantization,
    QuantizedTensor,
    codebook,
    dequantize,
    dynamic_map,
    from_blocks,
    to_blocks,
)

_DATA_TYPES = ("nf4", "fp4")  # the data types of bitsandbytes
_STATE = ".quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATE_BYTES = 256  # padded with spaces, so that the size is known before the values are
_MOST_NAMED = 5  # the most problems that a message lists


class Stored(NamedTuple):
    """How one matrix is stored."""

    shape: tuple[int, int]  # [out, in]
    quantization: Quantization
    offset: float | None


def is_quantized(config: Mapping[str, Any], place: str = "config.json") -> bool:
    """Return whether config.json describes weights in bitsandbytes' 4 bits.

    Raises:
        UnsupportedError: it describes another quantisation.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return False
    if not isinstance(stated, dict):
        raise CheckpointError(f"{place}: quantization_config: expected an object, found {shortened(stated)}")
    method, four_bits = stated.get("quant_method", "bitsandbytes"), stated.get("load_in_4bit", False)
    if method != "bitsandbytes" or not four_bits:
        what = method if method != "bitsandbytes" else "bitsandbytes in 8 bits"
        raise UnsupportedError(
            f"{place}: quantization_config: expected none, or bitsandbytes with load_in_4bit, found {shortened(what)}; take "
            "the checkpoint in 16 bits, which is quantised while it is loaded"
        )
    return True


def open_quantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint of the matrices, given the checkpoint of the tensors in the files.

    Raises:
        CheckpointError: tensors of a matrix are missing, misshapen or of an unknown kind; all in one message.
    """
    problems: list[str] = []
    stored: dict[str, Stored] = {}
    hidden: set[str] = set()
    for state_name in [name for name in checkpoint.shapes if _STATE in name]:
        name = state_name.partition(_STATE)[0]
        parts = {part: f"{name}.{part}" for part in _PARTS}
        hidden |= {state_name, *parts.values()}
        found = _read_state(checkpoint, name, state_name, parts, problems)
        if found is not None:
            stored[name] = found
    kinds = sorted({str(matrix.quantization) for matrix in stored.values()})
    if len(kinds) > 1:
        problems.append(f"expected one kind of quantisation for all matrices, found {'; '.join(kinds)}")
    if not stored and not problems:
        problems.append(f"config.json speaks of 4 bits; expected tensors named …{_STATE}nf4 or fp4, found none")
    if problems:
        more = len(problems) - _MOST_NAMED
        raise CheckpointError.of(
            checkpoint.name, problems[:_MOST_NAMED] + ([f"and {more} more of such problems"] if more > 0 else [])
        )

    def read_quantized(name: str) -> QuantizedTensor:
        return _read_quantized(checkpoint, name, stored[name])

    def read(name: str) -> np.ndarray:
        if name not in stored:
            return checkpoint.read(name)
        return np.asarray(_dequantize(read_quantized(name))).T

    shapes = {name: shape for name, shape in checkpoint.shapes.items() if name not in hidden}
    return dataclasses.replace(
        checkpoint,
        shapes=shapes | {name: matrix.shape for name, matrix in stored.items()},
        read=read,
        quantization=next(iter(stored.values())).quantization,
        quantized=frozenset(stored),
        read_quantized=read_quantized,
    )


def quantized_tensors(name: str, q: QuantizedTensor, dtype: str) -> dict[str, np.ndarray]:
    """Return the tensors of one matrix, by name, as programs that use bitsandbytes read them.

    Args:
        dtype: the float dtype that these programs compute with, by torch's name.
    """
    packed, scales = to_blocks(q)
    rows, columns = q.shape
    state: dict[str, Any] = {
        "quant_type": q.data_type,
        "blocksize": q.block_size,
        "dtype": dtype,
        "shape": [columns, rows],
    }
    tensors = {name: np.asarray(packed)[:, None], f"{name}.absmax": np.asarray(scales)}
    tensors[f"{name}.quant_map"] = np.array(codebook(q.data_type))
    if q.scale_absmax is not None and q.scale_offset is not None:
        state |= {
            "nested_blocksize": SCALE_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": float(q.scale_offset),
        }
        tensors[f"{name}.nested_absmax"] = np.asarray(q.scale_absmax)
        tensors[f"{name}.nested_quant_map"] = np.array(dynamic_map())
    text = json.dumps(state).encode().ljust(_STATE_BYTES)
    tensors[f"{name}{_STATE}{q.data_type}"] = np.frombuffer(text, np.uint8)
    return tensors


def quantized_shapes(
    name: str, shape: tuple[int, ...], quantization: Quantization
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Return the dtypes and shapes of the tensors of `quantized_tensors`, in its order, for a matrix `[out, in]`.

    Raises:
        UnsupportedError: a data type that bitsandbytes does not have.
    """
    if quantization.data_type not in _DATA_TYPES:
        raise UnsupportedError(
            f"bitsandbytes has no {quantization.data_type}: expected {' or '.join(_DATA_TYPES)} for weights that it is to "
            "read in 4 bits; weights in 16 or 32 bits can be written of any"
        )
    size, uint8, float32 = math.prod(shape), np.dtype(np.uint8), np.dtype(np.float32)
    blocks, nested = math.ceil(size / quantization.block_size), quantization.double_quantization
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        name: (uint8, ((size + 1) // 2, 1)),
        f"{name}.absmax": (uint8 if nested else float32, (blocks,)),
        f"{name}.quant_map": (float32, (16,)),
    }
    if nested:
        shapes[f"{name}.nested_absmax"] = (float32, (math.ceil(blocks / SCALE_BLOCK_SIZE),))
        shapes[f"{name}.nested_quant_map"] = (float32, (256,))
    return shapes | {f"{name}{_STATE}{quantization.data_type}": (uint8, (_STATE_BYTES,))}


def quantization_config(quantization: Quantization, dtype: str, dense: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for such weights, for transformers.

    Args:
        dense: the full names of the linear layers that are not quantised.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quantization.data_type,
        "bnb_4bit_use_double_quant": quantization.double_quantization,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": [*dense, "lm_head"] if dense else None,
        "llm_int8_threshold": 6.0,
    }


@jax.jit
def _dequantize(q: QuantizedTensor) -> jax.Array:
    return dequantize(q, jnp.float32)


def _read_state(
    checkpoint: Checkpoint, name: str, state_name: str, parts: Mapping[str, str], problems: list[str]
) -> Stored | None:
    """Return how a matrix is stored; None after adding its disagreements with the shapes of its tensors to `problems`."""
    try:
        state = parse_object(checkpoint.read(state_name).tobytes())
        rows, columns = _whole(state, "shape", 2)
        (block_size,) = _whole(state, "blocksize", 1)
        nested = "nested_offset" in state
        if state["quant_type"] not in _DATA_TYPES:
            raise CheckpointError(f"quant_type: expected {' or '.join(_DATA_TYPES)}, found {state['quant_type']}")
        quantization = Quantization(cast(DataType, state["quant_type"]), block_size, nested)
        offset = float(state["nested_offset"]) if nested else None
        if offset is not None and not math.isfinite(offset):
            raise CheckpointError(f"nested_offset: expected a finite number, found {offset}")
        if nested and state["nested_blocksize"] != SCALE_BLOCK_SIZE:
            raise CheckpointError(f"nested_blocksize: expected {SCALE_BLOCK_SIZE}, found {state['nested_blocksize']}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        problems.append(f"{state_name}: expected JSON with quant_type, blocksize and the [out, in] shape, found: {error!r}")
        return None
    blocks = -(-rows * columns // quantization.block_size)
    expected = {parts["absmax"]: blocks, parts["quant_map"]: 16}
    if nested:
        expected |= {parts["nested_absmax"]: -(-blocks // SCALE_BLOCK_SIZE), parts["nested_quant_map"]: 256}
    wrong = [
        f"{part}: expected {size} values, found {'none' if part not in checkpoint.shapes else _size(checkpoint, part)}"
        for part, size in expected.items()
        if part not in checkpoint.shapes or _size(checkpoint, part) != size
    ]
    if name not in checkpoint.shapes:
        wrong.append(f"{name}: missing, though {state_name} is there")
    elif (count := _size(checkpoint, name)) not in {(rows * columns + 1) // 2 // size for size in (1, 2, 4)}:
        wrong.append(f"{name}: expected {(rows * columns + 1) // 2} bytes for {[rows, columns]}, found {count} values")
    problems += wrong
    return None if wrong else Stored((rows, columns), quantization, offset)


def _whole(state: Mapping[str, Any], name: str, count: int) -> list[int]:
    """Return so many whole numbers of a state, above 0."""
    value = state[name]
    found = value if isinstance(value, list) else [value]
    if len(found) != count or any(type(number) is not int or not 0 < number < 2**40 for number in found):
        raise CheckpointError(f"{name}: expected {count} whole numbers above 0, found {str(value)[:80]}")
    return found


def _size(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.shapes[name])


def _read_quantized(checkpoint: Checkpoint, name: str, stored: Stored) -> QuantizedTensor:
    rows, columns = stored.shape
    quantization = stored.quantization
    packed = checkpoint.read(name).reshape(-1).view(np.uint8)
    if packed.size != (rows * columns + 1) // 2:
        raise CheckpointError(f"{checkpoint.name}: {name}: expected {(rows * columns + 1) // 2} bytes, found {packed.size}")
    _check_map(checkpoint, f"{name}.quant_map", codebook(quantization.data_type))
    scales = checkpoint.read(f"{name}.absmax").reshape(-1)
    absmax = offset = None
    if stored.offset is not None:
        _check_map(checkpoint, f"{name}.nested_quant_map", dynamic_map())
        absmax = jnp.asarray(checkpoint.read(f"{name}.nested_absmax").reshape(-1).astype(np.float32))
        offset = jnp.float32(stored.offset)
    expected = np.uint8 if absmax is not None else np.float32
    if scales.dtype != expected:
        raise CheckpointError(f"{checkpoint.name}: {name}.absmax: expected {np.dtype(expected)}, found {scales.dtype}")
    finite = [scales] if absmax is None else [absmax, offset]
    if not all(np.isfinite(values).all() for values in finite):
        raise CheckpointError(f"{checkpoint.name}: {name}: its scales hold NaN or infinite values")
    return from_blocks(
        jnp.asarray(packed),
        jnp.asarray(scales),
        absmax,
        offset,
        shape=(columns, rows),
        data_type=quantization.data_type,
        block_size=quantization.block_size,
        dtype=jnp.float32,
    )


def _check_map(checkpoint: Checkpoint, name: str, expected: np.ndarray) -> None:
    """Raise CheckpointError where the codebook of a file differs from the one here."""
    found = checkpoint.read(name).reshape(-1).astype(np.float32)
    if not np.allclose(found, expected, rtol=0, atol=1e-6):
        worst = int(np.abs(found - expected).argmax())
        raise CheckpointError(
            f"{checkpoint.name}: {name}: expected the table of its data type, found {found[worst]:g} in place of "
            f"{expected[worst]:g} at {worst}"
        )
