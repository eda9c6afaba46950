"""Resolves the name of a model or an adapter: a local path, or the id of a repository on the Hugging Face hub.

A name is resolved once, by `resolve`, to a `Snapshot`: a local folder that holds the files of one commit. Weights, config,
tokenizer and all other files are read from that folder. A push to the repository in the meantime therefore cannot mix the
files of two commits.

Of a repository the small files are fetched first. They tell which weights are fetched: the shards that the index names, else
model.safetensors or the weights of an adapter, else a GGUF file. A repository of GGUF files usually holds the same model in
many storage types; the name then says which file:

    owner/name                        its only GGUF file
    owner/name/model-Q4_K_M.gguf      that file
    owner/name:Q4_K_M                 the file with this storage type in its name
    owner/name:folder                 what is in that folder of the repository, a model or an adapter

A split file counts as one, and all its parts are fetched.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_jax.checkpoint.files import check_folder, check_regular
from qlora_jax.checkpoint.index import INDEX, SINGLE, shards_of_index
from qlora_jax.errors import CheckpointError, list_names

__all__ = ["ACCEPTED_ADAPTER", "Snapshot", "resolve"]

ACCEPTED = (
    "Accepted: a folder with config.json and model.safetensors (or shards and "
    "model.safetensors.index.json), a .gguf file, or a Hugging Face hub id such as owner/name "
    "(of GGUF files owner/name/FILE.gguf)."
)
ACCEPTED_ADAPTER = (
    "Accepted as an adapter: a folder with adapter_config.json and adapter_model.safetensors, such as the folder adapter of "
    "a run, or a Hugging Face hub id such as owner/name (of a folder in it owner/name:FOLDER)."
)
LONGEST = 500  # characters of a path or of the name of a file on the hub, for messages too
PART = r"[A-Za-z0-9][\w.-]*"
HUB_ID = re.compile(rf"(?P<repository>{PART}(/{PART})?)(:(?P<inner>[\w-][\w.-]*(/[\w-][\w.-]*)*))?")
HUB_FILE = re.compile(rf"(?P<repository>{PART}/{PART})/(?P<file>.+\.gguf)", re.IGNORECASE)
HUB_ADDRESS = re.compile(r"(https?://)?(huggingface\.co|hf\.co)/")
# The small files of a model, its config and its tokenizer, or of an adapter; pickled weights of models are never fetched.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
ADAPTER, ENCODER, OLD_ADAPTER = "adapter_model.safetensors", "prompt_encoder.safetensors", "adapter_model.bin"
# Files beside a model that are no language models: projections of pictures, calibration data, drafts.
NO_MODEL = re.compile(r"(^|[-_./])(mmproj|imatrix|ggml-vocab)", re.IGNORECASE)
FIRST_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)


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


def resolve(name: str | Path | Snapshot, revision: str | None = None, *, accepted: str = ACCEPTED) -> Snapshot:
    """Return the snapshot that a local path or a repository id names, after downloading a repository.

    Args:
        name: a path, a repository id, or a repository id and a folder in it (owner/name:folder). A snapshot is returned as
            it is.
        revision: branch, tag or commit of a repository.
        accepted: what the name may be, for messages.

    Raises:
        CheckpointError: the name is neither a path nor a repository id, the download failed, a revision was given for a
            local path, or a file is a pipe or a device.
    """
    if isinstance(name, Snapshot):
        return name
    if not str(name).strip():
        raise CheckpointError(f"expected a name, found {str(name)!r}: no such file or folder. {accepted}")
    path = Path(os.path.expanduser(name))
    check_regular(path)
    if _exists(path):
        if revision is not None:
            raise CheckpointError(f"{path}: is a local path, which has no revisions; found revision={revision!r}.")
        if path.is_file():
            if path.suffix.lower() != ".gguf":
                raise CheckpointError(f"{path}: is a file of an unknown kind (suffix {path.suffix!r}). {accepted}")
            return Snapshot(str(name), path)
        check_folder(path)
        return Snapshot(str(name), _gguf_in(path) or path)
    text = HUB_ADDRESS.sub("", str(name), count=1)
    if text != str(name):  # an address as a browser shows it
        text = re.sub(r"/(resolve|blob|tree)/[^/]+/?", "/", text).split("?")[0].rstrip("/")
    by_file, by_id = HUB_FILE.fullmatch(text), HUB_ID.fullmatch(text)
    if len(text) > LONGEST or (by_file is None and (by_id is None or text.lower().endswith(".gguf"))):
        raise CheckpointError(
            f"{text[:LONGEST]}: no such file or folder (looked at {str(path.absolute())[:LONGEST]}). {accepted}"
        )
    if by_file is not None:
        folder = _download(by_file["repository"], revision, _parts_pattern(by_file["file"]), accepted)
        found = folder / by_file["file"]
        if not found.is_file():
            raise CheckpointError(f"{by_file['repository']}: has no file {by_file['file']}. {accepted}")
    else:
        assert by_id is not None
        folder, found = _fetched(by_id["repository"], revision, by_id["inner"], accepted)
    check_folder(found if found.is_dir() else found.parent)
    # The hub's cache holds each commit in a folder of its own: snapshots/<commit>.
    return Snapshot(str(name), found, folder.name if folder.parent.name == "snapshots" else None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is too long for a file, or has a null character
        return False


def _fetched(repository: str, revision: str | None, inner: str | None, accepted: str) -> tuple[Path, Path]:
    """Return (the folder of a repository's files, the folder or the GGUF file to open in it) after fetching the weights."""
    small = [*SMALL_FILES, *([] if inner is None else [f"{inner}/{name}" for name in SMALL_FILES])]
    folder = _download(repository, revision, small, accepted)
    if folder.parent.name == "snapshots":  # from here on the commit: the branch may move
        revision = folder.name
    prefix, storage = "", inner
    if inner is not None and (folder / inner).is_dir():
        prefix, storage = f"{inner}/", None
    own = folder / prefix
    if storage is None:
        needed, more = _weights(own)
        if not all((own / name).is_file() for name in needed):  # they may be in the cache
            folder = _download(repository, revision, [prefix + name for name in (*needed, *more)], accepted)
        if needed != (SINGLE,) or any(any(own.glob(name)) for name in (*needed, *more)):
            return folder, own  # opening it says what is missing
    names = [name for name in _listed(repository, revision, folder) if name.startswith(prefix)]
    chosen = [name for name in names if storage is None or storage.lower() in Path(name).name.lower()]
    if not chosen and storage is None:
        return folder, own
    if len(chosen) != 1:
        wanted = "one GGUF file" if storage is None else f"one GGUF file with {storage!r} in its name"
        raise CheckpointError(
            f"{repository}: expected {wanted}, found {len(chosen)} among {list_names(names) or 'no GGUF files'}. Name "
            f"one: {repository}/{(chosen or names or ['FILE.gguf'])[0]}"
        )
    if not (folder / chosen[0]).is_file() or FIRST_PART.search(chosen[0]):
        folder = _download(repository, revision, _parts_pattern(chosen[0]), accepted)
    return folder, folder / chosen[0]


def _weights(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the weights to fetch beside the small files in a folder: (files, more files and patterns that may be there)."""
    adapter = (ADAPTER, OLD_ADAPTER, ENCODER) if (folder / "adapter_config.json").is_file() else ()
    if adapter and not (folder / "config.json").is_file():
        return adapter[:1], adapter[1:]
    if shards := _shards(folder / INDEX):
        return shards, adapter
    return (SINGLE,), ("model-?????-of-?????.safetensors", *adapter)


def _shards(index: Path) -> tuple[str, ...]:
    """Return the files that an index names; none where it is missing or damaged, which opening the folder reports."""
    try:
        return tuple(sorted(shards_of_index(index)))
    except (CheckpointError, OSError):
        return ()


def _listed(repository: str, revision: str | None, folder: Path) -> list[str]:
    """Return the GGUF files of a repository that hold a model, the first part of each split one."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repository, revision=revision)
    except Exception:  # without a network, the files that are cached
        names = [str(path.relative_to(folder)) for path in folder.rglob("*.gguf")]
    return _models(names)


def _models(names: Sequence[str]) -> list[str]:
    """Return the GGUF files among these that hold a model, the first part of each split one."""
    models = sorted(name for name in names if name.lower().endswith(".gguf") and not NO_MODEL.search(name))
    return [name for name in models if FIRST_PART.search(name) is None or "-00001-of-" in name]


def _gguf_in(folder: Path) -> Path | None:
    """Return the GGUF file of a folder that holds nothing else to load; None for other folders.

    Raises:
        CheckpointError: there are several.
    """
    if any(any(folder.glob(pattern)) for pattern in ("config.json", "adapter_config.json", "*.safetensors", "*.bin")):
        return None
    names = _models([path.name for path in folder.iterdir()])
    if len(names) > 1:
        raise CheckpointError(f"{folder}: holds several GGUF files; name one of them: {list_names(names)}.")
    return folder / names[0] if names else None


def _parts_pattern(name: str) -> list[str]:
    """Return the pattern of a file's name, or of the names of all parts of a split file."""
    if FIRST_PART.search(name) is None:
        return [glob.escape(name)]
    return [glob.escape(FIRST_PART.sub("", name)) + "-*" + name[-len("-of-00000.gguf") :]]


def _download(repository: str, revision: str | None, patterns: Sequence[str], accepted: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    # The hub and the HTTP client beneath it raise many types, which change with their versions.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        at = f" at revision {revision!r}" if revision is not None else ""
        raise CheckpointError(
            f"{repository}: tried as a local path (there is none at {Path(repository).absolute()}) and as a "
            f"Hugging Face hub id{at} ({type(error).__name__}: {reason[0]}). {accepted}"
        ) from error
