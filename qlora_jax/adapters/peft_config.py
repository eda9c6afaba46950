"""PEFT's adapter_config.json: the method that it describes, and the fields that all methods have."""

import dataclasses
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax.adapters.held import Held, read_held
from qlora_jax.adapters.names import PREFIX, split_name
from qlora_jax.adapters.virtual_tokens import with_encoder
from qlora_jax.checkpoint.files import read_object
from qlora_jax.checkpoint.hub import ACCEPTED_ADAPTER, Snapshot, resolve
from qlora_jax.errors import CheckpointError, list_names, shortened
from qlora_jax.peft import FieldErrors, LoRA, Method, module_matches, peft_methods

__all__ = [
    "CONFIG",
    "AdapterConfig",
    "TaskType",
    "adapter_config",
    "config_of",
    "read_adapter_config",
    "read_adapter_method",
    "resolve_adapter",
]

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]  # by which PEFT chooses its wrapper around the base

CONFIG = "adapter_config.json"
_logger = logging.getLogger(__name__)
_SUFFIX = re.compile(r"\.(?:lora_|ia3_l)")  # where the name of a tensor's module ends


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json says of an adapter.

    Attributes:
        method: the method of fine-tuning, e.g. a `LoRA`; a model that is made with it has a place for the adapter.
        base_model_name_or_path: the base model, or None.
        revision: the revision of the base model, or None.
        task_type: PEFT's name of the task, e.g. "CAUSAL_LM", or None.
    """

    method: Method
    base_model_name_or_path: str | None = None
    revision: str | None = None
    task_type: str | None = None


def read_adapter_config(name: str | Path | Snapshot) -> AdapterConfig:
    """Return the parsed adapter_config.json of an adapter.

    Args:
        name: a folder, the repository id of an adapter, or a snapshot that was resolved before.

    Raises:
        CheckpointError: there is no adapter, or its method or a field is not supported; the message names every such field.
    """
    snapshot = resolve_adapter(name)
    return adapter_config(snapshot, read_held(snapshot))


def adapter_config(snapshot: Snapshot, held: Held | None) -> AdapterConfig:
    """Return the parsed adapter_config.json of an adapter whose weights are opened (None: it has none).

    The names in a configuration may be those of a larger model, match nothing, or be left out. The tensors then say which
    modules are adapted.

    Raises:
        CheckpointError: see `read_adapter_config`.
    """
    fields = _read_json(snapshot)
    names = {} if held is None else {name: tensor.stored for name, tensor in held.tensors.items()}
    if fields.get("target_modules") is None and fields.get("peft_type") == LoRA.peft_type:
        modules = {tensor.removeprefix(PREFIX).rpartition(".lora_")[0] for tensor in names if ".lora_" in tensor}
        fields = fields | ({"target_modules": sorted(modules)} if modules else {})
    method = with_encoder(_method_of(snapshot.name, fields), snapshot.path)
    modules = _adapted_modules(names, method)
    if any(theirs != ours for theirs, ours in modules.items()):
        method = method.renamed(modules)
    method = _with_targets_of_tensors(snapshot.name, method, modules.values())
    base, revision, task = (fields.get(name) for name in ("base_model_name_or_path", "revision", "task_type"))
    return AdapterConfig(
        method,
        base_model_name_or_path=base if isinstance(base, str) and base else None,
        revision=revision if isinstance(revision, str) and revision else None,
        task_type=task if isinstance(task, str) and task else None,
    )


def _adapted_modules(names: Mapping[str, str], method: Method) -> dict[str, str]:
    """Return our name of each adapted module by the name that it has in the files."""
    found: dict[str, str] = {}
    for ours, stored in names.items():
        module, suffix = split_name(ours, method)
        if suffix is not None and module:
            found[_SUFFIX.split(stored.removeprefix(PREFIX), maxsplit=1)[0]] = module
    return found


def _with_targets_of_tensors(name: str, method: Method, modules: Collection[str]) -> Method:
    """Return a method that selects the modules of its tensors where its configuration selects none of them."""
    if not isinstance(method, LoRA) or not modules or any(module_matches(method, module) for module in modules):
        return method
    _logger.warning(
        "%s: target_modules %s of %s selects none of the modules with tensors: taken for an adapter of these %d, such as %s",
        name,
        shortened(method.target_modules),
        CONFIG,
        len(modules),
        next(iter(modules)),
    )
    return method.with_targets(tuple(modules))


def read_adapter_method(name: str | Path | Snapshot) -> Method:
    """Return the method of an adapter, with which a model gets a place for it: `load_model(…, method=…)`.

    Raises:
        CheckpointError: see `read_adapter_config`.
    """
    return read_adapter_config(name).method


def resolve_adapter(name: str | Path | Snapshot) -> Snapshot:
    """Return the snapshot of an adapter.

    Raises:
        CheckpointError: the name cannot be resolved, or is that of a file.
    """
    snapshot = resolve(name, accepted=ACCEPTED_ADAPTER)
    if snapshot.path.is_file():
        raise CheckpointError(f"{snapshot.name}: expected a folder with {CONFIG} and the adapter's weights, found a file.")
    return snapshot


def config_of(modules: Sequence[str], method: Method, base: str | None, task_type: TaskType) -> dict[str, Any]:
    """Return what PEFT writes for a method whose adapters are in these modules."""
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": method.peft_type,
        "revision": None,
        "task_type": task_type,
    }
    return dict(sorted((fields | method.to_peft(modules)).items()))


def _read_json(snapshot: Snapshot) -> dict[str, Any]:
    try:
        config = read_object(snapshot.path / CONFIG)
    except CheckpointError as error:
        raise CheckpointError(f"{snapshot.name}: {error}") from error
    if config is None:
        inner = sorted(path.parent.name for path in snapshot.path.glob(f"*/{CONFIG}"))
        hint = f" Its folders {list_names(inner)} hold adapters: give one of them." if inner else ""
        raise CheckpointError(f"{snapshot.name}: is no adapter: it has no {CONFIG}.{hint}")
    return config


def _method_of(name: str, config: Mapping[str, Any]) -> Method:
    """Return the method that the fields describe; raise CheckpointError for those that are not supported."""
    kind = config.get("peft_type")
    methods = peft_methods()
    found = methods.get(str(kind))
    if found is None:  # its other fields mean nothing here
        raise CheckpointError(f"{name}: {CONFIG}: peft_type: expected one of {', '.join(methods)}, found {shortened(kind)}.")
    try:
        return found.from_peft(config)
    except FieldErrors as error:
        problems = error.problems
    except ValueError as error:
        problems = [str(error)]
    raise CheckpointError.of(f"{name}: {CONFIG}", problems)
