"""The adapters of a server: their options, their folders, and the templates that they were trained with."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from qlora_jax.adapters.files import ADAPTER_FILES
from qlora_jax.adapters.held import WEIGHTS
from qlora_jax.adapters.metadata import read_adapter_metadata
from qlora_jax.adapters.peft_config import CONFIG
from qlora_jax.data import Template
from qlora_jax.errors import CheckpointError, OptionError

__all__ = ["AdapterOptions", "adapter_sources", "path_within", "warn_of_templates"]

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """Options of the adapters."""

    adapters: tuple[str, ...] = ()
    """Adapters as NAME=PATH, in PEFT's format: LoRA on linear layers."""
    adapter_folder: Path | None = None
    """Folder whose folders are adapters, or runs with an adapter in them (train_many.py), by their names."""
    slots: int = 16
    """Adapters in the memory of the device at a time; at least as many as rows."""
    rank: int | None = None
    """Largest rank of an adapter; that of the given ones (16 if there are none) if left out."""
    runtime_adapters: bool = False
    """Let keys for all models load adapters within --adapter-folder and unload them, over the API."""
    held: int = 32
    """Adapters whose values stay in main memory; others are read again when they are asked for."""

    def __post_init__(self) -> None:
        for name in ("slots", "held", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name}: expected at least 1, found {value}")


def warn_of_templates(sources: Mapping[str, Path], template: Template, *, has_chat_template: bool) -> None:
    """Warn of each adapter that was trained with prompts of another form than the server writes.

    Args:
        sources: the paths of the adapters by their names.
        template: that of the options.
        has_chat_template: whether the tokenizer has a chat template, which "auto" then means.
    """
    used = template if template != "auto" else "chat" if has_chat_template else "guanaco"
    for name, path in sources.items():
        try:
            metadata = read_adapter_metadata(path)
        except CheckpointError as error:  # its requests get this error; the others are served
            _logger.warning("adapter %s: %s", name, error)
            continue
        if metadata is not None and metadata.template not in (None, used):
            _logger.warning(
                "adapter %s was trained with the template %s, but requests are written with %s, so that its answers may be "
                "worse: serve it with --template %s, or train it on conversations (messages)",
                name,
                metadata.template,
                used,
                metadata.template,
            )


def adapter_sources(options: AdapterOptions) -> dict[str, Path]:
    """Return the paths of the adapters by their names."""
    found: dict[str, Path] = {}
    if options.runtime_adapters and (options.adapter_folder is None or not options.adapter_folder.is_dir()):
        raise OptionError(f"--runtime-adapters: expected a folder as --adapter-folder, found {options.adapter_folder}")
    for one in options.adapters:
        name, equals, path = one.partition("=")
        if not (name and equals and path) or name in found:
            raise OptionError(f"--adapters: expected different names as in NAME=PATH, found {one}")
        found[name] = Path(path)
    if options.adapter_folder is not None:
        root, within = options.adapter_folder, {}
        for pattern in ("*/adapter", "*"):
            within |= {path.relative_to(root).parts[0]: path for path in sorted(root.glob(pattern)) if _is_adapter(path)}
        if not within and not options.runtime_adapters:
            raise OptionError(f"--adapter-folder {root}: expected folders of adapters, found none")
        found = within | found
    return found


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def path_within(root: Path, path: str) -> Path:
    """Return the folder of an adapter, which must be within the root with all its files, wherever links lead.

    Raises:
        OptionError: it is not, or it has no weights in safetensors, whose files cannot contain programs.
    """
    if "\0" in path:  # which no path has, and `realpath` raises a plain ValueError for
        raise OptionError("lora_path: expected a folder within the folder of adapters")
    folder = Path(os.path.realpath(root / path))
    files = [folder / name for name in ADAPTER_FILES]
    if not all(Path(os.path.realpath(file)).is_relative_to(root) for file in (folder, *files)):
        raise OptionError("lora_path: expected a folder within the folder of adapters")
    if not all((folder / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise OptionError("lora_path: expected a folder with adapter_config.json and adapter_model.safetensors")
    return folder
