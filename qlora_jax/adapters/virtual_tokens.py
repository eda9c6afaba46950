"""Reads and writes virtual tokens (peft.prompt).

    adapter_model.safetensors      prompt_embeddings [rows, features]: the values that the model reads, as PEFT writes them
    prompt_encoder.safetensors     the parameters of the encoder that made these values, by the names of PEFT's modules; only
                                   where there is an encoder; training continues from them

PEFT writes no encoder. An adapter without one is loaded as its values, and training continues with the values themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from qlora_jax.errors import CheckpointError
from qlora_jax.nn import put, to_numpy
from qlora_jax.peft import Method, Prompt, PromptMethod
from qlora_jax.peft.prompt import EMBEDDING, EMBEDDINGS, attribute_of

__all__ = [
    "ENCODER",
    "encoder_tensors",
    "fill_prompt",
    "prompt_problems",
    "prompt_tensors",
    "read_encoder",
    "with_encoder",
    "write_encoder",
]

ENCODER = "prompt_encoder.safetensors"
TOLERANCE = 1e-3  # between the values that an encoder makes here and those in the file


def prompt_tensors(prompt: Prompt) -> dict[str, np.ndarray]:
    """Return the float32 tensors of adapter_model.safetensors."""
    return {EMBEDDINGS: to_numpy(prompt()).astype(np.float32, copy=False)}


def encoder_tensors(prompt: Prompt) -> dict[str, np.ndarray]:
    """Return the float32 parameters of the encoder; empty where the values themselves are trained."""
    if prompt.names == (EMBEDDING,):
        return {}
    values = {name: to_numpy(getattr(prompt, attribute_of(name))[...]) for name in prompt.names}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}


def write_encoder(prompt: Prompt | None, folder: Path) -> None:
    """Write the encoder of virtual tokens, if there is one, into the folder of their adapter."""
    if prompt is not None and (encoder := encoder_tensors(prompt)):
        (folder / ENCODER).write_bytes(safetensors.numpy.save(encoder, {"format": "pt"}))


def with_encoder(method: Method, folder: Path) -> Method:
    """Return the method of a configuration, without an encoder where the folder has none."""
    return method if (folder / ENCODER).is_file() else method.projected()


def read_encoder(method: Method, folder: Path, values: np.ndarray | None, place: str) -> dict[str, np.ndarray]:
    """Return the parameters of an adapter's encoder; empty where the folder has none.

    Args:
        values: the values that the encoder must make; None: any.
        place: the name of the folder in messages.

    Raises:
        CheckpointError: the encoder's file is damaged, or the encoder does not make these values.
    """
    file = folder / ENCODER
    if not isinstance(method, PromptMethod) or not file.is_file():
        return {}
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{place}: {ENCODER} is damaged: {error}.") from error
    try:
        made = np.asarray(method.encode({name: jnp.asarray(tensor) for name, tensor in tensors.items()}))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: {ENCODER}: expected the encoder of the configuration: {error!r}.") from error
    if values is not None and (made.shape != values.shape or not np.allclose(made, values, TOLERANCE, TOLERANCE)):
        raise CheckpointError(
            f"{place}: {ENCODER} does not make the values of {EMBEDDINGS}: delete it to continue from these alone."
        )
    return tensors


def prompt_problems(prompt: Prompt, tensors: Mapping[str, np.ndarray], encoder: Mapping[str, np.ndarray]) -> list[str]:
    """Return why an adapter does not fit a model with this prompt, which may be abstract."""
    problems = []
    own = {name: getattr(prompt, attribute_of(name)).get_value() for name in prompt.names}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in own.items()}
    expected: dict[str, Any] = {EMBEDDINGS: jax.eval_shape(prompt.method.encode, shapes).shape}
    found: dict[str, Any] = {name: tensor.shape for name, tensor in tensors.items()}
    if encoder:
        expected |= {name: value.shape for name, value in shapes.items()}
        found |= {name: tensor.shape for name, tensor in encoder.items()}
    elif prompt.names != (EMBEDDING,):
        problems.append(f"expected {ENCODER} beside it for a model with an encoder, found none")
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            problems.append(f"{name}: expected {_shown(expected.get(name))}, found {_shown(found.get(name))}")
    return problems


def fill_prompt(model: Any, tensors: Mapping[str, np.ndarray], encoder: Mapping[str, np.ndarray]) -> Any:
    """Return the model with the parameters of an adapter that fits it; other arrays are shared."""
    graph, state = nnx.split(model)
    filled = nnx.merge(graph, state)
    for name, tensor in (encoder or {EMBEDDING: tensors[EMBEDDINGS]}).items():
        variable = getattr(filled.prompt, attribute_of(name))
        old = variable.get_value()
        new = tensor.astype(np.float32)
        value = put(new, old.sharding) if isinstance(old, jax.Array) else jnp.asarray(new)
        setattr(filled.prompt, attribute_of(name), nnx.LoRAParam(value))
    return filled


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
