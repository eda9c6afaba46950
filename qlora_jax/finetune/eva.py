"""Initialises an adapter by EVA (peft/eva.py), from batches of the run's own training data.

A second model records the inputs of each layer. It is the loaded model with other adapters, and shares all frozen weights.
Its batches have the size of a step's micro-batches and come in the run's order, until the directions of every layer no
longer change, but no more than 32 batches.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from qlora_jax.errors import DataError
from qlora_jax.models import Model, linear_mappings
from qlora_jax.nn import AdapterConstant, Linear, WeightConstant, abstract_module, put, to_numpy
from qlora_jax.peft import LoRA, LowRankAdapter
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
    """Return the model whose A matrices are the main directions of their layers' inputs. The model is changed in place.

    Args:
        model: a loaded model, with the method `lora`.
        build: makes the same model with another method of fine-tuning; it is traced without memory.
        loss: the loss of a batch; tokens on which it does not depend do not count.
        batches: at most `most` of them are read.
        progress: whether to show a progress bar.

    Raises:
        DataError: there are fewer tokens than the rank.
        ValueError: the rank is higher than the number of a layer's inputs.
    """
    collection = EVA(lora)  # pyright: ignore[reportAbstractUsage]  # not a whole method: it has what models ask for
    graph, watches, _ = nnx.split(abstract_module(lambda: build(collection)), nnx.LoRAParam, ...)
    watches = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), watches)
    _, _, _, frozen = nnx.split(model, nnx.LoRAParam, (AdapterConstant, WeightConstant), ...)

    @jax.jit
    def look(watches: Any, frozen: Any, batch: Batch) -> Any:
        def loss_of(watches: Any) -> Any:
            result = loss(nnx.merge(graph, watches, frozen), batch, None)
            return result[0] if isinstance(result, tuple) else result

        return jax.grad(loss_of)(watches)  # the next values of the records: see peft/eva.py

    for number, batch in enumerate(tqdm(itertools.islice(batches, most), desc="EVA", leave=False, disable=not progress)):
        watches = look(watches, frozen, batch)
        if number and converged(watches):
            break
    ranks = max(lora.rank, *(rank for _, rank in lora.rank_pattern), 0)
    if (seen := tokens_seen(watches)) < ranks:
        raise DataError(f"init_lora_weights eva: expected at least {ranks} tokens of training data, found {seen}")
    found = nnx.merge(graph, watches, frozen)
    for mapping in linear_mappings(model.config.parameter_mappings):
        layer, watch = _at(model, mapping.path[:-1]), _at(found, mapping.path[:-1]).adapter
        adapter = layer.adapter if isinstance(layer, Linear) else None
        if isinstance(adapter, LowRankAdapter) and isinstance(watch, InputStatistics):
            a = to_numpy(jnp.swapaxes(unit_directions(watch.directions[...]), -1, -2)).copy()
            for number, rank in enumerate(adapter.spec.ranks):
                a[number, :, rank:] = 0
            adapter.lora_a.set_value(put(a, adapter.lora_a.get_value().sharding))
    return model


def _at(module: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        module = getattr(module, name)
    return module
