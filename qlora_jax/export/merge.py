"""Merges an adapter into its base: the result is an ordinary Hugging Face folder that any program can serve.

    W' = W + s B A        W [out, in], A [r, in], B [out, r]; in float32, rounded once to the new dtype

Parameters that the adapter trains as a whole, and rows of embeddings, take their trained values. Where the head was tied to
the token embedding and the adapter trained either of them by itself, the result has both, and its config.json says so.

W is the matrix of the checkpoint, or, with `from_dequantized`, dequantize(quantize(W)), which is what the adapter was
trained on; `from_embedding_storage` does the same for a packed token embedding and head. The first gives the base as it was
published plus the update; the second gives the model that was trained (`drift.logit_drift` measures how far the two differ).
Without an adapter a checkpoint, for instance a GGUF file, is exported as a folder. Linear layers can be written in
bitsandbytes' 4 bits (bitsandbytes.py).

    config.json                        the checkpoint's, with the new dtype (and quantization_config)
    generation_config.json             the checkpoint's, with every token that ends a text (generation.py)
    model.safetensors                  or, above `shard_bytes` in all:
    model-00001-of-00002.safetensors   …, with model.safetensors.index.json: which file holds which tensor
    tokenizer.json …                   where a tokenizer is given

Memory. Tensors are merged and written one at a time: the host holds the adapter and up to three float32 copies of a matrix.

The folder is written under a temporary name beside its own and renamed at the end (checkpoint/whole_folder.py): it is whole
or absent.
"""

import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.fit import check_all, check_family
from qlora_jax.checkpoint.bitsandbytes import quantization_config, quantized_shapes
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.initialize import rewrite_for
from qlora_jax.checkpoint.load import find, with_copy, with_tied
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.checkpoint.whole_folder import remove_remains, whole_folder, writing_errors
from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.export.biases import with_biases
from qlora_jax.export.generation import GENERATION, generation_config
from qlora_jax.export.merge_tensor import TensorMerge, merged_tensors
from qlora_jax.export.shards import Entry, bytes_of, split_into_shards, write_json, write_shard
from qlora_jax.export.trained_parameters import retrained_parameters
from qlora_jax.models import ModelSpec, tied_head
from qlora_jax.models.trainable import EMBEDDING
from qlora_jax.peft import Subtracted
from qlora_jax.quant import EmbeddingStorage, PackedEmbedding, Quantization

__all__ = ["MergedDtype", "merge", "own_dtype"]

MergedDtype = Literal["bfloat16", "float16", "float32"]
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """What is written, known before any weight is read.

    Attributes:
        checkpoint: the base, with a head of its own where the adapter untied it.
        merge: how each tensor is made.
        entries: what each tensor of the checkpoint is written as, by its name: dtype and shape, by names in the file.
        shards: the names of the tensors of each file.
        config: the new config.json.
        generation: the new generation_config.json; None: there is none.
    """

    checkpoint: Checkpoint
    merge: TensorMerge
    entries: Mapping[str, Mapping[str, Entry]]
    shards: Mapping[str, Sequence[str]]
    config: dict[str, Any]
    generation: dict[str, Any] | None = None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(map(bytes_of, self.entries.values()))


def merge(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    output: str | Path,
    *,
    dtype: MergedDtype | None = None,
    quantization: Quantization | None = None,
    from_dequantized: Quantization | None = None,
    from_embedding_storage: EmbeddingStorage = "none",
    subtracted: Subtracted | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write a checkpoint, with an adapter merged into it, as a Hugging Face folder; return the folder.

    Args:
        adapter: None exports the checkpoint as it is.
        output: a folder that does not exist yet or is empty.
        dtype: dtype of the weights; that of the checkpoint (`own_dtype`) if None.
        quantization: storage of the linear layers, for transformers with bitsandbytes; None writes them in `dtype`.
        from_dequantized: how the base was quantised in training; the adapter is merged into those values in place of the
            original ones.
        from_embedding_storage: how the token embedding and the head were packed in training, likewise.
        subtracted: what was subtracted from the base's weights before these were quantised, as for `load_model`.
        tokenizer: written beside the model; None: no tokenizer.
        shard_bytes: the most bytes of one file, except for a tensor that is larger by itself.
        progress: whether to show a progress bar.

    Raises:
        CheckpointError: `output` is in use or cannot be written; the checkpoint or the adapter does not fit the
            architecture; or a tensor is not finite, in the checkpoint or after rounding to float16.
        QLoRAError: an unsupported architecture, dtype or data type.
    """
    output = Path(output)
    if dtype is None:
        dtype = own_dtype(checkpoint)
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}; expected one of {', '.join(get_args(MergedDtype))}")
    if output.exists() and (not output.is_dir() or next(output.iterdir(), None) is not None):
        remove_remains(output)
        raise CheckpointError(f"{output}: expected a folder that is empty or does not exist yet, found it in use.")
    if adapter is not None and adapter.method.virtual_tokens:
        raise CheckpointError(
            f"{adapter.name}: virtual tokens ({adapter.method.peft_type}) are no weights: expected an adapter of linear "
            "layers to merge, found none; generate.py takes the adapter as it is."
        )
    method = None if adapter is None else adapter.method
    # Only LoftQ reads the quantization here: its initialization depends on how the base was stored.
    rewrite = rewrite_for(method, subtracted, from_dequantized or Quantization())
    how = TensorMerge(adapter, _DTYPES[dtype], quantization, from_dequantized, from_embedding_storage, rewrite)
    plan = make_plan(checkpoint, how, dtype, shard_bytes)
    plan = dataclasses.replace(plan, generation=generation_config(checkpoint, tokenizer))
    _write_folder(plan, output, tokenizer, progress=progress)
    return output


def own_dtype(checkpoint: Checkpoint) -> MergedDtype:
    """Return the dtype of a checkpoint's weights: the one that config.json names, as transformers loads them, else that of
    most of its linear matrices; "bfloat16" where these are packed."""
    is_gguf = checkpoint.snapshot is not None and checkpoint.snapshot.path.suffix == ".gguf"  # it states none
    for field in () if is_gguf else ("dtype", "torch_dtype"):
        stated = str(checkpoint.config.get(field)).removeprefix("torch.")
        for name in get_args(MergedDtype):
            if stated == name:
                return name
    sizes = dict.fromkeys(get_args(MergedDtype), 0)
    for name in (
        name for mapping in checkpoint.model_config.parameter_mappings if mapping.linear for name in mapping.names()
    ):
        if (kind := str(checkpoint.dtypes.get(name))) in sizes:
            sizes[kind] += math.prod(checkpoint.shapes[name])
    largest: MergedDtype = max(sizes, key=lambda name: sizes[name])
    return largest if sizes[largest] else "bfloat16"


def make_plan(checkpoint: Checkpoint, how: TensorMerge, dtype: MergedDtype, shard_bytes: int) -> MergePlan:
    """Return what is to be written, once headers show that the checkpoint and the adapter fit each other.

    Args:
        how: what is known of the merge before the model is.

    Raises:
        QLoRAError: they do not fit each other, or a data type that cannot be written.
    """
    adapter, quantization = how.adapter, how.quantization
    checkpoint = with_tied(checkpoint)
    mappings = checkpoint.model_config.parameter_mappings
    if adapter is not None:
        check_family(adapter, checkpoint.model_config.family)  # before names of another family are looked for
    abstract = ModelSpec(checkpoint.model_config, None, method=None if adapter is None else adapter.method).abstract()
    check_all(checkpoint, adapter, abstract)
    checkpoint = with_biases(checkpoint, adapter)
    mappings = checkpoint.model_config.parameter_mappings
    names = [name for mapping in mappings for name in mapping.names()]
    linear = frozenset(name for mapping in mappings if mapping.linear for name in mapping.names())
    # A checkpoint that is written with the quantisation that it has keeps its dense layers.
    kept = checkpoint.dense_modules if quantization == checkpoint.quantization else frozenset[str]()
    dense = frozenset(name for name in linear if name.rpartition(".")[0] in kept)
    head = tied_head(mappings) if abstract.trainable.unties else None
    config = checkpoint.config
    if head is not None:  # the head was tied to the token embedding, and is not any more
        checkpoint = with_copy(checkpoint, head, next(mapping.name for mapping in mappings if mapping.path == EMBEDDING))
        config = config | {"tie_word_embeddings": False}
        names.append(head)
    how = dataclasses.replace(
        how,
        linear=linear,
        dense=dense,
        packed=_packed_embeddings(checkpoint) if how.from_embedding_storage != "none" else frozenset(),
        adapted={"embed_out": "lm_head"},
        retrained=retrained_parameters(adapter, abstract.trainable, mappings),
    )
    entries: dict[str, dict[str, Entry]] = {
        name: {name: (how.dtype, tuple(checkpoint.shapes[name]))}
        if quantization is None or name not in linear - dense
        else quantized_shapes(name, checkpoint.shapes[name], quantization)
        for name in names
    }
    shards = split_into_shards(entries, shard_bytes)
    return MergePlan(checkpoint, how, entries, shards, _config(checkpoint, config, dtype, quantization, kept))


def _write_folder(plan: MergePlan, output: Path, tokenizer: PreTrainedTokenizerFast | None, *, progress: bool) -> None:
    """Write the folder of a plan, under a temporary name until it is complete.

    Raises:
        CheckpointError: it could not be written.
    """
    with writing_errors(output, plan.size), whole_folder(output, marker="config.json") as new:
        free = shutil.disk_usage(new).free
        if free < plan.size:
            raise CheckpointError(f"{output}: expected {plan.size:,} free bytes for the merged model, found {free:,}.")
        with tqdm(total=len(plan.entries), desc="merging", unit="tensor", disable=not progress, leave=False) as bar:
            for file, names in plan.shards.items():
                stored = {part: entry for name in names for part, entry in plan.entries[name].items()}
                write_shard(new / file, stored, _tensors_of(plan, names, bar))
        if len(plan.shards) > 1:
            weight_map = {part: file for file, names in plan.shards.items() for name in names for part in plan.entries[name]}
            write_json(
                new / "model.safetensors.index.json",
                {"metadata": {"total_size": plan.size}, "weight_map": dict(sorted(weight_map.items()))},
            )
        write_json(new / "config.json", plan.config)
        if plan.generation is not None:
            write_json(new / GENERATION, plan.generation)
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)


def _tensors_of(plan: MergePlan, names: Sequence[str], bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
    """Return (name in the file, tensor) of the tensors of one file, one at a time."""
    for name in names:
        tensors = merged_tensors(plan.checkpoint, name, plan.merge)
        bar.update()
        yield from tensors.items()


def _packed_embeddings(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the names of the tensors that `embedding_storage` packs."""
    config = checkpoint.model_config
    frozen = nnx.state(ModelSpec(config, None, "int8", None).abstract())
    return frozenset(
        mapping.name
        for mapping in config.parameter_mappings
        if not mapping.linear and isinstance(find(frozen, mapping.path).get_value(), PackedEmbedding)
    )


def _config(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    dtype: MergedDtype,
    quantization: Quantization | None,
    dense: frozenset[str],
) -> dict[str, Any]:
    """Return the config.json for weights of that storage. The dtype is written under its old and its new name."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    result = {name: value for name, value in config.items() if name not in dropped}
    if not result.get("architectures"):
        result["architectures"] = [checkpoint.family.architecture]
    if quantization is not None:
        result["quantization_config"] = quantization_config(quantization, dtype, sorted(dense))
    return result | {"dtype": dtype, "torch_dtype": dtype}
