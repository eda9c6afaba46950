"""Damaged files of a model: each mutation is read as before, or refused in one error of the package, at once.

A mutation flips bits of a GGUF file's header, of a tokenizer's files or of a config, cuts bytes out, or puts others in. The
fast tier tries a few of each; about 4 seconds.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_llama

from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, stop_ids
from qlora_jax.errors import QLoRAError

FEW, MANY = 40, 300
ENDLESS = 10  # seconds


def mutated(content: bytes, draws: random.Random, *, first: int = 0, last: int | None = None) -> bytes:
    """The bytes with one to four places between `first` and `last` changed."""
    data, last = bytearray(content), len(content) if last is None else last
    for _ in range(draws.randint(1, 4)):
        at = draws.randrange(first, max(min(last, len(data)), first + 1))
        match draws.randrange(5):
            case 0:
                data[at] ^= 1 << draws.randrange(8)
            case 1:
                data[at : at + 8] = draws.randbytes(8)
            case 2:
                del data[at : at + draws.randint(1, 40)]
            case 3:
                data[at:at] = data[at : at + draws.randint(1, 40)]
            case _:
                data[at : at + 8] = draws.choice([b"\xff" * 8, b"\0" * 8, b'"[{1e999', b"99999999"])
    return bytes(data)


def outcome(read: Callable[[], object]) -> str | None:
    """The message; None: the file is read."""
    start, said = time.perf_counter(), None
    try:
        read()
    except QLoRAError as error:
        said = str(error)
    assert time.perf_counter() - start < ENDLESS
    return said


def read_all(path: Path) -> None:
    """As a command opens a model: the small files, and everything that needs no weights."""
    checkpoint = open_checkpoint(path)
    _ = checkpoint.model_config
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, checkpoint.config)
    stop_ids(path, tokenizer)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gguf
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("gguf")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|endoftext|>", "<|im_end|>"]
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for key, value in {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}.items():
        writer.add_uint32(f"llama.{key}", value)
    for key, value in {"head_count": 4, "head_count_kv": 2}.items():
        writer.add_uint32(f"llama.attention.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("llama.rope.scaling.type", "yarn")
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    writer.add_uint32("llama.rope.scaling.original_context_length", 16)
    for key, values in {"tokens": tokens, "merges": ["a b"], "token_type": [1] * (len(tokens) - 2) + [3, 3]}.items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    for key, text in {"model": "gpt2", "pre": "llama-bpe"}.items():
        writer.add_string(f"tokenizer.ggml.{key}", text)
    for key, index in {"eos": len(tokens) - 1, "bos": len(tokens) - 2}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", index)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    parts = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    parts |= {"ffn_norm": (32,), "ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {f"blk.{layer}.{part}": shape for layer in range(2) for part, shape in parts.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read_all(folder / "model.gguf")
    return folder / "model.gguf"


def try_header(gguf_file: Path, folder: Path, count: int, seed: int) -> None:
    content, path = gguf_file.read_bytes(), folder / "model.gguf"
    end = content.index(b"blk.1.ffn_down.weight") + 64
    draws = random.Random(seed)
    said = []
    for _ in range(count):
        path.write_bytes(mutated(content, draws, first=0 if draws.random() < 0.1 else 24, last=end))
        said.append(outcome(lambda: read_all(path)))
    assert sum(text is not None for text in said) > count // 2


def try_folder(folder: Path, copy: Path, names: tuple[str, ...], count: int, seed: int) -> None:
    draws = random.Random(seed)
    for _ in range(count):
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        name = draws.choice(names)
        (copy / name).write_bytes(mutated((folder / name).read_bytes(), draws))
        outcome(lambda: read_all(copy))


SMALL = ("config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "generation_config.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_llama(tmp_path_factory.mktemp("folder"))
    names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0], "temperature": 0.7}))
    return folder


def test_headers_of_gguf_files(gguf_file: Path, tmp_path: Path) -> None:
    try_header(gguf_file, tmp_path, FEW, 0)


def test_files_of_folders(folder: Path, tmp_path: Path) -> None:
    try_folder(folder, tmp_path / "copy", SMALL, FEW, 0)


@pytest.mark.integration
@pytest.mark.parametrize("seed", [1, 2])
def test_many_headers_of_gguf_files(gguf_file: Path, tmp_path: Path, seed: int) -> None:
    try_header(gguf_file, tmp_path, MANY, seed)


@pytest.mark.integration
@pytest.mark.parametrize("seed", [1, 2])
def test_many_files_of_folders(folder: Path, tmp_path: Path, seed: int) -> None:
    try_folder(folder, tmp_path / "copy", SMALL, MANY, seed)
