"""Virtual tokens (peft.prompt) between a model and its files:

    adapter_model.safetensors      prompt_embeddings [rows, features]: what the model reads, as PEFT writes it
    prompt_encoder.safetensors     the parameters of the encoder that made it, by the names of PEFT's modules, where there
                                   is one: what training goes on from

PEFT writes no encoder. An adapter without one is loaded as its values, and training goes on with these themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from qlora_jax.errors import CheckpointError
from qlora_jax.peft import Method, Prompt, PromptMethod
from qlora_jax.peft.prompt import EMBEDDING, EMBEDDINGS, attribute_of

__all__ = ["ENCODER", "encoder_tensors", "fill_prompt", "prompt_problems", "prompt_tensors", "read_encoder", "with_encoder"]

ENCODER = "prompt_encoder.safetensors"
TOLERANCE = 1e-3  # between what an encoder makes here and what was written


def prompt_tensors(prompt: Prompt) -> dict[str, np.ndarray]:
    """What PEFT's file holds."""
    return {EMBEDDINGS: np.asarray(jax.device_get(prompt()), np.float32)}


def encoder_tensors(prompt: Prompt) -> dict[str, np.ndarray]:
    """The parameters of the encoder; none where the values themselves train."""
    if prompt.names == (EMBEDDING,):
        return {}
    values = {name: jax.device_get(getattr(prompt, attribute_of(name))[...]) for name in prompt.names}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}


def with_encoder(method: Method, folder: Path) -> Method:
    """The method of a configuration, without an encoder if the folder has none."""
    if not isinstance(method, PromptMethod) or (folder / ENCODER).is_file():
        return method
    return cast(Method, method.projected())


def read_encoder(method: Method, folder: Path, values: np.ndarray | None, source: str) -> dict[str, np.ndarray]:
    """The encoder of an adapter, none where the folder has none.

    Args:
        values: what it made.
        source: names the folder in messages.

    Raises:
        CheckpointError: it is damaged, or did not make these values.
    """
    file = folder / ENCODER
    if not isinstance(method, PromptMethod) or not file.is_file():
        return {}
    try:
        tensors = safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{source}: {ENCODER} is damaged: {error}.") from error
    try:
        made = np.asarray(method.encode({name: jnp.asarray(tensor) for name, tensor in tensors.items()}))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {ENCODER}: expected the encoder of the configuration: {error!r}.") from error
    if values is not None and (made.shape != values.shape or not np.allclose(made, values, TOLERANCE, TOLERANCE)):
        raise CheckpointError(
            f"{source}: {ENCODER} does not make the values of {EMBEDDINGS}: delete it to go on from these alone."
        )
    return tensors


def prompt_problems(prompt: Prompt, tensors: Mapping[str, np.ndarray], encoder: Mapping[str, np.ndarray]) -> list[str]:
    """What keeps an adapter from being that of a model with this prompt, which may be abstract."""
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
    """The same model with the parameters of an adapter that fits; other arrays are shared."""
    graph, state = nnx.split(model)
    filled = nnx.merge(graph, state)
    for name, tensor in (encoder or {EMBEDDING: tensors[EMBEDDINGS]}).items():
        variable = getattr(filled.prompt, attribute_of(name))
        old = variable.get_value()
        new = tensor.astype(np.float32)
        value = jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else jnp.asarray(new)
        setattr(filled.prompt, attribute_of(name), nnx.LoRAParam(value))
    return filled


def _shown(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
