"""The hub, played by a server at the boundary of huggingface_hub's functions: what is checked first, and what is sent."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError

from qlora_jax.adapters.files import read_adapter
from qlora_jax.finetune import DataOptions, LoRAOptions, ModelOptions, Options, RunOptions, WatchOptions, finetune
from qlora_jax.finetune.reporting import hub
from qlora_jax.finetune.reporting.hub import check_repository


class Hub:
    """Repositories by name, each with whether it is private and with its files."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.user: dict[str, Any] = {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": "write"}}}
        self.error: Exception | None = None

    def whoami(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.user

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.repositories.setdefault(repo_id, {"private": bool(private), "files": {}})

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.repositories[repo_id]["private"])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: str) -> Any:
        if self.error is not None:
            raise self.error
        files = {path.name: path.read_bytes() for path in folder_path.iterdir() if path.is_file()}
        self.repositories[repo_id]["files"] |= files
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Hub:
    server = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: server)
    return server


def test_the_repository_is_checked(server: Hub) -> None:
    check_repository("me/new", private=True)
    assert server.repositories["me/new"]["private"]
    check_repository("me/new", private=True)
    check_repository("us/open", private=False)
    assert not server.repositories["us/open"]["private"]
    with pytest.raises(ValueError, match="us/open: expected a private repository, found a public one that exists"):
        check_repository("us/open", private=True)
    with pytest.raises(ValueError, match="expected a repository of me or us, found one of them"):
        check_repository("them/theirs", private=False)
    for name in ("mine", "me/a b", "me/a/b"):
        with pytest.raises(ValueError, match=f"push_to_hub {name}: expected USER/NAME, found"):
            check_repository(name, private=False)
    server.user["auth"]["accessToken"]["role"] = "read"
    with pytest.raises(ValueError, match="expected a token that may write, found one of me that may only read"):
        check_repository("me/new", private=False)
    assert server.repositories.keys() == {"me/new", "us/open"}


def test_nobody_is_logged_in_or_there(server: Hub) -> None:
    server.error = LocalTokenNotFoundError("no token")
    with pytest.raises(ValueError, match="push_to_hub me/new: expected to be logged in, found no token; run `hf auth"):
        check_repository("me/new", private=False)
    server.error = hub.HTTPError("no route")
    with pytest.raises(ConnectionError, match="push_to_hub me/new: cannot be used: no route"):
        check_repository("me/new", private=False)


def test_the_job_uploads_its_adapter(
    server: Hub, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"question": "{n}?", "answer": "blue"}}\n' for n in range(8)), encoding="utf-8")
    options = Options(
        ModelOptions(model=str(tiny_llama)),
        LoRAOptions(rank=4),
        DataOptions(data=str(data), max_length=64, held_out=0.0),
        run=RunOptions(output=tmp_path / "run", max_steps=1, samples=0),
        watch=WatchOptions(push_to_hub="me/mine"),
    )
    with pytest.raises(ValueError, match="push_to_hub them/theirs: expected a repository of me or us"):
        finetune(dataclasses.replace(options, watch=WatchOptions(push_to_hub="them/theirs")), progress=False)
    assert not options.run.output.exists(), "found before any work"
    folder = finetune(options, progress=False)
    files = server.repositories["me/mine"]["files"]
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_jax.json"}
    (tmp_path / "got").mkdir()
    for name, content in files.items():
        (tmp_path / "got" / name).write_bytes(content)
    assert read_adapter(tmp_path / "got").method.rank == 4
    assert ModelCard.load(tmp_path / "got" / "README.md").data.library_name == "peft"
    assert "Uploaded the adapter: https://huggingface.co/me/mine" in capsys.readouterr().err
    server.error = hub.HTTPError("cut off")
    with pytest.raises(
        ConnectionError, match=r"the adapter was saved, and not uploaded: cut off\. Later: hf upload me/mine"
    ):
        hub.upload(folder, "me/mine")
