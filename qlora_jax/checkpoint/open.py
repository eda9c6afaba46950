"""Opening a checkpoint of any supported format: a folder of safetensors, a GGUF file, or a hub id."""

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.hub import resolve

__all__ = ["open_checkpoint"]


def open_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """Open a folder of safetensors, a GGUF file or a hub id (at `revision`: a branch, tag or commit)."""
    path = resolve(source, revision)
    # Only the format that is met is imported: reading a folder must not need the gguf package.
    if path.is_file():
        from qlora_jax.checkpoint.gguf.open import open_gguf

        return open_gguf(path, name=str(source))
    from qlora_jax.checkpoint.bitsandbytes import is_quantized, open_quantized
    from qlora_jax.checkpoint.safetensors import open_safetensors_folder

    checkpoint = open_safetensors_folder(path, name=str(source))
    return open_quantized(checkpoint) if is_quantized(checkpoint.config) else checkpoint
