"""The calls that a user of Hugging Face's libraries expects: `from_pretrained`, `save_pretrained`, `merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jax.sharding import Mesh
from jax.typing import DTypeLike

from qlora_jax.adapters.bind import save_adapter
from qlora_jax.adapters.metadata import AdapterMetadata, QuantizationChoice
from qlora_jax.adapters.pretrained import AS_TRAINED, open_pretrained
from qlora_jax.adapters.weight_init import converted_from
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.models import Model, Remat
from qlora_jax.peft import Method
from qlora_jax.quant import EmbeddingStorage, Quantization

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
        mesh: devices over which the frozen weights are sharded; None for the default device.
        seed: seed of a new adapter's random initial values.
        progress: whether to show a progress bar.

    Raises:
        QLoRAError: files that are missing, damaged or unsupported, or do not fit each other.
    """
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

    `from_pretrained(base, folder)` loads the same model again. `save_adapter` writes PEFT's files alone.

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
    origin, method = model.origin, model.method
    name = base_model_name_or_path or (None if origin is None else origin.name)
    folder = save_adapter(model, folder, base_model_name_or_path=name)
    assert method is not None  # `save_adapter` raises where there is none
    subtracted = None if origin is None else origin.subtracted
    if template is None and origin is not None:
        template = origin.template
    AdapterMetadata(
        model.quantization,
        template,
        model.embedding_storage,
        converted_from(method) if subtracted is None else subtracted.initialization,
        None if origin is None else origin.scaling,
    ).save(folder)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    return folder


def merge(
    model: str | Path | None,
    adapter: str | Path | None,
    folder: str | Path,
    *,
    revision: str | None = None,
    dtype: "MergedDtype" = "bfloat16",
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
        dtype: dtype of the weights.
        quantization: storage of the linear layers in bitsandbytes' 4 bits; None writes them in `dtype`.
        base: the values to merge into: those of the checkpoint ("original"), or those that they had in training after they
            were quantised ("dequantized").
        progress: whether to show a progress bar.

    Raises:
        QLoRAError: files that do not fit each other, or a folder that is in use or cannot be written.
    """
    from qlora_jax.export.pretrained import merge_pretrained

    pretrained = open_pretrained(model, adapter, revision=revision)
    return merge_pretrained(pretrained, folder, dtype=dtype, quantization=quantization, base=base, progress=progress)
