"""The files of a LoRA adapter, in PEFT's format:

    adapter_config.json          adapter_config.py
    adapter_model.safetensors    float32, one pair for each linear module, under its Hugging Face name:
        base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight    [r, in]
        base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight    [out, r]
                                 and what is trained besides: whole parameters, and rows of a table
        base_model.model.model.norm.weight
        base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta    [tokens, features]
                                 (PEFT's name; the rows themselves, not their change)
                                 and, where PEFT had resized the base, the base's token table and head
        base_model.model.model.embed_tokens.weight
                                 of virtual tokens nothing of this, but (prompts.py)
        prompt_embeddings    [rows, features]
    prompt_encoder.safetensors   what made these, where an encoder did

Writing. Both files are written beside their final places, flushed, read back and compared bit for bit with
the values in memory; only then do they take their names, the configuration last. An adapter that is empty or
half written is thus never left behind: there is the whole new one, or an error and what was there before.

Reading. Everything that makes the files no LoRA adapter, whatever the model, is reported in one error.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from qlora_jax.adapters.peft_config import CONFIG, TaskType, config_of, method_of, read_config
from qlora_jax.adapters.virtual_tokens import ENCODER, read_encoder, with_encoder
from qlora_jax.checkpoint.hub import resolve
from qlora_jax.errors import CheckpointError, list_names
from qlora_jax.peft import Method, PromptMethod
from qlora_jax.peft.prompt import EMBEDDINGS

__all__ = ["Adapter", "read_adapter", "read_adapter_config", "tensor_name", "write_adapter"]

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
TABLE_NAMES = ("embed_tokens", "embed_in", "shared", "lm_head", "embed_out")
# Of the base's own tables (resized.py): of one that the adapter leaves alone, or trains a copy or rows of.
TABLE_ENDINGS = (".weight", ".original_module.weight", ".token_adapter.base_layer.weight")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as the files hold it.

    Attributes:
        source: where it was read from, for messages.
        method: its shape and scaling.
        base: the base model that its configuration names, or None. Only shapes decide whether it fits.
        tensors: by the files' names; `[r, in]` for lora_A, `[out, r]` for lora_B, else as in the base's checkpoint.
        tables: the token table and head of a base that PEFT had resized, by the files' names (resized.py).
        encoder: the parameters of an encoder of virtual tokens, where there is one (prompts.py).
    """

    source: str
    method: Method
    base: str | None
    tensors: Mapping[str, np.ndarray]
    tables: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    encoder: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        """The full names of the linear modules that it adapts."""
        return adapted_modules(self.tensors, self.method)

    def of_module(self, module: str) -> dict[str, np.ndarray]:
        """The tensors of a linear module, by what follows its name; none where it has no adapter."""
        names = {suffix: tensor_name(module, suffix) for suffix in self.method.suffixes}
        return {suffix: self.tensors[name] for suffix, name in names.items() if name in self.tensors}


def tensor_name(module: str, suffix: str) -> str:
    """The name of a tensor of the adapter of a module, e.g. "model.layers.0.self_attn.q_proj" and "lora_A.weight"."""
    return f"{PREFIX}{module}.{suffix}"


def rows_name(module: str) -> str:
    """The name of the rows that are trained of a token table or head, e.g. "model.embed_tokens"."""
    return f"{PREFIX}{module}{ROWS}"


def write_adapter(
    tensors: Mapping[str, np.ndarray],
    folder: str | Path,
    *,
    method: Method,
    base_model_name_or_path: str | None = None,
    task_type: TaskType = "CAUSAL_LM",
    tables: Mapping[str, np.ndarray] | None = None,
    encoder: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes what `adapter_tensors` returned, and verifies it, as the module describes. An adapter in
    `folder` is replaced.

    Args:
        method: what the adapter was made with. "all-linear" is written as the names that it stood for, as PEFT
            does.
        base_model_name_or_path: path or hub id of the base, by which PEFT's users find it.
        task_type: by which PEFT chooses its wrapper around the base.
        tables: those of `Adapter`, where the base had them.
        encoder: that of `Adapter`, where there is one.

    Returns:
        The folder.

    Raises:
        CheckpointError: nothing to save, values that are not finite or of another rank, or the files could
            not be written (a full disk, say) or do not read back as they should. An adapter that was in
            `folder` before is still there.
    """
    folder = Path(folder)
    problems = _problems_of_tensors(tensors, method)
    if problems:
        raise CheckpointError.of(f"{folder}: adapter not saved", problems)
    config = config_of(adapted_modules(tensors, method), method, base_model_name_or_path, task_type)
    text = json.dumps(config, indent=2) + "\n"
    tensors = {**tensors, **(tables or {})}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
            weights_file, config_file = Path(temporary) / WEIGHTS, Path(temporary) / CONFIG
            _write(weights_file, safetensors.numpy.save(dict(tensors), {"format": "pt"}))
            _write(config_file, text.encode())
            _verify(folder, weights_file, tensors, config_file, config)
            # The configuration makes a folder an adapter. One that differs goes first, so that no moment
            # pairs it with the new weights.
            if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != text.encode():
                (folder / CONFIG).unlink()
            (folder / ENCODER).unlink(missing_ok=True)
            if encoder:
                _write(Path(temporary) / ENCODER, safetensors.numpy.save(dict(encoder), {"format": "pt"}))
                os.replace(Path(temporary) / ENCODER, folder / ENCODER)
            os.replace(weights_file, folder / WEIGHTS)
            os.replace(config_file, folder / CONFIG)
    except OSError as error:
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise CheckpointError(
            f"{folder}: adapter not saved: {error.strerror or error} (it needs {size:,} bytes)."
        ) from error
    return folder


def read_adapter_config(folder: str | Path) -> Method:
    """The adapter's shape, with which a model gets the right slots.

    Args:
        folder: a folder, or the hub id of an adapter.

    Raises:
        CheckpointError: no adapter there, or one of a kind that is not supported: every field that stands in
            the way is named.
    """
    path = _folder_of(folder)
    return with_encoder(method_of(str(folder), read_config(path, str(folder))), path)


def read_adapter(folder: str | Path) -> Adapter:
    """The tensors and the configuration of a folder or hub id.

    Raises:
        CheckpointError: files missing or damaged, a kind that is not supported, or tensors whose names,
            shapes or values make no LoRA adapter; all in one message.
    """
    path, source = _folder_of(folder), str(folder)
    config = read_config(path, source)
    method = with_encoder(method_of(source, config), path)
    file = path / WEIGHTS
    if not file.is_file():
        pickled = " only adapter_model.bin, which is pickled and not read" if (path / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{source}: expected {WEIGHTS} beside {CONFIG}, found{pickled or ' none'}.")
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{source}: {WEIGHTS} is damaged: {error}.") from error
    tables = {name: tensor for name, tensor in tensors.items() if _is_table(name, method)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in tables and not _is_copy(name, tensors)}
    problems = _problems_of_tensors(tensors, method)
    if problems:
        raise CheckpointError.of(source, problems)
    encoder = read_encoder(method, path, tensors.get(EMBEDDINGS), source)
    return Adapter(source, method, config.get("base_model_name_or_path") or None, tensors, tables, encoder)


def _is_table(tensor: str, method: Method) -> bool:
    """Whether a tensor is the token table or head of a base that PEFT had resized."""
    if not tensor.startswith(PREFIX) or _is_trained_besides(tensor, method):
        return False
    return any(tensor.endswith(f".{name}{ending}") for name in TABLE_NAMES for ending in TABLE_ENDINGS)


def _is_copy(tensor: str, tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether PEFT wrote a tensor twice, as it does with what it trains of a table of a base that it had resized."""
    other = tensors.get(tensor.replace(".modules_to_save.", "."))
    return ".modules_to_save." in tensor and other is not None and np.array_equal(tensors[tensor], other)


def _problems_of_tensors(tensors: Mapping[str, np.ndarray], method: Method) -> list[str]:
    """What makes tensors no LoRA adapter, whatever the model."""
    if not tensors:
        return ["holds no tensors"]
    odd, shape_errors, not_finite, dtypes = [], [], [], []
    for name, tensor in tensors.items():
        module, suffix = split_name(name, method)
        if not name.startswith(EMBEDDINGS if isinstance(method, PromptMethod) else PREFIX) or (
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
    names = EMBEDDINGS if isinstance(method, PromptMethod) else f"{endings}, and what {CONFIG} names besides"
    kinds = {
        f"expected tensors named {names}, found": odd,
        f"tensors that do not fit {CONFIG}": shape_errors,
        "expected floats, found": dtypes,
        "tensors that hold NaN or infinite values": not_finite,
    }
    return [f"{kind} ({len(names)}): {list_names(names)}" for kind, names in kinds.items() if names]


def _is_trained_besides(tensor: str, method: Method) -> bool:
    """Whether a tensor belongs to what modules_to_save or trainable_token_indices name."""
    if tensor.endswith(ROWS):
        return bool(method.trainable_tokens())
    return any(tensor.rpartition(".")[0].endswith(name) for name in method.modules_to_save)


def split_name(tensor: str, method: Method) -> tuple[str, str | None]:
    """(the module's full name, the rest) of the name of an adapter's tensor; (the name, None) where it is none."""
    for suffix in method.suffixes:
        if tensor == EMBEDDINGS == suffix:  # of the model as a whole
            return "", suffix
        if tensor.endswith("." + suffix):
            return tensor.removeprefix(PREFIX).removesuffix("." + suffix), suffix
    return tensor, None


def adapted_modules(tensors: Iterable[str], method: Method) -> list[str]:
    """The full names of the modules whose adapters have tensors of these names."""
    split = [split_name(name, method) for name in tensors]
    return list(dict.fromkeys(module for module, suffix in split if suffix is not None and module))


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _verify(
    folder: Path,
    weights_file: Path,
    tensors: Mapping[str, np.ndarray],
    config_file: Path,
    config: dict[str, Any],
) -> None:
    """Compares what was written with what was meant, bit for bit, one tensor at a time."""
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


def _folder_of(folder: str | Path) -> Path:
    path = resolve(folder)
    if path.is_file():
        raise CheckpointError(f"{folder}: expected a folder with {CONFIG} and {WEIGHTS}, found a file.")
    return path
