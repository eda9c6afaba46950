"""The road from names to a model: each name is resolved once, and everything is read from that commit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.adapters.bind import save_adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.adapters.pretrained import open_pretrained
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.export.generation import generation_config
from qlora_jax.peft import LoRA
from qlora_jax.quant import Quantization

COMMITS = ("a" * 40, "b" * 40)
BASE, ADAPTER = "owner/base", "owner/adapter"


@pytest.fixture(scope="module")
def saved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, with metadata."""
    lora = LoRA(rank=2, target_modules=("q_proj",))
    model = load_model(open_checkpoint(tiny_llama), quantization=None, method=lora, dtype="float32", progress=False)
    folder = save_adapter(model, tmp_path_factory.mktemp("saved") / "adapter")
    AdapterMetadata(Quantization(), "chat").save(folder)
    return folder


class Hub:
    """A hub with two commits of each repository: every call of the downloader returns the next one, as after a push."""

    def __init__(self, root: Path, base: Path, adapter: Path) -> None:
        self.calls: list[str] = []
        self._folders: dict[str, list[Path]] = {}
        for name, source in ((BASE, base), (ADAPTER, adapter)):
            snapshots = root / name.replace("/", "--") / "snapshots"
            self._folders[name] = [Path(shutil.copytree(source, snapshots / commit)) for commit in COMMITS]
        for folder in (self._folders[BASE][1], self._folders[ADAPTER][1]):  # the push: other weights, other settings
            for file in folder.glob("*.safetensors"):
                save_file({key: value + 1 for key, value in load_file(file).items()}, file, {"format": "pt"})
        pushed = self._folders[BASE][1] / "config.json"
        pushed.write_text(json.dumps(json.loads(pushed.read_text()) | {"eos_token_id": 77, "rms_norm_eps": 0.5}))
        AdapterMetadata(None, "alpaca").save(self._folders[ADAPTER][1])

    def download(self, repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if revision in COMMITS:  # the second request of a download: the weights of the commit whose small files were fetched
            return str(self._folders[repository][COMMITS.index(revision)])
        self.calls.append(repository)
        return str(self._folders[repository][min(self.calls.count(repository), 2) - 1])


@pytest.fixture
def hub(tiny_llama: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path, tiny_llama, saved)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_each_name_is_resolved_once(hub: Hub) -> None:
    pretrained = open_pretrained(BASE, ADAPTER)
    pretrained.load(progress=False)
    assert pretrained.stop_ids
    assert sorted(hub.calls) == [ADAPTER, BASE]
    assert (pretrained.base.name, pretrained.base.commit) == (BASE, COMMITS[0])
    assert pretrained.adapter is not None
    assert pretrained.adapter.snapshot is not None
    assert (pretrained.adapter.snapshot.name, pretrained.adapter.snapshot.commit) == (ADAPTER, COMMITS[0])
    assert pretrained.checkpoint.snapshot == pretrained.base


def test_a_push_in_between_does_not_mix_commits(hub: Hub, tiny_llama: Path, saved: Path) -> None:
    """Weights, config, stop tokens, adapter and metadata are those of the first commit; a second opening finds the next."""
    before, local = open_pretrained(BASE, ADAPTER), open_pretrained(tiny_llama, saved)
    after = open_pretrained(BASE, ADAPTER)
    assert before.checkpoint.model_config == local.checkpoint.model_config
    assert before.stop_ids == local.stop_ids
    assert before.adapter_metadata == local.adapter_metadata == AdapterMetadata(Quantization(), "chat")
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(before.checkpoint.read(name), local.checkpoint.read(name))
    assert before.adapter is not None
    assert local.adapter is not None
    for tensor, value in local.adapter.tensors.items():
        np.testing.assert_array_equal(before.adapter.tensors[tensor], value)

    assert (after.base.commit, after.adapter.snapshot.commit) == (COMMITS[1], COMMITS[1])  # type: ignore[union-attr]
    assert 77 in after.stop_ids
    assert after.adapter_metadata == AdapterMetadata(None, "alpaca")
    assert not np.array_equal(after.checkpoint.read(name), before.checkpoint.read(name))


def test_an_unknown_stop_id_is_said_once(
    tiny_llama: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Generation and the generation_config.json of a merged folder ask for the ids again."""
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [77, 10**6]}))
    pretrained = open_pretrained(base, saved)
    assert 10**6 not in pretrained.stop_ids >= {77}
    assert generation_config(pretrained.checkpoint, pretrained.tokenizer)
    assert caplog.text.count("names as the end of a text") == 1


def test_a_snapshot_is_not_resolved_again(hub: Hub) -> None:
    snapshot = resolve(BASE, "main")
    assert resolve(snapshot) is snapshot
    assert open_checkpoint(snapshot).snapshot == snapshot
    assert hub.calls == [BASE]


def test_local_paths_have_no_commit(tiny_llama: Path) -> None:
    assert resolve(tiny_llama) == Snapshot(str(tiny_llama), tiny_llama, None)


def test_what_does_not_fit_is_found_before_weights_are_read(
    make_tiny_llama: Callable[..., Path], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_jax.checkpoint.safetensors.read_tensor", lambda *_: pytest.fail("a weight was read"))
    wider = make_tiny_llama(hidden_size=32)
    with pytest.raises(CheckpointError, match=r"(?s)this adapter does not fit this model.*tensors of another shape"):
        open_pretrained(wider, saved)


def test_an_adapter_without_its_record_is_said(
    tiny_llama: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As those of other programs are; one that was saved here has it."""
    open_pretrained(tiny_llama, saved)
    assert not caplog.records
    (folder := Path(shutil.copytree(saved, tmp_path / "copy")) / "qlora_jax.json").unlink()
    open_pretrained(tiny_llama, folder.parent)
    (found,) = [record.getMessage() for record in caplog.records]
    assert found.startswith(f"{folder.parent}: has no qlora_jax.json, so that it is unknown how its base was stored")
    assert "an adapter on nf4 weights" in found


@pytest.mark.parametrize("name", ["runs/nowhere/adapter", "nowhere"])
def test_a_missing_adapter_is_told_from_a_missing_model(
    tiny_llama: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^{name}: .*Accepted as an adapter: a folder with adapter_config.json"):
        open_pretrained(tiny_llama, name)
    with pytest.raises(CheckpointError, match=rf"^{name}: .*Accepted: a folder with config.json"):
        open_pretrained(name)


def with_tokens_beside(saved: Path, folder: Path, rows: int, files: dict[str, object]) -> Path:
    """The adapter of a base that PEFT had resized to so many rows, with some files of its tokenizer."""
    shutil.copytree(saved, folder)
    embedding = {"base_model.model.model.embed_tokens.weight": np.ones((rows, 64), np.float32)}
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | embedding, file)
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": {"<new>": 259, "<tool>": 260}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"259": {"content": "<new>"}, "260": {"content": "<tool>"}}}},
        {"added_tokens.json": {"<tool>": 260, "<new>": 259}, "special_tokens_map.json": {"eos_token": {"content": "<new>"}}},
    ],
)
def test_tokens_beside_an_adapter_without_a_vocabulary_count(
    tiny_llama: Path, saved: Path, tmp_path: Path, files: dict[str, object]
) -> None:
    opened = open_pretrained(tiny_llama, with_tokens_beside(saved, tmp_path / "adapter", 261, files))
    assert opened.tokenizer("a<new><tool>").input_ids[1:] == [259, 260]
    assert opened.tokenizer.eos_token == ("<new>" if "special_tokens_map.json" in files else "<|im_end|>")
    assert opened.spec.config.vocab_size == 261


def test_tokens_beside_an_adapter_that_do_not_fit_are_named(
    tiny_llama: Path, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = Path(shutil.copytree(saved, tmp_path / "adapter"))
    (adapter / "added_tokens.json").write_text(json.dumps({"<new>": 32000}))
    (adapter / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<none>"}))
    opened = open_pretrained(tiny_llama, adapter)
    assert len(opened.tokenizer) == 259
    assert opened.tokenizer.pad_token == "<pad>"
    assert "does not have 1 tokens that are listed beside it: <new>" in caplog.text
    assert "pad_token '<none>' is no token of the vocabulary: none is used" in caplog.text
