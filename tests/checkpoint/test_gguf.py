"""GGUF files: values against a decoder written out here, all of SmolLM2 against transformers, bad files."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.gguf.header import read_header
from qlora_jax.checkpoint.gguf.open import open_gguf
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError

HEADS, KEY_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4, 2, 16, 64, 96, 2, 40
PARTS = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KEY_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KEY_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (INTERMEDIATE, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INTERMEDIATE, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INTERMEDIATE)),
}


def default_model() -> Path:
    try:
        return fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")


def stored_tensors(tied: bool = True) -> dict[str, np.ndarray]:
    """Random tensors of a small Llama model by GGUF's names."""
    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)} | (
        {} if tied else {"output": (VOCABULARY, HIDDEN)}
    )
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(LAYERS) for part, (_, shape) in PARTS.items()}
    return {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of that model; a change to None leaves an entry out."""
    entries = {
        "block_count": LAYERS,
        "context_length": 256,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KEY_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
        "rope.dimension_count": HEAD_DIM,
        "vocab_size": VOCABULARY,
    }
    return {key: value for key, value in (entries | changes).items() if value is not None}


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    entries: dict[str, Any] | None = None,
    storage: str = "F32",
    architecture: str = "llama",
    outer: dict[str, Any] | None = None,
) -> Path:
    """A GGUF file; matrices are stored as `storage`, vectors as float32."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata() if entries is None else entries).items():
        _add(writer, f"{architecture}.{key}", value)
    for key, value in (outer or {}).items():
        _add(writer, key, value)
    kind = gguf.GGMLQuantizationType[storage]
    for name, tensor in tensors.items():
        if tensor.ndim == 1 or storage == "F32":
            writer.add_tensor(name, tensor)
        elif storage == "F16":
            writer.add_tensor(name, tensor.astype(np.float16))
        else:
            writer.add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def decoded(matrix: np.ndarray, storage: str) -> np.ndarray:
    """What a matrix is after it was stored, value by value from the packed bytes."""
    if storage == "F32" or matrix.ndim == 1:
        return matrix
    if storage == "F16":
        return matrix.astype(np.float16).astype(np.float32)
    packed = quantize(matrix, gguf.GGMLQuantizationType[storage])
    result = np.empty_like(matrix)
    size = {"Q8_0": 34, "Q4_1": 20}[storage]
    for row in range(matrix.shape[0]):
        for block in range(matrix.shape[1] // 32):
            data = packed[row, block * size : (block + 1) * size]
            scale = data[:2].view(np.float16).astype(np.float32)[0]
            if storage == "Q8_0":
                values = data[2:].view(np.int8).astype(np.float32) * scale
            else:
                smallest = data[2:4].view(np.float16).astype(np.float32)[0]
                codes = np.concatenate([data[4:] & 15, data[4:] >> 4]).astype(np.float32)
                values = codes * scale + smallest
            result[row, block * 32 : (block + 1) * 32] = values
    return result


def halves_apart(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows in Hugging Face's order, one by one by the rule in the module's docstring."""
    result = np.empty_like(matrix)
    size = len(matrix) // heads
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                result[head * size + j * size // 2 + i] = matrix[head * size + 2 * i + j]
    return result


def problems_of(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert str(path.parent) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("storage", ["F32", "F16", "Q8_0", "Q4_1"])
def test_values_and_names(tmp_path: Path, storage: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qlora_jax.checkpoint.gguf.values.BAND_BYTES", 7 * HIDDEN * 4)  # bands that do not divide the rows
    stored = stored_tensors(tied=False)
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", stored, storage=storage)))
    expected = {
        "model.embed_tokens.weight": stored["token_embd.weight"],
        "model.norm.weight": stored["output_norm.weight"],
        "lm_head.weight": stored["output.weight"],
    }
    for layer in range(LAYERS):
        for part, (name, _) in PARTS.items():
            expected[f"model.layers.{layer}.{name}.weight"] = stored[f"blk.{layer}.{part}.weight"]
    assert checkpoint.shapes == {name: tensor.shape for name, tensor in expected.items()}
    for name, tensor in expected.items():
        value = decoded(tensor, storage)
        if "q_proj" in name or "k_proj" in name:
            value = halves_apart(value, HEADS if "q_proj" in name else KEY_HEADS)
        found = checkpoint.read(name)
        assert found.dtype == np.float32
        assert found.flags.writeable
        np.testing.assert_array_equal(found, value, err_msg=name)


def test_biases_are_reordered_like_their_weights(tmp_path: Path):
    stored = stored_tensors()
    biases = {
        f"blk.{i}.attn_{part}.bias": stored[f"blk.{i}.attn_{part}.weight"][:, 0].copy() for i in range(2) for part in "qk"
    }
    checkpoint = open_gguf(write(tmp_path / "m.gguf", stored | biases))
    assert checkpoint.config["attention_bias"] is True
    assert checkpoint.config["mlp_bias"] is False
    for part in "qk":
        weight = checkpoint.read(f"model.layers.1.self_attn.{part}_proj.weight")
        np.testing.assert_array_equal(checkpoint.read(f"model.layers.1.self_attn.{part}_proj.bias"), weight[:, 0])


def test_config(tmp_path: Path):
    outer = {
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
    }
    config = open_gguf(write(tmp_path / "m.gguf", stored_tensors(), outer=outer)).config
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(1e-5)),
        "max_position_embeddings": 256,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "rope_theta": 5000.0,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }


def test_config_where_the_file_leaves_things_out(tmp_path: Path):
    entries = metadata(**{"rope.freq_base": None, "rope.dimension_count": None, "vocab_size": None})
    outer = {"tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCABULARY)]}
    config = open_gguf(write(tmp_path / "m.gguf", stored_tensors(tied=False), entries, outer=outer)).config
    assert config["rope_theta"] == 10000.0
    assert config["head_dim"] == HEAD_DIM
    assert config["vocab_size"] == VOCABULARY
    assert config["tie_word_embeddings"] is False


def test_rope_of_llama_3_1_is_recovered(tmp_path: Path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    theta, divisors = 500000.0, []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 8 + smooth))
    tensors = stored_tensors() | {"rope_freqs.weight": np.array(divisors, np.float32)}
    entries = metadata(**{"rope.freq_base": theta})
    checkpoint = open_gguf(write(tmp_path / "m.gguf", tensors, entries))
    assert checkpoint.config["rope_parameters"] == rope | {"rope_theta": theta}
    assert not any("rope" in name for name in checkpoint.shapes)

    tensors["rope_freqs.weight"] = np.linspace(1, 8, HEAD_DIM // 2).astype(np.float32)
    assert "expected 8 divisors of Llama 3.1's kind" in problems_of(write(tmp_path / "n.gguf", tensors, entries))


def test_linear_rope(tmp_path: Path):
    path = write(
        tmp_path / "m.gguf",
        stored_tensors(),
        metadata(**{"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
    )
    assert open_gguf(path).config["rope_parameters"] == {
        "rope_theta": 5000.0,
        "rope_type": "linear",
        "factor": 2.0,
    }
    path = write(tmp_path / "n.gguf", stored_tensors(), metadata(**{"rope.scaling.type": "longrope"}))
    assert "rope.scaling.type: expected none, linear or yarn, found 'longrope'" in problems_of(path)


def test_unsupported_architecture(tmp_path: Path):
    path = write(tmp_path / "m.gguf", stored_tensors(), architecture="mamba")
    assert "found 'mamba'" in problems_of(path)
    assert "general.architecture: expected one of llama, qwen2, " in problems_of(path)


def test_metadata_problems_are_collected(tmp_path: Path):
    entries = metadata(**{"block_count": None, "attention.head_count_kv": [2, 2], "rope.dimension_count": 8})
    text = problems_of(write(tmp_path / "m.gguf", stored_tensors(), entries))
    assert "3 problems" in text
    assert "llama.block_count: expected one number, found nothing" in text
    assert "llama.attention.head_count_kv: expected one number, found a list" in text
    assert "llama.rope.dimension_count: expected the size of a head, 16, found 8" in text


@pytest.mark.parametrize(
    ("entries", "outer", "expected"),
    [
        ({"expert_count": 8}, {}, "mixture of experts"),
        ({}, {"split.count": 3}, "one of 3 parts of a split file: expected a name that ends in -00001-of-00003.gguf"),
    ],
)
def test_other_kinds_of_llama(tmp_path: Path, entries: dict, outer: dict, expected: str):
    assert expected in problems_of(write(tmp_path / "m.gguf", stored_tensors(), metadata(**entries), outer=outer))


def write_split(folder: Path, tensors: dict[str, np.ndarray], most: int = 8) -> list[Path]:
    """As llama-gguf-split does; the writer is the gguf package's own."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=most)
    for key, value in metadata().items():
        _add(writer, f"llama.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("m-*.gguf"))


def test_a_split_file_is_one_file(tmp_path: Path):
    stored = stored_tensors()
    whole = open_gguf(write(tmp_path / "w.gguf", stored))
    parts = write_split(tmp_path, stored)
    assert len(parts) == 3
    for part in parts:
        checkpoint = open_gguf(part)
        assert (checkpoint.config, checkpoint.shapes.keys()) == (whole.config, whole.shapes.keys())
        for name in whole.shapes:
            np.testing.assert_array_equal(checkpoint.read(name), whole.read(name))
    assert read_header(parts[2]).path == parts[0]  # which has the metadata


def test_parts_that_do_not_belong_together(tmp_path: Path):
    parts = write_split(tmp_path, stored_tensors())
    other = tmp_path / "other"
    other.mkdir()
    parts_of_two = write_split(other, stored_tensors(), most=10)
    assert len(parts_of_two) == 2
    third = parts[2].read_bytes()
    parts[2].unlink()
    assert "one of 3 parts of a split file: not beside it are m-00003-of-00003.gguf" in problems_of(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    assert "expected part 2 of 3 (split.no, split.count), found (1, 3)" in problems_of(parts[0])
    parts[2].write_bytes(third[:-1])
    assert "part m-00003-of-00003.gguf is truncated" in problems_of(parts[0])
    parts[2].write_bytes(third)
    parts[1].write_bytes(parts_of_two[1].read_bytes())
    assert "expected part 1 of 3 (split.no, split.count), found (1, 2)" in problems_of(parts[0])


HARMLESS = {
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "attention.clamp_kqv": 0.0,
    "attention.sliding_window": 0,
    "attention.chunk_size": 8192,
    "attention.key_length_swa": HEAD_DIM,
    "attention.value_length_swa": HEAD_DIM,
    "rope.dimension_count_swa": HEAD_DIM,
    "embedding_length_out": HIDDEN,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_weights_scale": 0.0,
    "rope.scaling.type": "none",
    "rope.scaling.yarn_ext_factor": -1.0,
    "rope.scaling.yarn_log_multiplier": 0.1,  # without YaRN
    "rope.scaling.yarn_attn_factor": 0.9,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.original_context_length": 64,
    "swiglu_clamp_exp": [0.0, 0.0],
}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
HARMFUL = {
    "attention.chunk_size": 16,
    "embedding_length_out": HIDDEN // 2,
    "rope.dimension_count_swa": HEAD_DIM // 2,
    "nextn_predict_layers": 1,
    "logit_scale": 0.5,
    "attention.clamp_kqv": 1.0,
    "swiglu_clamp_exp": [0.0, 7.0],
}


def test_entries_that_change_nothing(tmp_path: Path):
    plain = open_gguf(write(tmp_path / "m.gguf", stored_tensors())).config
    assert open_gguf(write(tmp_path / "n.gguf", stored_tensors(), metadata(**HARMLESS))).config == plain


@pytest.mark.parametrize("key", HARMFUL)
def test_entries_that_might_change_something(tmp_path: Path, key: str):
    text = problems_of(write(tmp_path / "m.gguf", stored_tensors(), metadata(**{key: HARMFUL[key]})))
    assert f"metadata llama.{key}: expected none of this name, found" in text


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, None),
        ({"rope.scaling.attn_factor": 0.5}, 0.5 * (1 + 0.1 * math.log(4))),
        ({"rope.scaling.yarn_attn_factor": 0.9}, 0.9),  # transformers' attention_factor
        ({"rope.scaling.yarn_attn_factor": 1.0}, None),
        ({"rope.scaling.yarn_attn_factor": 0.9, "rope.scaling.attn_factor": 0.5}, 0.45),
        ({"rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0}, None),
    ],
)
def test_yarn_with_a_factor_on_attention(tmp_path: Path, entries: dict[str, Any], expected: float | None):
    rope = open_gguf(write(tmp_path / "m.gguf", stored_tensors(), metadata(**YARN, **entries))).config["rope_parameters"]
    assert rope.get("attention_factor") == (expected if expected is None else pytest.approx(expected))


def test_yarn_of_other_architectures(tmp_path: Path):
    entries = YARN | {"rope.scaling.yarn_log_multiplier": 0.1}
    text = problems_of(write(tmp_path / "m.gguf", stored_tensors(), metadata(**entries)))
    assert "llama.rope.scaling.yarn_log_multiplier: expected none with YaRN, found 0.1" in text
    assert "gguf-new-metadata --remove-metadata" in text


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"block_count": 10**9}, "llama.block_count: expected at most the 20 tensors of the file, found 1000000000"),
        ({"block_count": 2.0}, "llama.block_count: expected one number, found 2.0"),
        ({"embedding_length": 0}, "llama.embedding_length: expected one number, found 0"),
        ({"attention.head_count": 0}, "llama.attention.head_count: expected one number, found 0"),
        ({"attention.head_count_kv": 2**32 - 1}, "llama.attention.head_count_kv: expected one number, found 4294967295"),
        ({"rope.freq_base": float("nan")}, "llama.rope.freq_base: expected one number, found nan"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "rms_epsilon: expected one number, found -1.0"),
        ({"context_length": "long"}, "llama.context_length: expected one number, found a str"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, "rope.scaling.factor: expected one number, found 0.0"),
    ],
)
def test_numbers_out_of_bounds(tmp_path: Path, entries: dict[str, Any], expected: str):
    assert expected in problems_of(write(tmp_path / "m.gguf", stored_tensors(), metadata(**entries)))


def test_tensors_that_overlap(tmp_path: Path):
    path = write(tmp_path / "m.gguf", stored_tensors())
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16 + 4
    content[at : at + 8] = (int.from_bytes(content[at : at + 8], "little") - 32).to_bytes(8, "little")
    path.write_bytes(content)
    assert "tensor 'blk.0.ffn_up.weight': expected it after 'blk.0.ffn_gate.weight', which ends at byte" in problems_of(path)


@pytest.mark.parametrize(
    ("at", "value", "expected"),
    [
        (8, 2**40, "expected at most 1,048,576 values after offset 24, found 1,099,511,627,776"),  # tensors
        (16, 2**40, "expected at most 65,536 values after offset 24, found 1,099,511,627,776"),  # entries
    ],
)
def test_counts_are_compared_with_the_file(tmp_path: Path, at: int, value: int, expected: str):
    path = write(tmp_path / "m.gguf", stored_tensors())
    content = bytearray(path.read_bytes())
    content[at : at + 8] = value.to_bytes(8, "little")
    path.write_bytes(content)
    assert expected in problems_of(path)


def test_unknown_missing_and_misshapen_tensors_are_collected(tmp_path: Path):
    tensors = stored_tensors()
    for name in ("blk.0.attn_q.weight", "output_norm.weight"):
        del tensors[name]
    for name in ("blk.2.attn_q.weight", "blk.0.attn_q_norm.weight", "blk.0.ffn_norm.bias", "surplus"):
        tensors[name] = np.zeros((64, 32), np.float32)
    tensors["blk.1.attn_k.weight"] = np.zeros((30, HIDDEN), np.float32)
    tensors["token_embd.weight"] = np.zeros((VOCABULARY + 1, HIDDEN), np.float32)
    text = problems_of(write(tmp_path / "m.gguf", tensors))
    assert "holds 4 tensors unknown to a Llama model of 2 layers: 'blk.2.attn_q.weight', 'blk.0.attn_q_norm.weight'" in text
    assert "lacks 2 of the tensors" in text
    assert "'output_norm.weight', 'blk.0.attn_q.weight'" in text
    assert "tensor 'blk.1.attn_k.weight': expected 32 rows by the metadata, found shape [30, 64]" in text
    assert "tensor 'token_embd.weight': expected 40 rows by the metadata, found shape [41, 64]" in text


def test_truncated_data(tmp_path: Path):
    path = write(tmp_path / "m.gguf", stored_tensors())
    end = max(tensor.offset + tensor.size for tensor in read_header(path).tensors.values())
    with open(path, "r+b") as file:
        file.truncate(end - 1)
    text = problems_of(path)
    assert f"is truncated: expected {end:,} bytes, found {end - 1:,}; incomplete are" in text
    assert "(1 of 20 tensors)" in text


def test_truncated_anywhere_in_the_header(tmp_path: Path):
    path = write(tmp_path / "m.gguf", stored_tensors(), outer={"tokenizer.ggml.tokens": ["a", "b"]})
    content = path.read_bytes()
    start = min(tensor.offset for tensor in read_header(path).tensors.values())
    for size in range(0, start - 40, 7):
        path.write_bytes(content[:size])
        text = problems_of(path)
        assert "not a GGUF file" in text if size < 4 else "truncated or damaged within its header" in text


def test_truncated_after_it_was_opened(tmp_path: Path):
    path = write(tmp_path / "m.gguf", stored_tensors())
    checkpoint = open_gguf(path)
    with open(path, "r+b") as file:
        file.truncate(checkpoint_end := read_header(path).tensors["output_norm.weight"].offset)
    assert checkpoint_end
    with pytest.raises(CheckpointError, match=r"changed after it was opened: tensor 'output_norm.weight'"):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PK\x03\x04" + bytes(60), "expected it to begin with b'GGUF', found b'PK"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "found a pointer of Git LFS; fetch the file itself"),
        (
            b"GGUF" + (1).to_bytes(4, "little") + bytes(60),
            "expected GGUF version 2 or 3, little endian; found version 1",
        ),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(60), "found version 3, big endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 60, "is damaged within its header"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, expected: str):
    (tmp_path / "m.gguf").write_bytes(content)
    assert expected in problems_of(tmp_path / "m.gguf")


def test_storage_that_cannot_be_dequantised(tmp_path: Path):
    tensors = stored_tensors()
    path = write(tmp_path / "m.gguf", tensors)
    content = path.read_bytes()
    # In the table a name is followed by its two sizes and then by the type: make one type an integer.
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    for code, expected in (
        (26, "cannot dequantise I32, the storage type of 'blk.0.ffn_up.weight'"),
        (999, "storage type 999"),
    ):
        path.write_bytes(content[:at] + code.to_bytes(4, "little") + content[at + 4 :])
        assert expected in problems_of(path)


def test_every_value_type_of_metadata(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    values = {
        "uint8": 1,
        "int8": -1,
        "uint16": 2,
        "int16": -2,
        "uint32": 3,
        "int32": -3,
        "uint64": 4,
        "int64": -4,
    }
    values |= {"float32": 0.5, "float64": 0.25, "bool": True, "string": "ß"}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("numbers", [1, 2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_header(tmp_path / "m.gguf").metadata
    assert {key: found[key] for key in values} == values
    assert found["strings"] == ["a", "", "ü"]
    assert found["numbers"] == [1, 2]
    assert type(found["bool"]) is bool


@pytest.mark.integration
def test_config_of_the_default_model_equals_that_of_transformers(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch", reason="transformers reads GGUF only with PyTorch")
    from transformers import AutoConfig, LlamaConfig

    path = default_model()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    ours = LlamaConfig(**open_gguf(path).config).to_dict()
    # Not in the file: its own path, the class, and the type of the values that we return.
    apart = {"_name_or_path", "_model_name_or_path", "architectures", "dtype", "rope_theta"}
    assert {key: value for key, value in ours.items() if key not in apart} == {
        key: value for key, value in peer.items() if key not in apart
    }


@pytest.mark.integration
def test_all_tensors_of_the_default_model_equal_those_of_transformers(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch", reason="transformers reads GGUF only with PyTorch")
    from transformers import AutoModelForCausalLM

    path = default_model()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32").state_dict()
    checkpoint = open_gguf(path)
    assert len(checkpoint.shapes) == 272
    assert checkpoint.shapes.keys() == peer.keys() - {"lm_head.weight"}  # tied: the embedding itself
    for name in checkpoint.shapes:
        np.testing.assert_array_equal(checkpoint.read(name), peer[name].numpy(), err_msg=name)


def test_default_model_without_torch():
    checkpoint = open_gguf(default_model())
    assert len(checkpoint.shapes) == 272
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.config["rope_theta"] == 100000.0
    query = checkpoint.read("model.layers.29.self_attn.q_proj.weight")
    assert query.shape == (576, 576)
    assert 0.01 < query.std() < 1


MEASURE = """
import sys
from pathlib import Path
from qlora_jax.checkpoint.gguf.open import open_gguf

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

checkpoint = open_gguf(Path(sys.argv[1]))
before = memory("VmRSS")
for name in checkpoint.shapes:
    tensor = checkpoint.read(name)
print(memory("VmHWM") - before, "torch" in sys.modules, "jax" in sys.modules)
"""


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of resident memory")
def test_memory_is_bounded_by_the_largest_tensor():
    path = default_model()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    peak, torch, _ = done.stdout.split()
    assert torch == "False"
    largest = 49152 * 576 * 4
    assert int(peak) < 2 * largest, f"{int(peak) / largest:.2f} times the largest tensor"
