"""Packed types of GGUF: each against a decoder of one block, value by value, after ggml's dequantize_row_* functions."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quantize

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.open import open_gguf
from qlora_jax.checkpoint.gguf.values import read_values
from qlora_jax.errors import CheckpointError

Decoder = Callable[[bytes], list[float]]


def half(block: bytes, at: int) -> float:
    return struct.unpack_from("<e", block, at)[0]


def q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * code for code in struct.unpack_from("<32b", block, 2)]


def four_bits(codes: bytes) -> list[int]:
    return [code & 15 for code in codes] + [code >> 4 for code in codes]


def fifth_bits(block: bytes, at: int) -> list[int]:
    bits = struct.unpack_from("<I", block, at)[0]
    return [bits >> i & 1 for i in range(32)]


def q4_0(block: bytes) -> list[float]:
    return [half(block, 0) * (code - 8) for code in four_bits(block[2:])]


def q4_1(block: bytes) -> list[float]:
    return [half(block, 0) * code + half(block, 2) for code in four_bits(block[4:])]


def q5_0(block: bytes) -> list[float]:
    codes = zip(four_bits(block[6:]), fifth_bits(block, 2), strict=True)
    return [half(block, 0) * ((low | high << 4) - 16) for low, high in codes]


def q5_1(block: bytes) -> list[float]:
    codes = zip(four_bits(block[8:]), fifth_bits(block, 4), strict=True)
    return [half(block, 0) * (low | high << 4) + half(block, 2) for low, high in codes]


def two_bits(codes: bytes) -> list[int]:
    """Of 64 bytes: 128 values from the first 32, the lowest bits of all of them first; then the same of the others."""
    return [codes[start + i] >> shift & 3 for start in (0, 32) for shift in (0, 2, 4, 6) for i in range(32)]


def q2_k(block: bytes) -> list[float]:
    scales, codes, d, least = block[:16], two_bits(block[16:80]), half(block, 80), half(block, 82)
    return [d * (scales[i // 16] & 15) * code - least * (scales[i // 16] >> 4) for i, code in enumerate(codes)]


def q3_k(block: bytes) -> list[float]:
    mask, codes, packed, d = block[:32], two_bits(block[32:96]), block[96:108], half(block, 108)
    scales = []
    for i in range(16):
        low = packed[i] & 15 if i < 8 else packed[i - 8] >> 4
        scales.append((low | (packed[8 + i % 4] >> 2 * (i // 4) & 3) << 4) - 32)
    return [d * scales[i // 16] * (code - (0 if mask[i % 32] >> i // 32 & 1 else 4)) for i, code in enumerate(codes)]


def scale_and_least(packed: bytes, i: int) -> tuple[int, int]:
    if i < 4:
        return packed[i] & 63, packed[i + 4] & 63
    return packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4


def q4_k(block: bytes) -> list[float]:
    d, least, result = half(block, 0), half(block, 2), []
    for i in range(8):
        scale, minimum = scale_and_least(block[4:16], i)
        codes = block[16 + i // 2 * 32 :][:32]
        result += [d * scale * (code >> 4 * (i % 2) & 15) - least * minimum for code in codes]
    return result


def q5_k(block: bytes) -> list[float]:
    d, least, result = half(block, 0), half(block, 2), []
    for i in range(8):
        scale, minimum = scale_and_least(block[4:16], i)
        codes = zip(block[48 + i // 2 * 32 :][:32], block[16:48], strict=True)
        result += [d * scale * ((low >> 4 * (i % 2) & 15) + 16 * (high >> i & 1)) - least * minimum for low, high in codes]
    return result


def q6_k(block: bytes) -> list[float]:
    d, scales, result = half(block, 208), struct.unpack_from("<16b", block, 192), []
    for i in range(256):
        part, quarter, j = i // 128, i % 128 // 32, i % 32
        low = block[64 * part + 32 * (quarter % 2) + j] >> 4 * (quarter // 2) & 15
        high = block[128 + 32 * part + j] >> 2 * quarter & 3
        result.append(d * scales[8 * part + 2 * quarter + j // 16] * ((low | high << 4) - 32))
    return result


SIMPLE: dict[str, Decoder] = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1}
K_QUANTS: dict[str, tuple[Decoder, Sequence[int]]] = {  # and where the half-precision numbers of a block lie
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]]) -> Path:
    """A file of packed rows uint8 `[rows, bytes]` and their types."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (rows, storage) in tensors.items():
        writer.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[storage])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def decoded(rows: np.ndarray, storage: str, decode: Decoder) -> np.ndarray:
    size = GGML_QUANT_SIZES[gguf.GGMLQuantizationType[storage]][1]
    blocks = rows.reshape(-1, size)
    return np.array([decode(block.tobytes()) for block in blocks]).reshape(len(rows), -1)


def real_rows() -> np.ndarray:
    """Rows of SmolLM2: the last of the down projection of its last layer."""
    try:
        checkpoint = open_gguf(fetch_default_model())
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    return checkpoint.read("model.layers.29.mlp.down_proj.weight")[-3:]


def test_simple_types_on_rows_of_a_real_model(tmp_path: Path):
    rows = real_rows()
    assert rows.shape == (3, 1536)
    assert 0.01 < rows.std() < 1
    packed = {name: (quantize(rows, gguf.GGMLQuantizationType[name]), name) for name in SIMPLE}
    header = read_header(write(tmp_path / "m.gguf", packed))
    for name, decode in SIMPLE.items():
        found = read_values(header, name)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, decoded(packed[name][0], name, decode), rtol=1e-6, atol=1e-9, err_msg=name)
        # The type stands for these weights: half a step of the coarsest blocks is some 15 % of their spread.
        assert np.abs(found - rows).max() < (0.02 if name == "Q8_0" else 0.4) * np.abs(rows).max(), name


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16"])
def test_plain_types_on_rows_of_a_real_model(tmp_path: Path, storage: str):
    rows = real_rows()
    header = read_header(write(tmp_path / "m.gguf", {"x": (quantize(rows, gguf.GGMLQuantizationType[storage]), storage)}))
    bits = rows.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # bfloat16: to the nearest, ties to even
    expected = {
        "F32": rows,
        "F16": rows.astype(np.float16).astype(np.float32),
        "BF16": rounded.astype(np.uint32).view(np.float32),
    }
    np.testing.assert_array_equal(read_values(header, "x"), expected[storage])


@pytest.mark.parametrize("storage", K_QUANTS)
def test_k_quants(tmp_path: Path, storage: str):
    """Random codes and scales fill every bit of a block; a wrong place of one of them shows."""
    decode, halves = K_QUANTS[storage]
    random = np.random.default_rng(0)
    rows = random.integers(0, 256, (5, 3 * GGML_QUANT_SIZES[gguf.GGMLQuantizationType[storage]][1]), np.uint8)
    blocks = rows.reshape(15, -1)
    for at in halves:
        blocks[:, at : at + 2] = random.uniform(0.5, 2.0, (15, 1)).astype(np.float16).view(np.uint8)
    found = read_values(read_header(write(tmp_path / "m.gguf", {"x": (rows, storage)})), "x")
    assert found.shape == (5, 768)
    assert found.std() > 1
    np.testing.assert_allclose(found, decoded(rows, storage, decode), rtol=1e-5, atol=1e-4)


def test_order(tmp_path: Path):
    rows = np.arange(64, dtype=np.float32).reshape(4, 16)
    header = read_header(write(tmp_path / "m.gguf", {"x": (rows, "F32")}))
    np.testing.assert_array_equal(read_values(header, "x", np.array([2, 0, 3, 1])), rows[[1, 3, 0, 2]])
