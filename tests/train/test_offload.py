"""Optimizers in host memory against the same ones on the device: numbers, places, and gradients that are gathered there."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import tiered

from qlora_jax.train import OPTIMIZERS, Optimizer, OptimizerName, host_offload, optimizer
from qlora_jax.train.offload import host_add, host_gradient, host_zeros, memory_kinds

# Two stacks of unlike depth, a matrix and a vector; of each layer, as much as 8-bit Adam quantises.
SHAPES = {"a": (3, 64, 64), "b": (2, 64, 128), "c": (3, 128, 64), "matrix": (64, 96), "vector": (4096,)}


def draw(step: int) -> dict[str, jax.Array]:
    draws = np.random.default_rng(step)
    return {name: jnp.asarray(draws.standard_normal(shape), jnp.float32) for name, shape in SHAPES.items()}


def kinds_of(tree: Any) -> list[str]:
    return [leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)]


def in_host_memory(tree: Any) -> Any:
    return jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("pinned_host"), tree))


@pytest.mark.parametrize(
    ("name", "adapter"),
    tiered(
        itertools.product(OPTIMIZERS, (False, True)),
        quick=[("adamw", False), ("adafactor", False), ("lion", True)],
    ),
)
def test_the_numbers_are_those_of_the_device(name: OptimizerName, adapter: bool) -> None:
    tx = optimizer(name, 1e-2, weight_decay=0.1)
    offloaded = host_offload(tx, adapter=adapter)
    expected, found = draw(100), draw(100)
    state, update = jax.jit(tx.init)(expected), jax.jit(tx.update)
    host_state = jax.jit(offloaded.init)(found)
    if adapter:
        found = in_host_memory(found)
    apply = jax.jit(offloaded.apply)
    for step in range(3):
        gradient = draw(step)
        updates, state = update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
        found, host_state, norm = apply(in_host_memory(gradient) if adapter else gradient, host_state, found)
        np.testing.assert_allclose(norm, optax.tree.norm(gradient), rtol=1e-6)
    assert kinds_of(host_state) == jax.tree.leaves(memory_kinds(host_state))
    large = [leaf for leaf in jax.tree.leaves(host_state) if leaf.size >= 3 * 128]
    assert {leaf.sharding.memory_kind for leaf in large} <= {"pinned_host"}  # Adafactor has no large ones
    assert set(kinds_of(found)) == {"pinned_host" if adapter else "device"}
    for leaf, value, start in zip(*(tree.values() for tree in (found, expected, draw(100))), strict=True):
        np.testing.assert_allclose(leaf, value, atol=1e-6)
        assert (np.asarray(leaf) != np.asarray(start)).all()


def test_gradients_are_gathered_in_host_memory() -> None:
    x, params = (
        jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32),
        {
            "w": jnp.asarray(np.random.default_rng(2).standard_normal((3, 8, 8)), jnp.float32),
            "b": jnp.arange(8.0),
        },
    )

    def function(params: Any) -> tuple[jax.Array, str]:
        def layer(x: jax.Array, w: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(x @ w[...]), None

        y, _ = jax.lax.scan(jax.checkpoint(layer), x, params["w"])
        return (y * params["b"][...]).sum(), x.sum()

    @jax.jit
    def twice(params: Any) -> tuple[Any, Any]:
        gradient, more = host_gradient(function, params)
        return host_add(host_add(host_zeros(params), gradient), gradient), more

    found, more = twice(in_host_memory(params))
    expected, _ = jax.grad(function, has_aux=True)(params)
    assert set(kinds_of(found)) == {"pinned_host"}
    np.testing.assert_allclose(more, x.sum(), rtol=1e-4)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], 2 * value, rtol=1e-5, atol=1e-6)


def test_a_bare_optax_transformation_is_an_error() -> None:
    """It may look at the whole gradient, as clipping does, where a layer at a time is updated."""
    with pytest.raises(ValueError, match="host_offload: expected an Optimizer"):
        host_offload(optax.adam(1e-3))  # type: ignore[arg-type]
    assert host_offload(Optimizer(optax.adam(1e-3))).tx.max_grad_norm is None
