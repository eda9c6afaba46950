"""The config.json of the model that a plan names: a known size, a folder, a GGUF file or a hub id. No weights are read."""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.errors import CheckpointError
from qlora_jax.plan import HUB_IDS, SIZES

__all__ = ["read_config"]


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Return the config.json of a model by the name of its size, by a path or by a hub id. No weights are read.

    Raises:
        CheckpointError: there is no such config.json.
    """
    if model in SIZES:
        return SIZES[model]
    path = Path(os.path.expanduser(model))
    if not path.exists() and model in HUB_IDS:
        return SIZES[HUB_IDS[model]]
    if path.suffix.lower() == ".gguf":
        return open_checkpoint(model).config
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        if "/" not in model:  # most likely a misspelt size: the hub is not asked for it
            near = difflib.get_close_matches(model, SIZES, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ";"
            raise CheckpointError(f"--model {model}: no such path, and no size by that name{hint} known: {', '.join(SIZES)}")
        path = _config_from_hub(model, revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _config_from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging

    print(f"Asking the hub for config.json of {model}.", file=sys.stderr, flush=True)
    logging.set_verbosity_error()  # it would log each attempt; the error below is enough
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    # Errors of the hub or of its HTTP client, whose types change with its version.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        near = difflib.get_close_matches(model, HUB_IDS, n=2, cutoff=0.6)
        hint = f"; without the hub {' and '.join(near)} are known" if near else ""
        raise CheckpointError(
            f"--model {model}: no such path, and no hub id that can be read "
            f"({type(error).__name__}: {reason}){hint}; sizes by name: {', '.join(SIZES)}"
        ) from error
