"""A base whose layers an adapter repeats (PEFT's `layer_replication`): the model is made of ranges of the base's layers.

    layer_replication [[0, 4], [2, 5]]    layers 0 1 2 3 2 3 4 of the base are layers 0 1 2 3 4 5 6 of the model

Each layer of the model has an adapter of its own. The weights of a layer that is repeated are loaded for each place.
"""

import re
from typing import Any

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError, UnsupportedError
from qlora_jax.models import DecoderConfig
from qlora_jax.peft import Method

__all__ = ["with_replicated_layers"]

_LAYER = re.compile(r"(?P<before>.*\.layers)\.(?P<layer>\d+)\.(?P<after>.*)")
_MOST_LAYERS = 4096


def with_replicated_layers(checkpoint: Checkpoint, method: Method | None) -> Checkpoint:
    """Return the checkpoint with the layers that a method's `layer_replication` describes; without one, as it is.

    Raises:
        CheckpointError: a range beyond the layers of the base.
        UnsupportedError: the model is not decoder-only.
    """
    if method is None or not method.layer_replication:
        return checkpoint
    if not isinstance(checkpoint.model_config, DecoderConfig):
        raise UnsupportedError(f"layer_replication: expected a decoder-only model, found {checkpoint.model_config.family}")
    layers = checkpoint.model_config.num_hidden_layers
    beyond = [pair for pair in method.layer_replication if pair[1] > layers]
    if beyond or sum(end - start for start, end in method.layer_replication) > _MOST_LAYERS:
        raise CheckpointError(
            f"{checkpoint.name}: layer_replication: expected ranges of its {layers} layers, found {method.layer_replication}"
        )
    sources = [layer for start, end in method.layer_replication for layer in range(start, end)]
    stored: dict[str, str] = {}
    for name in checkpoint.shapes:
        match = _LAYER.fullmatch(name)
        if match is None:
            stored[name] = name
            continue
        for layer, source in enumerate(sources):
            if source == int(match["layer"]):
                stored[f"{match['before']}.{layer}.{match['after']}"] = name
    config: dict[str, Any] = checkpoint.config | {"num_hidden_layers": len(sources)}
    if isinstance(types := config.get("layer_types"), list) and len(types) == layers:
        config["layer_types"] = [types[source] for source in sources]
    return checkpoint.renamed(stored, config)
