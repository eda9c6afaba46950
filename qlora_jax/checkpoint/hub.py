"""Resolves the name of a model or an adapter: a local path, or the id of a repository on the Hugging Face hub.

A name is resolved once, by `resolve`, to a `Snapshot`: a local folder that holds the files of one commit. Of a repository,
the small files are fetched first, and then the weights that the index of the model names. All files are read from that
folder. A push to the repository in the meantime therefore cannot mix the files of two commits.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qlora_jax.checkpoint.index import INDEX, SINGLE, shards_of_index
from qlora_jax.errors import CheckpointError

__all__ = ["Snapshot", "resolve"]

ACCEPTED = (
    "Accepted: a folder with config.json and model.safetensors (or shards and "
    "model.safetensors.index.json), a .gguf file, or a Hugging Face hub id such as owner/name."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w-][\w.-]*(/[\w-][\w.-]*)*)?")
# The config and the tokenizer of a model or an adapter, and the index of a model; these are fetched first.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# The weights of an adapter. Those of a model are what its index names. Other pickled weights are never fetched.
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "prompt_encoder.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The files of a model or an adapter at one commit.

    Attributes:
        name: the path or repository id that the user gave, for messages and for adapter_config.json.
        path: the local folder, or the local .gguf file.
        commit: the hash of the commit of a repository; None for a local path.
    """

    name: str
    path: Path
    commit: str | None = None


def resolve(name: str | Path | Snapshot, revision: str | None = None) -> Snapshot:
    """Return the snapshot that a local path or a repository id names, after downloading a repository.

    Args:
        name: a path, a repository id, or a repository id and a folder in it (owner/name:folder). A snapshot is returned as
            it is.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: the name is neither a path nor a repository id, the download failed, or a revision was given for a
            local path.
    """
    if isinstance(name, Snapshot):
        return name
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{path}: is a local path, which has no revisions; found revision={revision!r}.")
        if path.is_file() and path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: is a file of an unknown kind (suffix {path.suffix!r}). {ACCEPTED}")
        return Snapshot(str(name), path)
    text = str(name)
    if text.lower().endswith(".gguf") or not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such file or folder (looked at {path.absolute()}). {ACCEPTED}")
    repository, _, inner = text.partition(":")
    folder = _download(repository, revision, inner)
    # The hub's cache holds each commit in a folder of its own: snapshots/<commit>.
    commit = folder.name if folder.parent.name == "snapshots" else None
    return Snapshot(text, folder / inner, commit)


def _download(repository: str, revision: str | None, inner: str) -> Path:
    """Return the local folder of a repository after fetching what belongs to the model or adapter in its folder `inner`."""
    from huggingface_hub import snapshot_download

    def fetch(names: Iterable[str], revision: str | None) -> Path:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=[f"{inner}/{name}" if inner else name for name in names]
            )
        )

    try:
        folder = fetch(SMALL_FILES, revision)
        commit = folder.name if folder.parent.name == "snapshots" else revision
        return fetch(_weights_of(folder / inner), commit)
    # The hub and the HTTP client beneath it raise many types, which change with their versions.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        at = f" at revision {revision!r}" if revision is not None else ""
        raise CheckpointError(
            f"{repository}: tried as a local path (there is none at {Path(repository).absolute()}) and as a "
            f"Hugging Face hub id{at} ({type(error).__name__}: {reason[0]}). {ACCEPTED}"
        ) from error


def _weights_of(folder: Path) -> tuple[str, ...]:
    """Return the names of the files of weights to fetch, given the small files: what the index names, if there is one.

    Repositories often hold the same weights in several formats (`consolidated.safetensors`, folders of other exports).
    """
    adapter = ADAPTER_FILES if (folder / "adapter_config.json").is_file() else ()
    if adapter and not (folder / "config.json").is_file():
        return adapter
    try:
        return (*shards_of_index(folder / INDEX), *adapter)
    except (CheckpointError, FileNotFoundError):  # a damaged index is reported where the folder is opened
        return (SINGLE, "model-?????-of-?????.safetensors", *adapter)
