"""The index of a model in several files: which of a folder's or repository's files belong to the model.

    model.safetensors.index.json    {"weight_map": {name of a tensor: name of a file}}

A model in one file, `model.safetensors`, has no index.
"""

from pathlib import Path

from qlora_jax.checkpoint.files import read_object
from qlora_jax.errors import CheckpointError

__all__ = ["INDEX", "SINGLE", "shards_of_index"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST = 200  # characters of the name of a file, which have up to 255 bytes


def shards_of_index(path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors that an index places in each file.

    Raises:
        CheckpointError: the index is malformed, or names files outside its folder.
    """
    weight_map = (read_object(path) or {}).get("weight_map")
    names_of: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items() if isinstance(weight_map, dict) else ():
        # A plain file name: an index must not reach outside its folder.
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\\0")
        plain = plain and len(shard) <= LONGEST
        if not plain:
            names_of = {}
            break
        names_of.setdefault(shard, set()).add(tensor)
    if not names_of:
        raise CheckpointError(
            f"{path.name}: is malformed: expected an object 'weight_map' from tensor names to names of "
            ".safetensors files in this folder."
        )
    return names_of
