"""The layers of a model as one module whose parameters are stacked along a first axis.

The constructor is mapped with `jax.vmap`, and `jax.lax.scan` runs the layers, so that compiling a model of 80 layers takes
as long as compiling one layer.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from qlora_jax.models.parameter_mapping import ParameterMapping, linear_mappings, linear_modules
from qlora_jax.nn import gather
from qlora_jax.nn.mesh import devices_of_context
from qlora_jax.quant import MixedStack, MixedTensor, Quantization, QuantizedTensor, index_in_stack, mixed_stack

Remat = Literal["none", "dots", "full", "offload"]
Layer = TypeVar("Layer", bound=nnx.Module)


def stack(make_layer: Callable[[nnx.Rngs, Array], Layer], layers: int, rngs: nnx.Rngs) -> Layer:
    """Return a module that holds `layers` layers.

    Args:
        make_layer: creates a layer from random number generators and its index, int32 scalar.
        layers: number of layers.
        rngs: random number generators; the stream `params` is split over the layers.
    """
    graph: Any = None

    def make(key: Array, layer: Array) -> Any:
        nonlocal graph
        graph, state = nnx.split(make_layer(nnx.Rngs(key), layer))
        return state

    states = jax.vmap(make)(jax.random.split(rngs.params(), layers), jnp.arange(layers))
    return nnx.merge(graph, states)


def rematerialise(run_layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Wrap the body of a scan over layers in `jax.checkpoint` with a policy for the residuals that are saved.

    "full" saves only the inputs of the layers, "offload" saves them in host memory, "dots" also saves the results of all
    products, "none" saves everything. The body must name the inputs "residual".
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
    """Return, for decoding, the part of stacked `layers` to scan over, and a function (its slice, index) -> layer's state.

    On one device, 4-bit matrices remain in their stacks, because kernels can read one layer of a stack without a copy, and
    so do the slots of a bank of adapters. On several devices, a layer's leaves are sliced and gathered.
    """
    if devices_of_context() > 1:
        scanned, layer_of = index_in_stack(layers, packed=False)
        return scanned, lambda state, index: gather(_sliced(layer_of(state, index)))
    return index_in_stack(layers, slots=True)


def scanned_layers(layers: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return, for training, what to scan over for stacked `layers`, and a function from its slice to one layer's state.

    On one device, 4-bit matrices remain in their stacks as in `by_layer`. On several devices a layer's leaves are sliced, so
    that they can be gathered; stacks of mixed storage (`quant.mixed`), which a scan cannot slice, are indexed and then
    sliced.
    """
    several = devices_of_context() > 1
    if several and not any(_is_mixed(leaf) for leaf in jax.tree.leaves(layers, is_leaf=_is_mixed)):
        return layers, lambda state: state
    scanned, layer_of = index_in_stack(layers, packed=not several)
    count = next(leaf.shape[0] for leaf in jax.tree.leaves(layers, is_leaf=_is_mixed))

    def layer(part: tuple[Any, Array]) -> Any:
        state = layer_of(*part)
        return _sliced(state) if several else state

    return (scanned, jnp.arange(count)), layer


def storage_by_stack(
    mappings: Sequence[ParameterMapping], quantization: Quantization | None, dense: Collection[str], *, mixed: bool = True
) -> dict[str, Quantization | None]:
    """Return the storage of each stack of linear layers, by the keys of `linear_modules`; None: dense.

    Args:
        dense: the full names of the linear modules that stay dense.
        mixed: whether a stack of which some layers are dense is stored in 4 bits (`with_dense_layers`); otherwise all of its
            layers are dense.
    """
    found = {}
    for key, names in linear_modules(mappings).items():
        kept = [name in dense for name in names]
        found[key] = None if all(kept) or (any(kept) and not mixed) else quantization
    return found


def with_dense_layers(module: Any, mappings: Sequence[ParameterMapping], dense: Collection[str]) -> None:
    """Make the stacks of 4-bit matrices of a module under construction mixed, where some of their layers stay dense.

    Args:
        dense: the full names of the linear modules that stay dense.
    """
    for mapping in linear_mappings(mappings):
        layers = [layer for layer, name in enumerate(mapping.modules()) if name in dense]
        if not layers:
            continue
        owner = module
        for name in mapping.path[:-1]:
            owner = getattr(owner, name)
        if isinstance(owner.weight.get_value(), QuantizedTensor):
            owner.weight.set_value(mixed_stack(owner.weight.get_value(), layers))


def _is_mixed(leaf: Any) -> bool:
    return isinstance(leaf, MixedStack)


def _sliced(state: Any) -> Any:
    """Return a layer's state whose mixed matrices are stacks of one matrix of either kind, which can be gathered."""

    def slice_of(leaf: Any) -> Any:
        if not isinstance(leaf, MixedTensor):
            return leaf
        quantized, packed, dense = leaf.parts()
        one = jax.tree.map(lambda part: part[None], packed)
        return MixedTensor(MixedStack(one, dense[None], (0, -1)), jnp.where(quantized, 0, 1))

    return jax.tree.map(slice_of, state, is_leaf=lambda leaf: isinstance(leaf, MixedTensor))
