"""What happens before a server says that it serves: the trial of the fused product (one CPU second, nothing compiles)."""

import jax.numpy as jnp
import pytest
from flax import nnx

from qlora_jax.models import CausalLM, family_of
from qlora_jax.quant import Quantization, kernels, targets
from qlora_jax.quant.kernels import trial
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.scheduler import Limits

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}


class _Tried(Exception):
    pass


def test_the_fused_product_is_tried_while_programs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the chunk of a server, whose rows are many, on a machine that takes itself for one with a Hopper GPU."""

    def is_right(kind: str) -> bool:
        raise _Tried(kind)

    config = family_of(LLAMA).config(LLAMA)
    model = CausalLM(config, quantization=Quantization(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # type: ignore[arg-type]
    monkeypatch.setattr(trial, "is_right", is_right)
    for module in (kernels, targets):
        monkeypatch.setattr(module, "has_hopper", lambda: True)
    monkeypatch.setattr(kernels, "on_one_device", lambda: True)
    engine = Engine(*nnx.split(model), limits=Limits(rows=1, capacity=256), vocabulary=64)
    with pytest.raises(_Tried):
        engine.warm_up()
