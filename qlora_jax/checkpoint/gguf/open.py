"""Opens a GGUF file as if it were a Hugging Face checkpoint.

    header.py         the bytes of the header: metadata and the list of tensors
    config.py         metadata -> Hugging Face's config.json
    architectures.py  the names of each architecture's tensors, and what the converter did to their values
    values.py         packed blocks -> float32, streamed in bands of rows

`Checkpoint.read` returns a tensor as Hugging Face's model holds it: under its name, in its order of rows, and norms without
the offset.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qlora_jax.checkpoint.checkpoint import Checkpoint, unknown_tensor
from qlora_jax.checkpoint.gguf.architectures import ARCHITECTURES, Architecture, row_order
from qlora_jax.checkpoint.gguf.config import ROPE_TENSORS, read_config
from qlora_jax.checkpoint.gguf.header import Header, read_header
from qlora_jax.checkpoint.gguf.values import check_storage, read_values
from qlora_jax.errors import CheckpointError, list_names

__all__ = ["open_gguf"]


def open_gguf(path: Path, name: str | None = None) -> Checkpoint:
    """Return an opened file, after checking everything that its header shows; `name` is used in messages.

    Raises:
        CheckpointError: the file is damaged or cut off, of another architecture, or has metadata that are not known.
    """
    place = name or str(path)
    header = read_header(path)
    check_storage(header)
    problems: list[str] = []
    config = read_config(header, problems)
    architecture = header.metadata.get("general.architecture")
    names = _names(header, str(architecture), config, problems) if config else {}
    if problems:
        raise CheckpointError.of(place, problems)

    family = ARCHITECTURES[str(architecture)]

    def read(tensor_name: str) -> np.ndarray:
        if tensor_name not in names:
            raise unknown_tensor(place, tensor_name, names)
        stored = names[tensor_name]
        part, rows = _part(stored), header.tensors[stored].shape[0]
        order = family.orders.get(part)
        heads = config["num_key_value_heads" if part == "attn_k" else "num_attention_heads"]
        values = read_values(header, stored, row_order(order, rows, heads) if order else None)
        return values - np.float32(family.norm_offset) if family.norm_offset and stored.endswith("norm.weight") else values

    shapes = {hf: header.tensors[stored].shape for hf, stored in names.items()}
    dense = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
    kinds = {hf: dense.get(header.tensors[stored].type.name) for hf, stored in names.items()}
    return Checkpoint(place, config, shapes, read, dtypes={name: np.dtype(kind) for name, kind in kinds.items() if kind})


def _part(stored: str) -> str:
    """Return the module within a layer, e.g. `attn_q` of `blk.0.attn_q.weight`."""
    return stored.rpartition(".")[0].rpartition(".")[2]


def _names(header: Header, architecture: str, config: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """Return GGUF's name of each tensor by Hugging Face's; add unknown, missing and misshapen tensors to `problems`."""
    family, layers = ARCHITECTURES[architecture], config["num_hidden_layers"]
    names: dict[str, str] = {}
    unknown: list[str] = []
    for stored in header.tensors:
        match = re.fullmatch(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)", stored)
        layer, part, kind = match.group("layer", "part", "kind") if match else (None, "", "")
        table = family.outer if layer is None else family.layer
        if part not in table or (kind == "bias" and not _has_bias(part, architecture)) or int(layer or 0) >= layers:
            if stored not in ROPE_TENSORS.get(architecture, ()):
                unknown.append(stored)
            continue
        prefix = "" if layer is None else f"{family.prefix}.{layer}."
        names[f"{prefix}{table[part]}.{kind}"] = stored
    model = f"a {_title(family)} model of {layers} layers"
    if unknown:
        problems.append(f"holds {len(unknown)} tensors unknown to {model}: {_quoted(unknown)}.")
    expected = [f"{part}.weight" for part in family.outer if part != "output"]
    expected += [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in family.layer]
    if missing := [stored for stored in expected if stored not in header.tensors]:
        problems.append(f"lacks {len(missing)} of the tensors of {model}: {_quoted(missing)}.")
    problems += _misshapen(header, config)
    return names


def _has_bias(part: str, architecture: str) -> bool:
    """Return whether a module can have a bias: linear layers can, and the norms of GPT-NeoX."""
    if part.endswith("_norm"):
        return architecture == "gptneox"
    return part not in ("token_embd", "output")


def _misshapen(header: Header, config: Mapping[str, Any]) -> list[str]:
    """Return the tensors whose number of rows differs from the metadata; the rest of a shape is checked with the model."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    rows_of = {
        "token_embd": config["vocab_size"],
        "output": config["vocab_size"],
        "attn_q": heads * size,
        "attn_k": kv_heads * size,
        "attn_v": kv_heads * size,
        "attn_qkv": (heads + 2 * kv_heads) * size,
    }
    return [
        f"tensor {stored!r}: expected {rows_of[_part(stored)]} rows by the metadata, found shape {list(tensor.shape)}."
        for stored, tensor in header.tensors.items()
        if _part(stored) in rows_of and tensor.shape[0] != rows_of[_part(stored)]
    ]


def _title(family: Architecture) -> str:
    return family.model_class.removesuffix("ForCausalLM")


def _quoted(names: list[str]) -> str:
    return list_names([repr(name) for name in names])
