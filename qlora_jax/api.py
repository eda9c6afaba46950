"""The calls that a user of Hugging Face's libraries expects: `from_pretrained`, `save_pretrained`, `merge`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from qlora_jax.adapters.bind import metadata_of, save_adapter
from qlora_jax.adapters.metadata import QuantizationChoice
from qlora_jax.adapters.pretrained import AS_TRAINED, open_pretrained
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.errors import OptionError
from qlora_jax.models import Model, Remat
from qlora_jax.peft import Method
from qlora_jax.quant import EMBEDDING_STORAGES, EmbeddingStorage, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from qlora_jax.export.merge import MergedDtype

__all__ = ["from_pretrained", "merge", "save_pretrained"]


def from_pretrained(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    revision: str | None = None,
    quantization: Quantization | QuantizationChoice | None = AS_TRAINED,
    embedding_storage: EmbeddingStorage | None = None,
    method: Method | None = None,
    dtype: DTypeLike | None = None,
    remat: Remat = "full",
    mesh: Mesh | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Model, "PreTrainedTokenizerFast"]:
    """Return (model, tokenizer) of a base model, with a saved adapter, with a new one, or without one.

    The model maps int32 tokens `[b, t]` to logits `[b, t, vocabulary]` (a `CausalLM`), or int32 sources `[b, s]` and decoder
    inputs `[b, t]` to such logits (a `T5`).

    Args:
        model: a folder, a .gguf file or a repository id of the Hugging Face hub; SmolLM2-135M-Instruct if None.
        adapter: a folder or a repository id of an adapter in PEFT's format.
        revision: branch, tag or commit of the base's repository.
        quantization: storage of the linear layers; None stores them dense. By default they are stored as they were when the
            adapter was trained, else in NF4 with double quantisation.
        embedding_storage: storage of the token embedding and the head; as the adapter was trained, else "none", if None.
        method: the method of a new adapter, e.g. `LoRA(rank=16)`; an adapter that is loaded has its own.
        dtype: dtype of activations and dense weights; bfloat16 on GPU and TPU, float32 on CPU, if None.
        remat: what the backward pass recomputes.
        mesh: devices over which the frozen weights are sharded, as `nn.data_mesh` returns them; None for the default device.
        seed: seed of a new adapter's random initial values.
        progress: whether to show a progress bar.

    Raises:
        OptionError: an argument of another type, or with an unknown value.
        QLoRAError: files that are missing, damaged or unsupported, or do not fit each other.
    """
    _check_quantization(quantization, (Quantization, QuantizationChoice, NoneType))
    _check_method(method)
    _check_dtype(dtype)
    _check_choice("embedding_storage", embedding_storage, (None, *EMBEDDING_STORAGES))
    _check_choice("remat", remat, get_args(Remat))
    pretrained = open_pretrained(
        model,
        adapter,
        revision=revision,
        quantization=quantization,
        embedding_storage=embedding_storage,
        method=method,
        dtype=dtype,
        remat=remat,
    )
    return pretrained.load(mesh=mesh, seed=seed, progress=progress), pretrained.tokenizer


def save_pretrained(
    model: Model,
    folder: str | Path,
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    *,
    base_model_name_or_path: str | None = None,
    template: str | None = None,
) -> Path:
    """Write a model's adapter in PEFT's format, and how its base was stored; return the folder.

    `from_pretrained(base, folder)` loads the same model again.

    Args:
        model: a model with an adapter.
        folder: an adapter in it is replaced.
        tokenizer: written beside the adapter, for an adapter with new tokens; None: no tokenizer.
        base_model_name_or_path: path or repository id of the base, by which PEFT finds it; that which the model was loaded
            from, if None.
        template: the form of the prompts that the adapter was trained with ("chat", "alpaca", …); that of the adapter
            that the model was loaded with, if None.

    Raises:
        OptionError: the model has no adapter.
        CheckpointError: values that are not finite, or files that could not be written.
    """
    name = base_model_name_or_path or (None if model.origin is None else model.origin.name)
    return save_adapter(
        model,
        folder,
        base_model_name_or_path=name,
        metadata=metadata_of(model, template=template),
        beside=() if tokenizer is None else (partial(save_tokenizer, tokenizer),),
    )


def merge(
    model: str | Path | None,
    adapter: str | Path | None,
    folder: str | Path,
    *,
    revision: str | None = None,
    dtype: "MergedDtype | None" = None,
    quantization: Quantization | None = None,
    base: Literal["original", "dequantized"] = "original",
    progress: bool = True,
) -> Path:
    """Write a base model with an adapter merged into it as a Hugging Face folder, with its tokenizer; return the folder.

    Args:
        model: a folder, a .gguf file or a repository id; SmolLM2-135M-Instruct if None.
        adapter: a folder or a repository id of an adapter; None exports the base as it is.
        folder: a folder that does not exist yet or is empty.
        revision: branch, tag or commit of the base's repository.
        dtype: dtype of the weights; that of the base if None.
        quantization: storage of the linear layers in bitsandbytes' 4 bits; None writes them in `dtype`.
        base: the values to merge into: those of the checkpoint ("original"), or those that they had in training after they
            were quantised ("dequantized").
        progress: whether to show a progress bar.

    Raises:
        OptionError: an argument of another type, or with an unknown value; or dequantised values of dense weights.
        QLoRAError: files that do not fit each other, or a folder that is in use or cannot be written.
    """
    from qlora_jax.export.pretrained import merge_pretrained

    _check_quantization(quantization, (Quantization, NoneType))
    _check_choice("base", base, ("original", "dequantized"))
    pretrained = open_pretrained(model, adapter, revision=revision)
    return merge_pretrained(pretrained, folder, dtype=dtype, quantization=quantization, base=base, progress=progress)


def _check_quantization(quantization: object, types: tuple[type, ...]) -> None:
    """Raise OptionError for a storage of linear layers of none of these types, such as the name of a data type."""
    if not isinstance(quantization, types):
        raise OptionError(
            f'quantization: expected a Quantization such as Quantization("nf4"), or None, found {quantization!r}'
        )


def _check_method(method: object) -> None:
    """Raise OptionError for a method that is no `Method`, such as its name or its class."""
    if method is not None and Method not in type(method).__mro__:
        raise OptionError(f"method: expected a Method such as LoRA(rank=16), or None, found {method!r}")


def _check_dtype(dtype: Any) -> None:
    """Raise OptionError for a compute dtype that is unknown or no floating-point dtype."""
    try:
        known = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise OptionError(
            f'dtype: expected a floating-point dtype such as "bfloat16" or "float32", or None, found {dtype!r}'
        )


def _check_choice(argument: str, value: object, choices: Sequence[str | None]) -> None:
    """Raise OptionError for a value that is none of the choices."""
    if value not in choices:
        raise OptionError(f"{argument}: expected one of {', '.join(map(repr, choices))}, found {value!r}")
