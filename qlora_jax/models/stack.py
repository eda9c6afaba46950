"""Layers as one module whose parameters are stacked along a first axis.

They are made by `jax.vmap` over the constructor and run by `jax.lax.scan`, so that a model of 80 layers compiles like one of
a single layer.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.nn import gather
from qlora_jax.nn.parallel import devices_of_context
from qlora_jax.quant import keep_stacked

Remat = Literal["none", "dots", "full", "offload"]
Layer = TypeVar("Layer", bound=nnx.Module)


def stack(make_layer: Callable[[nnx.Rngs, Array], Layer], layers: int, rngs: nnx.Rngs) -> Layer:
    """A module that holds `layers` layers, each made with random keys of its own and its number, int32 scalar."""
    graph: Any = None

    def make(key: Array, layer: Array) -> Any:
        nonlocal graph
        graph, state = nnx.split(make_layer(nnx.Rngs(key), layer))
        return state

    states = jax.vmap(make)(jax.random.split(rngs.params(), layers), jnp.arange(layers))
    return nnx.merge(graph, states)


def rematerialise(run_layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of a scan over layers whose backward pass recomputes what `remat` says.

    "full" keeps only the inputs of the layers, "offload" keeps them in host memory (under the name "residual"), "dots" keeps
    the results of all products, "none" keeps everything. The layer names its inputs "residual".
    """
    match remat:
        case "none":
            return run_layer
        case "full":
            policy = jax.checkpoint_policies.save_only_these_names("residual")
            return jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
        case "dots":
            policy = jax.checkpoint_policies.save_only_these_names("residual", "linear", "lora", "attention")
            return jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
        case "offload":
            policy = jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=[],
                names_which_can_be_offloaded=["residual"],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return jax.checkpoint(run_layer, policy=policy, prevent_cse=False)


def by_layer(layers: Any) -> tuple[Any, Callable[[Any, Array], Any]]:
    """For decoding: what of the stacked `layers` to scan over, and a layer from its share and its number.

    On one device matrices in 4 bits stay in their stacks, where kernels read them without a copy; on several, a layer's
    leaves are cut out and gathered.
    """
    if devices_of_context() > 1:
        return layers, lambda state, _: gather(state)
    return keep_stacked(layers)
