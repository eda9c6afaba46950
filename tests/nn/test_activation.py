"""Gates against NumPy in float64, and what their backward pass keeps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf, expit

from qlora_jax.nn import glu

FUNCTIONS: dict[Any, Any] = {
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.optimised
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_values_and_gradients(name: Any) -> None:
    gate, up, back = np.random.default_rng(0).standard_normal((3, 5, 64)) * 3
    function, step = FUNCTIONS[name], 1e-6
    slope = (function(gate + step) - function(gate - step)) / (2 * step)
    found, pull = jax.vjp(lambda gate, up: glu(name, gate, up), *(jnp.asarray(x, jnp.float32) for x in (gate, up)))
    np.testing.assert_allclose(found, function(gate) * up, atol=1e-5)
    of_gate, of_up = pull(jnp.asarray(back, jnp.float32))
    np.testing.assert_allclose(of_gate, back * up * slope, atol=1e-4)
    np.testing.assert_allclose(of_up, back * function(gate), atol=1e-5)


@pytest.mark.optimised
def test_bfloat16_is_rounded_once() -> None:
    gate, up = (jnp.asarray(x, jnp.bfloat16) for x in np.random.default_rng(0).standard_normal((2, 1000)) * 3)
    exact = FUNCTIONS["silu"](np.asarray(gate, np.float64)) * np.asarray(up, np.float64)
    found = glu("silu", gate, up)
    assert found.dtype == jnp.bfloat16
    assert np.abs(np.asarray(found, np.float64) / exact - 1).max() < 2**-8


def test_the_backward_pass_keeps_what_it_was_given() -> None:
    x = jnp.ones((4, 64), jnp.bfloat16)
    _, pull = jax.vjp(lambda gate, up: glu("silu", gate, up), x, x)
    kept = jax.tree.leaves(pull)
    assert sum(leaf.nbytes for leaf in kept) == 2 * x.nbytes
