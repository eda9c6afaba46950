"""Dispatch by the kind of source, and what is said where a source is none of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file

from qlora_jax.checkpoint.hub import resolve
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, path / "model.safetensors")
    return path


def test_folder(folder: Path):
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.name == str(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.shapes == {"a": (2, 3)}
    np.testing.assert_array_equal(checkpoint.read("a"), [[0, 1, 2], [3, 4, 5]])


def test_unknown_tensor_names_the_nearest(folder: Path):
    with pytest.raises(CheckpointError, match=r"has no tensor 'aa' among its 1\. Nearest: a"):
        open_checkpoint(str(folder)).read("aa")


def test_missing_path_says_what_is_accepted(tmp_path: Path):
    for source in (tmp_path / "absent", "./absent", "absent.gguf", "a/b/c"):
        with pytest.raises(CheckpointError, match=r"no such file or folder \(looked at /.*hub id such as owner/name"):
            open_checkpoint(str(source))


def test_file_of_another_kind(tmp_path: Path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown kind \(suffix '.bin'\).*Accepted: a folder"):
        open_checkpoint(str(tmp_path / "model.bin"))


def test_revision_of_a_local_path_is_an_error(folder: Path):
    with pytest.raises(CheckpointError, match="no revisions; found revision='main'"):
        resolve(folder, "main")


def test_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked = {}

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = open_checkpoint("owner/name", revision="v1")
    assert checkpoint.name == "owner/name"
    assert checkpoint.shapes == {"a": (2, 3)}
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert not any(pattern.endswith(".bin") for pattern in asked["patterns"])


def test_of_a_repository_only_what_belongs_to_the_model_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The small files first, then what the index names, of the same commit; of an adapter its own weights."""
    folder = tmp_path / "snapshots" / "c0ffee"
    (folder / "inner").mkdir(parents=True)
    asked: list[tuple[str | None, set[str]]] = []

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((revision, set(allow_patterns)))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [])
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}')
    assert resolve("owner/name", "main").commit == "c0ffee"
    assert asked[0] == ("main", {"*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"})
    assert asked[1] == ("c0ffee", {"x.safetensors", "y.safetensors"})
    (folder / "model.safetensors.index.json").write_text("[")
    resolve("owner/name")
    assert "model.safetensors" in asked[3][1]
    (folder / "inner" / "adapter_config.json").write_text("{}")
    assert resolve("owner/name:inner").path == folder / "inner"
    names = ("adapter_model.safetensors", "adapter_model.bin", "prompt_encoder.safetensors")
    assert asked[5][1] == {f"inner/{name}" for name in names}


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch):
    def download(*_args: object, **_kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("owner/absent", revision="v1")
    for part in (
        "owner/absent: tried as a local path",
        "hub id at revision 'v1'",
        "no connection",
        "Accepted:",
    ):
        assert part in str(caught.value)
    assert "long explanation" not in str(caught.value)


def test_problems_are_listed():
    assert str(CheckpointError.of("x", ["one."])) == "x: one."
    assert str(CheckpointError.of("x", ["one.", "two."])) == "x: 2 problems:\n  - one.\n  - two."


def test_a_missing_shard_matters_if_a_tensor_in_it_is_needed(tiny_llama: Path, tmp_path: Path) -> None:
    """The names that an index places in a file that is not there: of a tower, of an old buffer, and of the model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama / name, folder / name.replace("model.s", "a.s"))
    names = list(open_checkpoint(str(tiny_llama)).shapes)

    def write(*lost: str, config: dict[str, Any] | None = None) -> None:
        weight_map = dict.fromkeys(names, "a.safetensors") | dict.fromkeys(lost, "gone.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "config.json").write_text(json.dumps(config or json.loads((tiny_llama / "config.json").read_text())))

    write("visual.patch.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")
    with pytest.warns(UserWarning, match=r"gone.safetensors is missing; the model does not need the 2 tensors .*inv_freq"):
        assert set(open_checkpoint(str(folder)).shapes) == set(names)
    for needed in ("model.layers.1.mlp.up_proj.weight.absmax", "model.layers.1.self_attn.q_proj.weight.quant_map"):
        write("visual.patch.weight", needed)
        with pytest.raises(CheckpointError, match=r"gone.safetensors: is missing \(1 of the tensors in "):
            open_checkpoint(str(folder))
    write("lm_head.weight", config=json.loads((tiny_llama / "config.json").read_text()) | {"tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=r"gone.safetensors: is missing \(1 "):
        open_checkpoint(str(folder))
    write("visual.patch.weight", config={"model_type": "llama"})  # of which nothing is known
    with pytest.raises(CheckpointError, match=r"gone.safetensors: is missing \(1 "):
        open_checkpoint(str(folder))
