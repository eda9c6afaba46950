"""An adapter merged into its base: an ordinary Hugging Face folder that any program can serve.

    W' = W + s B A        W [out, in], A [r, in], B [out, r]; in float32, rounded once to the new dtype

Parameters that the adapter trains as a whole, or rows of tables, take their trained values. Where the head was the token
table and either was trained by itself, the result has both, and says so in config.json.

W is the matrix of the checkpoint, or, with `from_dequantized`, dequantize(quantize(W)): what the adapter saw
while it was trained; `from_embedding_storage` says the same of a token table and a head that were packed. The first
keeps the base as it was published; the second keeps what training arrived at
(`drift.logit_drift` tells how far apart the two end up). Without an adapter the same path exports a checkpoint, a
GGUF file say, as such a folder. Linear layers can be written in bitsandbytes' 4 bits (bnb.py).

    config.json                        the checkpoint's, with the new dtype (and quantization_config)
    model.safetensors                  or, above `shard_bytes` in all:
    model-00001-of-00002.safetensors   …, with model.safetensors.index.json: which file holds which tensor
    tokenizer.json …                   where a tokenizer is given

Memory. The sizes of all tensors are known before any is read, so that a shard's header can be written first
and its tensors streamed after it: the host holds the adapter and up to three float32 copies of one matrix.

The folder is written under a temporary name beside its own, which it takes at the end: it is whole or absent.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from qlora_jax.adapters.bind import check_family, check_fit
from qlora_jax.adapters.files import Adapter
from qlora_jax.checkpoint.bitsandbytes import quantization_config, quantized_shapes, quantized_tensors
from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.fill import Rewrite
from qlora_jax.checkpoint.load import check_tensors, find, with_copy, with_tied
from qlora_jax.checkpoint.tokenizer import save_tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.export.trained_parameters import Retrained, retrained_parameters
from qlora_jax.models import T5, ParameterMapping, TrainableBase, family_of, tied_head
from qlora_jax.models.trainable import EMBEDDING
from qlora_jax.peft import PromptMethod, ScalesBias
from qlora_jax.quant import (
    EmbeddingStorage,
    PackedEmbedding,
    Quantization,
    QuantizedTensor,
    dequantize,
    embedding_lookup,
    quantize,
    quantize_embedding,
)

__all__ = ["MergedDtype", "merge"]

MergedDtype = Literal["bfloat16", "float16", "float32"]
Entry = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of a tensor in a file
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
_CODES = {
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float16): "F16",
    np.dtype(np.float32): "F32",
    np.dtype(np.uint8): "U8",
}


def merge(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    output: str | Path,
    *,
    dtype: MergedDtype = "bfloat16",
    quantization: Quantization | None = None,
    from_dequantized: Quantization | None = None,
    from_embedding_storage: EmbeddingStorage = "none",
    rewrite: Rewrite | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint, with an adapter merged into it, as a Hugging Face folder.

    Args:
        adapter: None exports the checkpoint as it is.
        output: a folder that does not exist yet or is empty.
        dtype: of the weights.
        quantization: of the linear layers, for transformers with bitsandbytes; None leaves them in `dtype`.
        from_dequantized: how the base was quantised in training; merge onto those values instead of the
            original ones.
        from_embedding_storage: the same of the token table and the head.
        rewrite: what the base's linear matrices were turned into before that, as for `load_model`.
        shard_bytes: the most that one file holds, except for a tensor that is larger by itself.

    Returns:
        The folder.

    Raises:
        CheckpointError: `output` is in use or cannot be written; the checkpoint or the adapter does not fit
            the architecture; or a tensor that is not finite, in the checkpoint or after rounding to float16.
        ValueError: unsupported architecture, dtype or data type.
    """
    output = Path(output)
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {', '.join(get_args(MergedDtype))}")
    if output.exists() and (not output.is_dir() or next(output.iterdir(), None) is not None):
        raise CheckpointError(f"{output}: expected a folder that is empty or does not exist yet, found it in use.")
    if adapter is not None and isinstance(adapter.method, PromptMethod):
        raise CheckpointError(
            f"{adapter.source}: virtual tokens ({adapter.method.peft_type}) are no weights: expected an adapter of linear "
            "layers to merge, found none; generate.py takes the adapter as it is."
        )
    checkpoint = with_tied(checkpoint, family_of(checkpoint.config))
    keys, trained = check_all(checkpoint, adapter)
    names = [name for key in keys for name in key.names()]
    linear = {name for key in keys if key.linear for name in key.names()}
    head = tied_head(keys) if trained.unties else None
    if head is not None:  # the token table and the head were one, and are not any more
        table = next(key.name for key in keys if key.path == EMBEDDING)
        checkpoint = with_copy(checkpoint, head, table)
        names.append(head)
    retrained = retrained_parameters(adapter, trained, keys)
    packed: dict[str, EmbeddingStorage] = (
        dict.fromkeys(_tables(checkpoint), from_embedding_storage) if from_embedding_storage != "none" else {}
    )
    entries: dict[str, dict[str, Entry]] = {
        name: {name: (_DTYPES[dtype], tuple(checkpoint.shapes[name]))}
        if quantization is None or name not in linear
        else quantized_shapes(name, checkpoint.shapes[name], quantization)
        for name in names
    }
    shards = _shards(entries, shard_bytes)
    needed = sum(map(_bytes_of, entries.values()))

    temporary = output.with_name(f".{output.name}.writing-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if free < needed:
            raise CheckpointError(f"{output}: expected {needed:,} free bytes for the merged model, found {free:,}.")
        with tqdm(total=len(names), desc="merging", unit="tensor", disable=not progress, leave=False) as bar:
            for file, shard in shards.items():
                tensors = _merged(
                    checkpoint,
                    adapter,
                    retrained,
                    shard,
                    linear,
                    packed,
                    dtype,
                    quantization,
                    from_dequantized,
                    rewrite,
                    bar,
                )
                stored = {part: entry for name in shard for part, entry in entries[name].items()}
                _write_shard(temporary / file, stored, tensors)
        if len(shards) > 1:
            weight_map = {part: file for file, shard in shards.items() for name in shard for part in entries[name]}
            _write_json(
                temporary / "model.safetensors.index.json",
                {"metadata": {"total_size": needed}, "weight_map": dict(sorted(weight_map.items()))},
            )
        config = checkpoint.config if head is None else checkpoint.config | {"tie_word_embeddings": False}
        _write_json(temporary / "config.json", _config(config, dtype, quantization))
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        os.replace(temporary, output)
    except OSError as error:
        raise CheckpointError(
            f"{output}: could not be written: {error.strerror or error} (the weights need {needed:,} bytes)."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def check_all(checkpoint: Checkpoint, adapter: Adapter | None) -> tuple[tuple[ParameterMapping, ...], TrainableBase]:
    """The family's key table, once everything fits everything, and what the adapter trained besides linear layers.

    By headers alone: no weight is read.

    Raises:
        CheckpointError: the checkpoint or the adapter does not fit the architecture.
        ValueError: unsupported architecture.
    """
    family = family_of(checkpoint.config)
    config = family.config(checkpoint.config)
    abstract = nnx.state(nnx.eval_shape(lambda: family.model(config, rngs=nnx.Rngs(0))))
    check_tensors(checkpoint, family, config, abstract)
    if adapter is not None:
        check_family(adapter, config.family)  # before names that another family lacks are looked for
        model = nnx.eval_shape(lambda: family.model(config, method=adapter.method, rngs=nnx.Rngs(0)))
        check_fit(adapter, model)
        return config.parameter_mappings, model.trainable
    return config.parameter_mappings, TrainableBase()


def _merged(
    checkpoint: Checkpoint,
    adapter: Adapter | None,
    retrained: Mapping[str, Retrained],
    names: Sequence[str],
    linear: set[str],
    packed: Mapping[str, EmbeddingStorage],
    dtype: MergedDtype,
    quantization: Quantization | None,
    from_dequantized: Quantization | None,
    rewrite: Rewrite | None,
    bar: tqdm,
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a shard, one at a time."""
    for name in names:
        module = name.rsplit(".", 1)[0]
        found = {} if adapter is None else adapter.of_module(module)
        update = found if name in linear else {}
        adapted = bool(update)
        as_it_is = name in checkpoint.quantized and quantization == checkpoint.quantization and not adapted
        if name in linear and as_it_is and checkpoint.read_quantized is not None:
            yield from quantized_tensors(name, checkpoint.read_quantized(name), dtype).items()
            bar.update()
            continue
        tensor = checkpoint.read(name)
        if name in packed:  # before rows of it that were trained take their values
            tensor = _through_packing(tensor, packed[name])
        if name in retrained:
            tensor = retrained[name].put(tensor)
        if name in linear and rewrite is not None:
            changed = rewrite(module, jnp.asarray(tensor, jnp.float32).T)
            tensor = tensor if changed is None else np.asarray(changed).T
        if name in linear and from_dequantized is not None and name not in checkpoint.quantized:
            tensor = _through_quantization(tensor, from_dequantized)
        if adapted and adapter is not None:
            tensor = adapter.method.merged(tensor, module, update)
        elif found and name.endswith(".bias") and adapter is not None and isinstance(adapter.method, ScalesBias):
            tensor = adapter.method.merged_bias(tensor, module, found)
        if not np.isfinite(tensor).all():
            raise CheckpointError(f"{checkpoint.source}: tensor {name} holds NaN or infinite values.")
        if name in linear and quantization is not None:
            yield from quantized_tensors(name, _quantized(tensor, quantization), dtype).items()
            bar.update()
            continue
        with np.errstate(over="ignore"):  # reported below, with the tensor's name
            rounded = tensor.astype(_DTYPES[dtype], copy=False)
        if not np.isfinite(rounded).all():
            largest = float(np.abs(tensor).max())
            raise CheckpointError(f"{checkpoint.source}: tensor {name}: {largest:g} is too large for {dtype}; use bfloat16.")
        bar.update()
        yield name, rounded


def _quantized(matrix: np.ndarray, quantization: Quantization) -> QuantizedTensor:
    """A matrix `[out, in]` in 4 bits, as loading does it: the layers hold `[in, out]`."""
    return quantize(
        jnp.asarray(matrix).T,
        quantization.data_type,
        quantization.block_size,
        quantization.double_quantization,
    )


def _through_quantization(matrix: np.ndarray, quantization: Quantization) -> np.ndarray:
    """float32 dequantize(quantize(matrix))."""
    return np.asarray(jax.jit(dequantize, static_argnames="dtype")(_quantized(matrix, quantization), jnp.float32)).T


def _tables(checkpoint: Checkpoint) -> list[str]:
    """The names of the tensors that `embedding_storage` packs."""
    family = family_of(checkpoint.config)
    config = family.config(checkpoint.config)
    frozen = nnx.state(nnx.eval_shape(lambda: family.model(config, embedding_storage="int8", rngs=nnx.Rngs(0))))
    return [
        key.name
        for key in config.parameter_mappings
        if not key.linear and isinstance(find(frozen, key.path).get_value(), PackedEmbedding)
    ]


def _through_packing(table: np.ndarray, storage: EmbeddingStorage) -> np.ndarray:
    """The float32 rows of a table `[vocabulary, features]` that is packed so."""
    packed = quantize_embedding(jnp.asarray(table), storage, jnp.float32)
    return np.asarray(embedding_lookup(packed, jnp.arange(len(table))))


def _bytes_of(entries: Mapping[str, Entry]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in entries.values())


def _shards(entries: Mapping[str, Mapping[str, Entry]], limit: int) -> dict[str, list[str]]:
    """Which file holds which tensors: filled in order, a new one wherever the next tensor does not fit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, parts in entries.items():
        size = _bytes_of(parts)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(path: Path, entries: Mapping[str, Entry], tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """One .safetensors file: the length of the header as uint64, the header padded to 8 bytes, the data
    without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), (found, tensor) in zip(entries.items(), tensors, strict=True):
            assert (name, dtype, math.prod(shape)) == (found, tensor.dtype, tensor.size), (name, found)
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _config(config: dict[str, Any], dtype: MergedDtype, quantization: Quantization | None) -> dict[str, Any]:
    """The checkpoint's config.json for weights of that storage; the dtype goes under its old and its new name."""
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    kept = {name: value for name, value in config.items() if name not in dropped}
    if not kept.get("architectures"):
        kind = "ForConditionalGeneration" if family_of(config).model is T5 else "ForCausalLM"
        kept["architectures"] = [f"{kept['model_type'].capitalize()}{kind}"]
    if quantization is not None:
        kept["quantization_config"] = quantization_config(quantization, dtype)
    return kept | {"dtype": dtype, "torch_dtype": dtype}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
