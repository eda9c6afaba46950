"""Which layers an adapter's targets select, and which descriptions of an adapter are refused. (PEFT's own
matching is compared with ours in tests/adapters/test_bind.py.) The integration test takes 3 CPU seconds."""

import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.nn import Linear
from qlora_jax.peft import LoRA, LoRALinear, LoRASpec, lora_update, module_matches
from qlora_jax.peft.lora_linear import init_lora_a
from qlora_jax.plan import machine_mesh, machine_named
from qlora_jax.plan.compile import COMPILER_OPTIONS, place
from qlora_jax.plan.topology import context
from qlora_jax.quant import Quantization
from qlora_jax.quant.targets import tracing_for

LAYERS = {
    f"layers.{name}": [f"model.layers.{layer}.{name}" for layer in range(12)]
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
}

SLOTS = ((1, 2.0), (0, 0.0), (3, 0.5))  # ranks and scalings
STACK = LoRASpec((1, 0, 3), (2.0, 0.0, 0.5), 0.0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"}),
        (("q_proj", "mlp.down_proj"), {"self_attn.q_proj", "mlp.down_proj"}),
        ((r"self_attn.v_proj",), {"self_attn.v_proj"}),
        (r".*\.(q|v)_proj", {"self_attn.q_proj", "self_attn.v_proj"}),
        (r"model\.layers\.\d+\.mlp\.down_proj", {"mlp.down_proj"}),
    ],
)
def test_stacked_layers_that_are_selected(targets: str | tuple[str, ...], expected: set[str]) -> None:
    slots = LoRA(rank=3, alpha=6, target_modules=targets).targets(LAYERS)
    assert slots == {f"layers.{name}": LoRASpec((3,) * 12, (2.0,) * 12, 0.0) for name in expected}


@pytest.mark.parametrize("targets", [("q_proj", "k_proj"), ("proj",), "q_proj", r"q_proj|.*k_proj"])
def test_a_target_that_matches_nothing_is_an_error(targets: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="matches no linear layer; their names end in: down_proj, q_proj, v_proj"):
        LoRA(target_modules=targets).targets(LAYERS)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(("model.layers.1.mlp.down_proj",), {1}), (r"model\.layers\.1\d?\.mlp.*", {1, 10, 11})],
)
def test_some_layers_of_a_stack(targets: str | tuple[str, ...], expected: set[int]) -> None:
    slots = LoRA(rank=4, alpha=2, target_modules=targets).targets(LAYERS)
    ranks = tuple(4 if layer in expected else 0 for layer in range(12))
    assert slots == {"layers.mlp.down_proj": LoRASpec(ranks, tuple(rank / 8 for rank in ranks), 0.0)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude_modules": ("o_proj",)}, "exclude_modules 'o_proj' matches no linear layer"),
        ({"exclude_modules": r".*"}, r"exclude_modules '\.\*': nothing is left of"),
        ({"layers_to_transform": (3, 12)}, "no linear layer among the targets is in layer 12"),
        ({"layers_to_transform": (3,), "layers_pattern": ("h",)}, "no linear layer among the targets is in layer 3"),
        ({"rank_pattern": (("o_proj", 3),)}, "rank_pattern 'o_proj' matches no linear layer that gets an adapter"),
        ({"alpha_pattern": (("v_proj", 3),), "exclude_modules": ("v_proj",)}, "alpha_pattern 'v_proj' matches no"),
    ],
)
def test_what_has_no_effect_is_an_error(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**fields).targets(LAYERS)


def test_a_name_in_a_list_is_no_regular_expression() -> None:
    assert not module_matches(LoRA(target_modules=("q.proj",)), "model.layers.0.q_proj")
    assert module_matches(LoRA(target_modules=("q_proj",)), "q_proj")
    assert not module_matches(LoRA(target_modules=("q_proj",)), "model.layers.0.eq_proj")


def test_padding_changes_nothing_and_has_no_gradient() -> None:
    """A stack of three layers of ranks 1, 0 and 3 against those layers alone, even with noise in the padding."""
    draws = np.random.default_rng(0)
    x, a, b = (jnp.asarray(draws.standard_normal(shape, np.float32)) for shape in ((5, 8), (3, 8, 3), (3, 3, 6)))

    def run(a: jax.Array, b: jax.Array) -> jax.Array:
        layers = [lora_update(x, a[i], b[i], jnp.asarray(STACK.factors())[i]) for i in range(3)]
        return jnp.stack(layers)

    expected = [s * np.asarray(x) @ np.asarray(a[i, :, :r]) @ np.asarray(b[i, :r]) for i, (r, s) in enumerate(SLOTS)]
    np.testing.assert_allclose(run(a, b), expected, atol=1e-5)
    for gradient, axis in zip(jax.grad(lambda a, b: (run(a, b) ** 2).sum(), (0, 1))(a, b), (1, 0), strict=True):
        for layer, (rank, _) in enumerate(SLOTS):
            used, padding = np.split(np.asarray(gradient[layer]), [rank], axis)
            assert np.all(padding == 0)
            assert np.all(used != 0)


def test_a_stack_starts_with_zeros_in_the_padding() -> None:
    for layer, (rank, _) in enumerate(SLOTS):
        made = Linear(8, 6, adapter=STACK, layer=layer, rngs=nnx.Rngs(layer))
        assert isinstance(made.adapter, LoRALinear)
        assert np.all(np.asarray(made.adapter.lora_a[...])[:, :rank] != 0)
        assert np.all(np.asarray(made.adapter.lora_a[...])[:, rank:] == 0)


def test_scaling() -> None:
    assert LoRA(rank=64, alpha=16).scaling == 0.25
    assert LoRA(rank=64, alpha=16, use_rslora=True).scaling == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank: expected at least 1, found 0"),
        ({"alpha": 0}, "alpha: expected a number above 0, at most 1e\\+06, found 0"),
        ({"alpha": math.nan}, "alpha: expected a number above 0, at most 1e\\+06, found nan"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, found 1.0"),
        ({"target_modules": ()}, "target_modules: expected names"),
        ({"rank_pattern": (("q", 0),)}, "rank_pattern 'q': expected at least 1, found 0"),
        ({"alpha_pattern": (("q", -1),)}, "alpha_pattern 'q': expected a number above 0, at most 1e\\+06, found -1"),
        ({"rank_pattern": (("q(", 2),)}, r"rank_pattern 'q\(': no regular expression"),
        ({"rank_pattern": (("q", 2), ("q", 3))}, "rank_pattern: expected each pattern once, found 'q' twice"),
        ({"layers_to_transform": (1,), "target_modules": "q"}, "layers_to_transform: expected names as target_modules"),
        ({"layers_to_transform": (-1,)}, "layers_to_transform: expected numbers from 0 on"),
        ({"layers_pattern": ("h",)}, "expected layers_to_transform beside it"),
    ],
)
def test_refused_descriptions(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def test_initial_a_is_kaiming_uniform() -> None:
    torch = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    theirs = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5))
    ours = np.asarray(init_lora_a(jax.random.key(0), 400, 64))
    assert ours.shape == (400, 64)
    assert np.abs(ours).max() == pytest.approx(float(theirs.abs().max()), rel=1e-3)
    assert ours.std() == pytest.approx(float(theirs.std()), rel=0.02)
    assert abs(ours.mean()) < 1e-3


@pytest.mark.integration
@pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="JAX's CUDA plugin is not installed",
)
def test_cublas_adds_the_update_inside_the_products_epilogue() -> None:
    """On GPUs: y = x W + (h B) in place of h B, so that the sum takes no pass over memory of its own."""
    machine = machine_named("h100")
    mesh = machine_mesh(machine)
    layer = nnx.eval_shape(
        lambda: Linear(256, 512, quantization=Quantization(), adapter=LoRA(16), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graph, state = nnx.split(layer)
    x = jax.ShapeDtypeStruct((4096, 256), jnp.bfloat16)
    with context(mesh), tracing_for("cuda"):
        program = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).trace(*place((state, x), mesh, P()))
        options: Any = COMPILER_OPTIONS["cuda"] | {"xla_gpu_enable_triton_gemm": False}
        text = program.lower(lowering_platforms=("cuda",)).compile(options).as_text()
    betas = re.findall(r'"beta":(\d)', text)
    assert sorted(betas) == ["0", "0", "1"]  # x A, h B, and x W with the sum
