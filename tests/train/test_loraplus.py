"""LoRA+ against the plain rules with either learning rate. (PEFT's create_loraplus_optimizer is compared with in
test_parity.py.)"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.train import OPTIMIZERS, OptimizerName, host_offload, optimizer


class TwoLayers(nnx.Module):
    """A stack of two layers, a norm for each, and one beside them."""

    def __init__(self) -> None:
        draws = np.random.default_rng(0)

        def parameter(*shape: int) -> nnx.LoRAParam:
            return nnx.LoRAParam(jnp.asarray(draws.standard_normal(shape), jnp.float32))

        self.layers = nnx.Dict(lora_a=parameter(2, 80, 64), lora_b=parameter(2, 64, 80), norm=parameter(2, 7))
        self.norm, self.rows = parameter(7), parameter(5, 7)


@pytest.mark.parametrize("host", [None, "state", "all"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loraplus_scales_the_updates_of_b_and_vectors(name: OptimizerName, host: str | None) -> None:
    """Against the plain rule with either learning rate, weight decay included."""
    params = nnx.state(TwoLayers(), nnx.LoRAParam)
    gradient = jax.tree.map(lambda leaf: jnp.sin(3 * leaf), params)

    def step(rate: float, ratio: float | None) -> Any:
        tx = optimizer(name, rate, weight_decay=0.1, max_grad_norm=None, loraplus_lr_ratio=ratio)
        if host is None:
            return jax.jit(lambda: optax.apply_updates(params, tx.update(gradient, tx.init(params), params)[0]))()
        offloaded = host_offload(tx, adapter=host == "all")
        return jax.jit(lambda: offloaded.apply(gradient, offloaded.init(params), params)[0])()

    slow, fast, found = (nnx.to_pure_dict(step(*arguments)) for arguments in ((1e-2, None), (0.16, None), (1e-2, 16.0)))
    for path in (("layers", "lora_a"), ("layers", "lora_b"), ("layers", "norm"), ("norm",), ("rows",)):
        expected, value = (fast if path[-1] in ("lora_b", "norm") else slow), found
        for part in path:
            expected, value = expected[part], value[part]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_a_ratio_of_loraplus_that_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="loraplus_lr_ratio: expected a number above 0"):
        optimizer("adamw", 1e-3, loraplus_lr_ratio=ratio)
