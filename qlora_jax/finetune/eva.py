"""EVA's start of an adapter (peft/eva.py), from batches of the run's own training data.

The watching model is the loaded one with other adapters: it shares all frozen weights. Batches are those of a step's
micro-batches, in the run's order, until the directions of every layer stay as they are, but no more than 32.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from qlora_jax.models import Model, linear_mappings
from qlora_jax.nn import AdapterConstant, Linear, WeightConstant
from qlora_jax.peft import DoRALinear, LoRA, LoRALinear
from qlora_jax.peft.eva import EVA, InputStatistics, converged, tokens_seen, unit_directions
from qlora_jax.train import LossFunction

MOST_BATCHES = 32
AnyModel = TypeVar("AnyModel", bound=Model)
Batch = dict[str, Any]


def start_from_inputs(
    model: AnyModel,
    build: Callable[[Any], Any],
    lora: LoRA,
    loss: LossFunction,
    batches: Iterable[Batch],
    *,
    most: int = MOST_BATCHES,
    progress: bool = True,
) -> AnyModel:
    """The model with the main directions of each adapted layer's inputs as its A.

    Args:
        model: loaded, with `lora`.
        build: a method of fine-tuning to the same model anew, to be traced without memory.
        loss: of a batch; tokens on which it does not depend do not count.
        batches: at most `most` of them are looked at.

    Raises:
        ValueError: fewer tokens than the rank, or a rank above a layer's inputs.
    """
    graph, watches, _ = nnx.split(nnx.eval_shape(lambda: build(EVA(lora))), nnx.LoRAParam, ...)
    watches = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), watches)
    _, _, _, frozen = nnx.split(model, nnx.LoRAParam, (AdapterConstant, WeightConstant), ...)

    @jax.jit
    def look(watches: Any, frozen: Any, batch: Batch) -> Any:
        def loss_of(watches: Any) -> Any:
            result = loss(nnx.merge(graph, watches, frozen), batch, None)
            return result[0] if isinstance(result, tuple) else result

        return jax.grad(loss_of)(watches)  # the watches' next values: peft/eva.py

    for number, batch in enumerate(tqdm(itertools.islice(batches, most), desc="EVA", leave=False, disable=not progress)):
        watches = look(watches, frozen, batch)
        if number and converged(watches):
            break
    ranks = max(lora.rank, *(rank for _, rank in lora.rank_pattern), 0)
    if (seen := tokens_seen(watches)) < ranks:
        raise ValueError(f"init_lora_weights eva: expected at least {ranks} tokens of training data, found {seen}")
    found = nnx.merge(graph, watches, frozen)
    for key in linear_mappings(model.config.parameter_mappings):
        layer, watch = _at(model, key.path[:-1]), _at(found, key.path[:-1]).adapter
        adapter = layer.adapter if isinstance(layer, Linear) else None
        if isinstance(adapter, LoRALinear | DoRALinear) and isinstance(watch, InputStatistics):
            a = np.array(jnp.swapaxes(unit_directions(watch.directions[...]), -1, -2))
            for number, rank in enumerate(adapter.spec.ranks):
                a[number, :, rank:] = 0
            adapter.lora_a.set_value(jax.device_put(a, adapter.lora_a.get_value().sharding))
    return model


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module
