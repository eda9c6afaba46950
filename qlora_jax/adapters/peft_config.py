"""PEFT's adapter_config.json: which method it describes, and the fields that all methods have."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from qlora_jax.errors import CheckpointError
from qlora_jax.peft import FieldErrors, LoRA, Method, peft_methods

__all__ = ["CONFIG", "TaskType", "config_of", "method_of", "read_config"]

TaskType = Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"]  # by which PEFT chooses its wrapper around the base

CONFIG = "adapter_config.json"


def config_of(modules: Sequence[str], method: Method, base: str | None, task_type: TaskType) -> dict[str, Any]:
    """What PEFT writes for a method whose adapters are in these modules."""
    fields = {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": method.peft_type,
        "revision": None,
        "task_type": task_type,
    }
    return dict(sorted((fields | method.to_peft(modules)).items()))


def read_config(path: Path, source: str) -> dict[str, Any]:
    """The file in the folder `path`, which `source` names in messages."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{source}: is no adapter: it has no {CONFIG}.") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{source}: {CONFIG} is malformed: expected a JSON object, found: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: {CONFIG} is malformed: expected a JSON object, found {type(config).__name__}.")
    return config


def method_of(source: str, config: Mapping[str, Any]) -> Method:
    """The method that the fields describe; raises CheckpointError for those that are not supported."""
    kind = config.get("peft_type")
    methods = peft_methods()
    found = methods.get(str(kind))
    problems = [] if found else [f"peft_type: expected one of {', '.join(methods)}, found {kind!r}"]
    try:
        # The fields of a file of no known kind are read as LoRA's, so that all that is wrong is told at once.
        method = (found or LoRA).from_peft(config)
        if found is not None:
            return method
    except FieldErrors as error:
        problems += error.problems
    except ValueError as error:
        problems.append(str(error))
    raise CheckpointError.of(f"{source}: {CONFIG}", problems)
