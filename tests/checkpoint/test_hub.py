"""Repositories of the hub: which files are fetched, and which is opened, by a hub that is a folder here."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest

from qlora_jax.checkpoint.hub import resolve
from qlora_jax.errors import CheckpointError

COMMIT = "0" * 39 + "7"


class Hub:
    """`owner/name` with these files. The cache is laid out as the hub's own: snapshots/<commit>."""

    def __init__(self, root: Path, files: dict[str, str]) -> None:
        self.repository, self.snapshot = root / "repository", root / "cache" / "snapshots" / COMMIT
        self.revisions: list[str | None] = []
        for name, text in files.items():
            (self.repository / name).parent.mkdir(parents=True, exist_ok=True)
            (self.repository / name).write_text(text, encoding="utf-8")

    def list_repo_files(self, repository: str, *, revision: str | None = None) -> list[str]:
        assert repository == "owner/name"
        return [str(path.relative_to(self.repository)) for path in self.repository.rglob("*") if path.is_file()]

    def download(self, repository: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        assert repository == "owner/name", repository
        self.revisions.append(revision)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in self.list_repo_files(repository):
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository / name, self.snapshot / name)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {str(path.relative_to(self.snapshot)) for path in self.snapshot.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def make(*names: str, **files: object) -> Hub:
        texts = dict.fromkeys(names, "x") | {name.replace("__", "."): json.dumps(value) for name, value in files.items()}
        made = Hub(tmp_path, texts)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", made.list_repo_files)
        return made

    monkeypatch.chdir(tmp_path)
    return make


QUANTS = ("model-Q4_K_M.gguf", "model-Q8_0.gguf", "mmproj-model-f16.gguf", "README.md")
SPLIT = tuple(f"big/big-Q6_K-0000{part}-of-00003.gguf" for part in (1, 2, 3))


def test_of_a_model_what_the_index_names(hub: Callable[..., Hub]) -> None:
    names = ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "pytorch_model.bin", "evil.py")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    made = hub(*names, config__json={}, tokenizer__json={}, **{"model__safetensors__index__json": index})
    snapshot = resolve("owner/name", "main")
    assert (snapshot.name, snapshot.path, snapshot.commit) == ("owner/name", made.snapshot, COMMIT)
    small = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert made.fetched == {*small, "model-1.safetensors", "model-2.safetensors"}
    assert made.revisions == ["main", COMMIT]  # the second time by the commit: the branch may have moved


def test_of_a_model_in_one_file(hub: Callable[..., Hub]) -> None:
    made = hub("model.safetensors", "other.safetensors", "model.gguf", config__json={})
    assert resolve("owner/name").path == made.snapshot
    assert made.fetched == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_of_an_adapter(hub: Callable[..., Hub], weights: str) -> None:
    made = hub(weights, "optimizer.bin", "model.safetensors", adapter_config__json={})
    assert resolve("owner/name").path == made.snapshot
    assert made.fetched == {"adapter_config.json", weights}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_of_an_adapter_in_a_folder(hub: Callable[..., Hub], weights: str) -> None:
    made = hub(f"last/{weights}", f"other/{weights}", "model.safetensors", **{"last/adapter_config__json": {}})
    assert resolve("owner/name:last").path == made.snapshot / "last"
    assert made.fetched == {"last/adapter_config.json", f"last/{weights}"}


def test_files_in_the_cache_are_not_asked_for_again(hub: Callable[..., Hub]) -> None:
    made = hub("model.safetensors", config__json={})
    resolve("owner/name")
    made.revisions.clear()
    assert resolve("owner/name").path == made.snapshot
    assert made.revisions == [None]


def test_a_shard_that_is_not_in_the_cache_is_fetched(hub: Callable[..., Hub]) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    made = hub("model-1.safetensors", "model-2.safetensors", config__json={}, model__safetensors__index__json=index)
    resolve("owner/name")
    (made.snapshot / "model-2.safetensors").unlink()
    resolve("owner/name")
    assert "model-2.safetensors" in made.fetched


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name/model-Q4_K_M.gguf", "model-Q4_K_M.gguf"),
        ("owner/name:Q8_0", "model-Q8_0.gguf"),
        ("owner/name:q4_k_m", "model-Q4_K_M.gguf"),
        ("hf.co/owner/name:Q8_0", "model-Q8_0.gguf"),
        ("https://huggingface.co/owner/name/blob/main/model-Q8_0.gguf", "model-Q8_0.gguf"),
        ("https://huggingface.co/owner/name/resolve/main/model-Q8_0.gguf?download=true", "model-Q8_0.gguf"),
    ],
)
def test_a_file_of_a_repository_of_gguf_files(hub: Callable[..., Hub], name: str, expected: str) -> None:
    made = hub(*QUANTS, config__json={})
    snapshot = resolve(name)
    assert (snapshot.path, snapshot.commit, snapshot.name) == (made.snapshot / expected, COMMIT, name)
    assert {file for file in made.fetched if file.endswith(".gguf")} == {expected}


def test_the_only_gguf_file(hub: Callable[..., Hub]) -> None:
    made = hub("model.gguf", "mmproj.gguf", "imatrix.gguf", config__json={})
    assert resolve("owner/name").path == made.snapshot / "model.gguf"


@pytest.mark.parametrize("name", ["owner/name", "owner/name:Q6_K", f"owner/name/{SPLIT[0]}"])
def test_all_parts_of_a_split_file(hub: Callable[..., Hub], name: str) -> None:
    made = hub(*SPLIT, "big/other-Q6_K.txt")
    assert resolve(name).path == made.snapshot / SPLIT[0]
    assert made.fetched == set(SPLIT)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "owner/name",
            r"expected one GGUF file, found 2 among model-Q4_K_M.gguf, model-Q8_0.gguf. Name one: owner/name/model",
        ),
        ("owner/name:Q2", r"expected one GGUF file with 'Q2' in its name, found 0 among model-Q4"),
        ("owner/name:model", r"with 'model' in its name, found 2 among"),
        ("owner/name/none.gguf", r"owner/name: has no file none.gguf"),
    ],
)
def test_which_file_is_not_clear(hub: Callable[..., Hub], name: str, expected: str) -> None:
    hub(*QUANTS)
    with pytest.raises(CheckpointError, match=expected):
        resolve(name)


def test_cached_files_without_a_network(hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    made = hub("model.gguf")
    made.download("owner/name", allow_patterns=["*"])

    def list_repo_files(*_: object, **__: object) -> list[str]:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    assert resolve("owner/name").path == made.snapshot / "model.gguf"


def test_a_folder_of_one_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model-F16.gguf").touch()
    (tmp_path / "mmproj-F16.gguf").touch()
    assert resolve(tmp_path).path == tmp_path / "model-F16.gguf"
    (tmp_path / "model-Q8_0.gguf").touch()
    with pytest.raises(
        CheckpointError, match=r"holds several GGUF files; name one of them: model-F16.gguf, model-Q8_0.gguf"
    ):
        resolve(tmp_path)
    (tmp_path / "config.json").touch()
    assert resolve(tmp_path).path == tmp_path


def test_names_that_no_file_can_have() -> None:
    for name in ("a" * 5000, "a\0b", "", "owner/name/../../x"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            resolve(name)
