"""The files of an adapter, in PEFT's format.

    adapter_config.json          the method and its fields (peft_config.py)
    adapter_model.safetensors    float32 tensors (older: adapter_model.bin); for LoRA one pair for each linear module, under
                                 its Hugging Face name:
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [r, in]
        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [out, r]
                                 parameters that are trained as a whole, and trained rows of an embedding:
        base_model.model.model.norm.weight
        base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta    [tokens, features]
                                 (PEFT's name; the file holds the rows themselves, not their change)
                                 where PEFT had resized the base, its token embedding and head (resized_base.py):
        base_model.model.model.embed_tokens.weight
                                 for virtual tokens one tensor alone (virtual_tokens.py):
        prompt_embeddings    [rows, features]
    prompt_encoder.safetensors   the encoder that made the virtual tokens, where there is one

Writing. All files are written in a temporary folder, read back, compared bit for bit with the values in memory, and flushed;
only then does the folder get its name (checkpoint/whole_folder.py). A failure therefore never leaves an adapter that is
empty or half written: afterwards there is either the whole new adapter, or an error and what was there before.

Reading. Names as other programs write them are understood (held.py). All problems of the files that do not depend on the
model are reported in one error.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qlora_jax.adapters.held import PICKLED, WEIGHTS, read_held
from qlora_jax.adapters.names import PREFIX, ROWS, adapted_modules, in_text_part, peft_name, split_name, tensor_name
from qlora_jax.adapters.peft_config import CONFIG, TaskType, adapter_config, config_of, resolve_adapter
from qlora_jax.adapters.virtual_tokens import ENCODER, read_encoder
from qlora_jax.checkpoint.hub import Snapshot
from qlora_jax.checkpoint.tokenizer_files import has_tokenizer
from qlora_jax.checkpoint.whole_folder import whole_folder, writing_errors
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.peft import Method
from qlora_jax.peft.prompt import EMBEDDINGS

__all__ = ["Adapter", "read_adapter", "write_adapter"]

# What belongs to these weights alone. Other files of a folder into which an adapter is written stay there.
ADAPTER_FILES = frozenset({CONFIG, WEIGHTS, ENCODER, "qlora_jax.json"})
EMBEDDING_NAMES = ("embed_tokens", "embed_in", "shared", "lm_head", "embed_out")
# The base's own embeddings (resized_base.py): one that the adapter does not train, trains a copy of, or trains rows of.
EMBEDDING_ENDINGS = (".weight", ".original_module.weight", ".token_adapter.base_layer.weight")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as its files hold it.

    Attributes:
        name: the path or repository id, for messages.
        method: the method of fine-tuning that adapter_config.json describes.
        base: the base model that adapter_config.json names, or None. Only shapes decide whether the adapter fits a model.
        tensors: by the files' names; `[r, in]` for lora_A, `[out, r]` for lora_B, else as in the base's checkpoint.
        resized_embeddings: the token embedding and head of a base that PEFT had resized, by the files' names.
        encoder: the parameters of an encoder of virtual tokens, where there is one.
        snapshot: the files that the adapter was read from; None for an adapter that was made in memory.
    """

    name: str
    method: Method
    base: str | None
    tensors: Mapping[str, np.ndarray]
    resized_embeddings: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    encoder: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    snapshot: Snapshot | None = None

    @property
    def modules(self) -> list[str]:
        """The full names of the linear modules that have an adapter."""
        return adapted_modules(self.tensors, self.method)

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter was saved with a tokenizer of its own."""
        return self.snapshot is not None and has_tokenizer(self.snapshot.path)

    def of_module(self, module: str) -> dict[str, np.ndarray]:
        """Return the tensors of a linear module by their suffixes, e.g. "lora_A.weight"; empty where it has no adapter."""
        names = {suffix: tensor_name(module, suffix) for suffix in self.method.suffixes}
        return {suffix: self.tensors[name] for suffix, name in names.items() if name in self.tensors}


def write_adapter(
    tensors: Mapping[str, np.ndarray],
    folder: str | Path,
    *,
    method: Method,
    base_model_name_or_path: str | None = None,
    task_type: TaskType = "CAUSAL_LM",
    resized_embeddings: Mapping[str, np.ndarray] | None = None,
    text_prefix: str | None = None,
    beside: Sequence[Callable[[Path], None]] = (),
) -> Path:
    """Write an adapter and verify its files, as the module describes; return the folder. An adapter in it is replaced.

    Args:
        tensors: what `adapter_tensors` returned.
        method: the method of the adapter. "all-linear" is written as the names that it stands for, as PEFT does.
        base_model_name_or_path: path or repository id of the base, by which PEFT finds it.
        task_type: the task by which PEFT chooses its wrapper around the base.
        resized_embeddings: see `Adapter`.
        text_prefix: what the base puts before the names of its text part (`Checkpoint.text_prefix`); None: nothing.
        beside: functions that write further files of the adapter into the folder that they are given: its metadata, its
            tokenizer, its card.

    Raises:
        CheckpointError: nothing to save, values that are not finite or of another rank, or files that could not be written
            (a full disk, say) or do not read back as they were written. An adapter that was in `folder` before is still
            there.
    """
    folder = Path(folder)
    problems = _problems_of_tensors(tensors, method)
    if problems:
        raise CheckpointError.of(f"{folder}: adapter not saved", problems)
    modules = adapted_modules(tensors, method)
    if text_prefix is not None:
        names = {module: in_text_part(module, text_prefix) for module in modules}
        method = method.renamed(names).with_targets([*names.values()])
    config = config_of(modules, method, base_model_name_or_path, task_type)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {**{peft_name(name, modules): tensor for name, tensor in tensors.items()}, **(resized_embeddings or {})}
    if text_prefix is not None:
        tensors = {PREFIX + in_text_part(name.removeprefix(PREFIX), text_prefix): tensor for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with writing_errors(folder, size), whole_folder(folder, marker=CONFIG, own=ADAPTER_FILES) as new:
        (new / WEIGHTS).write_bytes(safetensors.numpy.save(dict(tensors), {"format": "pt"}))
        (new / CONFIG).write_text(text, encoding="utf-8")
        _verify(folder, new / WEIGHTS, tensors, new / CONFIG, config)
        for write in beside:
            write(new)
    return folder


def read_adapter(name: str | Path | Snapshot) -> Adapter:
    """Return the tensors and the configuration of an adapter.

    Args:
        name: a folder, the repository id of an adapter, or a snapshot that was resolved before.

    Raises:
        CheckpointError: files that are missing or damaged, a method that is not supported, or tensors whose names, shapes or
            values do not fit the method; all in one message.
    """
    snapshot = resolve_adapter(name)
    held = read_held(snapshot)
    config, path = adapter_config(snapshot, held), snapshot.path
    method = config.method
    if held is None:
        raise CheckpointError(f"{snapshot.name}: expected {WEIGHTS} or {PICKLED} beside {CONFIG}, found none.")
    held.warn(snapshot.name)
    found = {name: tensor.read() for name, tensor in held.tensors.items()}
    resized = {name: tensor for name, tensor in found.items() if _is_embedding_of_base(name, method)}
    tensors = {name: tensor for name, tensor in found.items() if name not in resized and not _is_copy(name, found)}
    problems = _problems_of_tensors(tensors, method)
    if problems:
        raise CheckpointError.of(snapshot.name, problems)
    encoder = read_encoder(method, path, tensors.get(EMBEDDINGS), snapshot.name)
    return Adapter(snapshot.name, method, config.base_model_name_or_path, tensors, resized, encoder, snapshot)


def _is_embedding_of_base(tensor: str, method: Method) -> bool:
    """Return whether a tensor is the token embedding or head of a base that PEFT had resized."""
    if not tensor.startswith(PREFIX) or _is_trained_besides(tensor, method):
        return False
    return any(tensor.endswith(f".{name}{ending}") for name in EMBEDDING_NAMES for ending in EMBEDDING_ENDINGS)


def _is_copy(tensor: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Return whether a tensor is a copy of another one: PEFT writes what it trains of a resized embedding twice."""
    other = tensors.get(tensor.replace(".modules_to_save.", "."))
    return ".modules_to_save." in tensor and other is not None and np.array_equal(tensors[tensor], other)


def _problems_of_tensors(tensors: Mapping[str, np.ndarray], method: Method) -> list[str]:
    """Return what is wrong with the tensors of an adapter, whatever the model."""
    if not tensors:
        return ["holds no tensors"]
    odd, shape_errors, not_finite, dtypes = [], [], [], []
    for name, tensor in tensors.items():
        module, suffix = split_name(name, method)
        if not name.startswith(EMBEDDINGS if method.virtual_tokens else PREFIX) or (
            suffix is None and not _is_trained_besides(name, method)
        ):
            odd.append(f"{name} {list(tensor.shape)}")
        elif suffix is not None and (shape_error := method.shape_error(module, suffix, tensor.shape)):
            shape_errors.append(f"{name} {list(tensor.shape)}: {shape_error}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            dtypes.append(f"{name} {tensor.dtype}")
        elif not np.isfinite(tensor).all():
            not_finite.append(name)
    endings = PREFIX + " or ".join(f"….{suffix}" for suffix in method.suffixes)
    names = EMBEDDINGS if method.virtual_tokens else f"{endings}, and what {CONFIG} names besides"
    kinds = {
        f"expected tensors named {names}, found": odd,
        f"tensors that do not fit {CONFIG}": shape_errors,
        "expected floats, found": dtypes,
        "tensors that hold NaN or infinite values": not_finite,
    }
    return [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]


def _is_trained_besides(tensor: str, method: Method) -> bool:
    """Return whether a tensor belongs to a module that modules_to_save, bias or trainable_token_indices names."""
    if tensor.endswith(ROWS):
        return bool(method.trainable_tokens())
    if method.bias != "none" and tensor.endswith(".bias"):
        return True
    parts = tensor.split(".")[:-1]
    if not {"modules_to_save", "original_module", "token_adapter"}.isdisjoint(
        parts
    ):  # PEFT's wrappers, not the module's own
        return False
    return any(".".join(parts[:end]).endswith(name) for end in range(1, len(parts) + 1) for name in method.modules_to_save)


def _verify(
    folder: Path,
    weights_file: Path,
    tensors: Mapping[str, np.ndarray],
    config_file: Path,
    config: dict[str, Any],
) -> None:
    """Raise CheckpointError where the written files differ from the values in memory; one tensor is read at a time."""
    wrong: list[str] = []
    try:
        with safetensors.safe_open(weights_file, "numpy") as file:
            found = set(file.keys())
            wrong += sorted(found ^ tensors.keys())
            for name in sorted(found & tensors.keys()):
                tensor = file.get_tensor(name)
                same_kind = tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
                if not same_kind or tensor.tobytes() != tensors[name].tobytes():
                    wrong.append(name)
        if json.loads(config_file.read_text(encoding="utf-8")) != config:
            wrong.append(CONFIG)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder}: adapter not saved: what was written does not read back: {error}.") from error
    if wrong:
        raise CheckpointError(
            f"{folder}: adapter not saved: what was written reads back otherwise ({len(wrong)}): {list_names(wrong)}."
        )
