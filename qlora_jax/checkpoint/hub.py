"""What a path or a hub id names: a local file or folder, after downloading it where it is a hub id."""

import re
from pathlib import Path

from qlora_jax.errors import CheckpointError

__all__ = ["resolve"]

ACCEPTED = (
    "Accepted: a folder with config.json and model.safetensors (or shards and "
    "model.safetensors.index.json), a .gguf file, or a Hugging Face hub id such as owner/name."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Everything that a model, its configuration and its tokenizer consist of; pickled weights are never fetched.
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The local folder or .gguf file that `source` names, after downloading it where that is a hub id.

    Weights and tokenizer are both read from what this returns, so that they come from the same revision.
    """
    path = Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"{path}: is a local path, which has no revisions; found revision={revision!r}.")
        if path.is_file() and path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path}: is a file of an unknown kind (suffix {path.suffix!r}). {ACCEPTED}")
        return path
    text = str(source)
    if text.lower().endswith(".gguf") or not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{text}: no such file or folder (looked at {path.absolute()}). {ACCEPTED}")
    return _from_hub(text, revision)


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    # Any of the hub's own errors, or of the HTTP client beneath it, which changes with its version.
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        at = f" at revision {revision!r}" if revision is not None else ""
        raise CheckpointError(
            f"{repository}: tried as a local path (there is none at {Path(repository).absolute()}) and as a "
            f"Hugging Face hub id{at} ({type(error).__name__}: {reason[0]}). {ACCEPTED}"
        ) from error
