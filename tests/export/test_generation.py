"""generation_config.json of merged folders, and the dtype that they have by default."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny_models import write_tiny_llama

from qlora_jax import merge
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.hub import Snapshot
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export import generation
from qlora_jax.export.generation import generation_config
from qlora_jax.export.merge import own_dtype

STATED = {"eos_token_id": [7, 1], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "_from_model_config": True}


class Tokens(SimpleNamespace):
    """A tokenizer of ten tokens."""

    def __len__(self) -> int:
        return 10


def tokenizer(eos: int | None = 5, bos: int | None = None) -> Any:
    return Tokens(eos_token_id=eos, bos_token_id=bos)


def test_a_merged_folder_stops_where_its_base_stopped(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "base", eos_token_id=1)
    (folder / "generation_config.json").write_text(json.dumps(STATED))
    merged = merge(folder, None, tmp_path / "merged", progress=False)
    found = json.loads((merged / "generation_config.json").read_text())
    assert found == {"eos_token_id": [7, 1], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "bos_token_id": 0}


def test_the_fields_of_a_config_without_a_file_of_its_own(tmp_path: Path) -> None:
    """As of a T5, whose decoder has to start somewhere; EOS of the tokenizer, which may be the adapter's, is added."""
    config = {"model_type": "t5", "eos_token_id": 1, "decoder_start_token_id": 0, "temperature": None, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint("x", config, {}, lambda name: np.zeros(0), snapshot=Snapshot("x", tmp_path))
    assert generation_config(checkpoint, tokenizer()) == {"eos_token_id": [1, 5], "decoder_start_token_id": 0}
    assert generation_config(checkpoint, tokenizer(1)) == {"eos_token_id": 1, "decoder_start_token_id": 0}
    assert generation_config(dataclasses.replace(checkpoint, snapshot=None), None) == {
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    assert generation_config(Checkpoint("x", {}, {}, lambda name: np.zeros(0)), None) is None


@pytest.mark.parametrize(("stated", "kept"), [([1, 77, 8, 10], [1, 8, 5]), (77, 5), ([77], [5])])
def test_an_end_that_is_no_token_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stated: Any, kept: Any
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated, "top_k": 20}))
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9}))
    checkpoint = Checkpoint("x", {"vocab_size": 9}, {}, lambda name: np.zeros(0), snapshot=Snapshot("x", tmp_path))
    assert generation_config(checkpoint, tokenizer()) == {"eos_token_id": kept, "top_k": 20}
    ids = "77, 10" if kept == [1, 8, 5] else "77"
    assert f"written without the stop id {ids} of x, which is no token of this model (ids are below 10)" in caplog.text
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    assert generation_config(checkpoint, tokenizer(None)) is None


def test_a_gguf_file_ends_turns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    file.touch()
    metadata = {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    monkeypatch.setattr(generation, "read_header", lambda path: SimpleNamespace(metadata=metadata))
    monkeypatch.setattr(generation, "stop_ids", lambda base, tokenizer: frozenset((3, 8)))
    checkpoint = Checkpoint("x", {"eos_token_id": 3}, {}, lambda name: np.zeros(0), snapshot=Snapshot("x", file))
    assert generation_config(checkpoint, tokenizer(3, 2)) == {
        "eos_token_id": [3, 8],
        "bos_token_id": 2,
        "temperature": 0.5,
        "top_k": 20,
        "do_sample": True,
    }


@pytest.mark.parametrize(
    ("stated", "stored", "expected"),
    [
        ({"torch_dtype": "float16"}, np.float32, "float16"),
        ({"dtype": "bfloat16"}, np.float32, "bfloat16"),
        ({"torch_dtype": "torch.float32"}, np.float16, "float32"),
        ({"torch_dtype": "auto"}, np.float16, "float16"),
        ({}, ml_dtypes.bfloat16, "bfloat16"),
        ({}, np.float32, "float32"),
        ({}, None, "bfloat16"),
    ],
)
def test_the_dtype_of_a_base(
    make_tiny_llama: Callable[..., Path], stated: dict[str, Any], stored: Any, expected: str
) -> None:
    checkpoint = open_checkpoint(str(make_tiny_llama()))
    config = {name: value for name, value in checkpoint.config.items() if "dtype" not in name} | stated
    dtypes = {} if stored is None else dict.fromkeys(checkpoint.shapes, np.dtype(stored))
    assert own_dtype(dataclasses.replace(checkpoint, config=config, dtypes=dtypes)) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bos_token_id", 2**31),
        ("pad_token_id", "2"),
        ("eos_token_id", [1, -2]),
        ("temperature", float("nan")),
        ("top_k", 0.5),
    ],
)
def test_fields_of_other_kinds_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    folder = write_tiny_llama(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: {field}: expected "):
        merge(folder, None, tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()
