"""Opens a checkpoint of any supported format: a folder of safetensors, a GGUF file, or a repository of the hub."""

import dataclasses
from pathlib import Path

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.hub import Snapshot, resolve
from qlora_jax.models import with_model_type

__all__ = ["open_checkpoint"]


def open_checkpoint(name: str | Path | Snapshot, revision: str | None = None) -> Checkpoint:
    """Return an opened checkpoint. Only headers are read, and a head that may be the token embedding.

    Of a model that also reads pictures or sound, the part that models text is opened (text_part.py). A head that differs
    from the token embedding is used, although config.json says that the two are one (tied.py).

    Args:
        name: a folder of safetensors, a GGUF file, a repository id, or a snapshot that was resolved before.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: the files are missing, damaged, or of an unsupported kind; all problems in one message.
        UnsupportedError: config.json does not name an architecture that is supported.
    """
    snapshot = resolve(name, revision)
    # Only the format that is met is imported: reading a folder must not need the gguf package.
    if snapshot.path.is_file():
        from qlora_jax.checkpoint.gguf.open import open_gguf

        return dataclasses.replace(open_gguf(snapshot.path, name=snapshot.name), snapshot=snapshot)
    from qlora_jax.checkpoint.bitsandbytes import is_quantized, open_quantized
    from qlora_jax.checkpoint.safetensors import open_safetensors_folder
    from qlora_jax.checkpoint.text_part import needed_tensors, text_part
    from qlora_jax.checkpoint.tied import with_own_head

    checkpoint = open_safetensors_folder(snapshot.path, name=snapshot.name, needs=needed_tensors)
    checkpoint = dataclasses.replace(checkpoint, config=with_model_type(checkpoint.config, checkpoint.name))
    checkpoint = (
        open_quantized(checkpoint) if is_quantized(checkpoint.config, f"{checkpoint.name}: config.json") else checkpoint
    )
    return dataclasses.replace(with_own_head(text_part(checkpoint)), snapshot=snapshot)
