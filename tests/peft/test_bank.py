"""A bank of adapters against each adapter alone, on the tiny Llama and T5; what it refuses.

About 8 CPU-seconds, and 8 more in the integration tier.

The single-adapter model is the independent implementation: its own product, its own rank, and PEFT's names of tensors.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiers import tiered

from qlora_jax.adapters.bank import slot_values
from qlora_jax.adapters.bind import adapter_tensors
from qlora_jax.adapters.files import Adapter
from qlora_jax.adapters.metadata import AdapterMetadata
from qlora_jax.errors import QLoRAError, UnsupportedError
from qlora_jax.models import ModelSpec, family_of
from qlora_jax.peft import IA3, LoRA, Method, PromptTuning
from qlora_jax.peft.bank import Bank, check_held, clear_slot, split_bank, write_slot
from qlora_jax.quant import Quantization
from qlora_jax.train import split

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": 97,
        "d_model": 64,
        "d_ff": 64,
        "d_kv": 16,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
}
METHODS = (  # of the slots 1, 2 and 3: rank, scaling and targets differ
    LoRA(rank=4, alpha=8.0),
    LoRA(rank=2, alpha=3.0, use_rslora=True, rank_pattern=(("1.mlp.up_proj", 3),), target_modules=r".*layers.*up_proj"),
    LoRA(rank=3, alpha=6.0, target_modules=r".*(q_proj|o_proj|down_proj|SelfAttention\.v|DenseReluDense\.wo)"),
)


def spec_of(family: str, method: Method) -> ModelSpec:
    config = CONFIGS[family]
    return ModelSpec(family_of(config).config(config), Quantization(), method=method, dtype="float32")


def built(spec: ModelSpec) -> Any:
    """The model with random weights, which are those of the same seed whatever the method is."""
    graph, _ = nnx.split(spec.abstract("cpu"))
    return nnx.merge(graph, jax.jit(lambda: nnx.state(spec.build(nnx.Rngs(0))))())


def adapted(family: str, base: Any, method: LoRA, seed: int) -> Any:
    """The base with one adapter of random values."""
    graph, adapter, frozen = split(built(spec_of(family, method)))
    draws, shared = np.random.default_rng(seed), dict(nnx.to_flat_state(nnx.state(base)))
    own = nnx.from_flat_state([(path, shared.get(path, leaf)) for path, leaf in nnx.to_flat_state(frozen)])
    noise = jax.tree.map(lambda leaf: 0.1 * jnp.asarray(draws.standard_normal(leaf.shape, np.float32)), adapter)
    return nnx.merge(graph, noise, own)


@partial(jax.jit, static_argnums=0)
def logits(graph: Any, state: Any, tokens: jax.Array, ids: jax.Array | None) -> jax.Array:
    model = nnx.merge(graph, state)
    more = (tokens,) if model.config.family == "t5" else ()
    return model(tokens, *more, adapter_ids=ids)


def run(model: Any, tokens: Any, ids: Any = None) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(logits(graph, state, jnp.asarray(tokens), None if ids is None else jnp.asarray(ids, jnp.int32)))


def methods_of(family: str) -> tuple[LoRA, ...]:
    return METHODS if family == "llama" else (METHODS[0], METHODS[2])


@pytest.mark.parametrize("family", tiered(["llama", "t5"], quick=["llama"]))
def test_rows_of_many_adapters_equal_each_adapter_alone(family: str) -> None:
    """Rows in any order, one of them of the bare base; one token a row takes another product than several."""
    base = built(spec_of(family, Bank(slots=5, bank_rank=4)))
    graph, bank, frozen = split_bank(base)
    singles = [adapted(family, base, method, seed) for seed, method in enumerate(methods_of(family))]
    for slot, single in enumerate(singles, start=1):
        values = slot_values(base, Adapter(f"adapter {slot}", single.method, None, adapter_tensors(single)))
        bank = write_slot(bank, slot, values)
    model = nnx.merge(graph, bank, frozen)
    ids = [len(singles), 0, 1, 1, len(singles)]
    for length in (9, 1):
        tokens = np.random.default_rng(length).integers(0, 97, (len(ids), length), np.int32)
        found = run(model, tokens, ids)
        for row, slot in enumerate(ids):
            expected = run(singles[slot - 1] if slot else base, tokens)[row]
            np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=2e-6)
        assert np.abs(found[2] - run(base, tokens)[2]).max() > 0.01
        np.testing.assert_array_equal(run(model, tokens), run(base, tokens))


def test_slots_are_written_and_cleared_by_one_program() -> None:
    base = built(spec_of("llama", Bank(slots=4, bank_rank=4)))
    _, bank, _ = split_bank(base)
    empty = jax.tree.map(np.asarray, bank)
    single = adapted("llama", base, METHODS[0], 0)
    values = slot_values(base, Adapter("one", METHODS[0], None, adapter_tensors(single)))
    before = write_slot._cache_size(), clear_slot._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    for slot in (1, 3, 2):
        bank = write_slot(bank, slot, values)
    for slot in (2, 1):
        bank = clear_slot(bank, slot)
    after = write_slot._cache_size(), clear_slot._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    assert all(new - old <= 1 for new, old in zip(after, before, strict=True))
    for leaf, value, zeros in zip(*map(jax.tree.leaves, (bank, values, empty)), strict=True):
        np.testing.assert_array_equal(leaf[:, 3], value)
        np.testing.assert_array_equal(leaf[:, :3], zeros[:, :3])


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (LoRA(rank=5), "rank 5: its own is 4"),
        (LoRA(rank=2, rank_pattern=(("q_proj", 8),)), "rank 8: its own is 4"),
        (LoRA(rank=2, use_dora=True), "DoRA"),
        (LoRA(rank=2, init_lora_weights="pissa"), "init_lora_weights pissa"),
        (LoRA(rank=2, modules_to_save=("norm",)), "whole parameters .*norm"),
        (LoRA(rank=2, trainable_token_indices=(1,)), "rows of the token embedding"),
        (LoRA(rank=2, bias="all"), "biases"),
        (LoRA(rank=2, lora_bias=True), "biases"),
        (PromptTuning(), "virtual tokens"),
        (IA3(), "the method IA3"),
        (LoRA(rank=9, use_dora=True), "DoRA.*; nor rank 9"),
    ],
)
def test_what_a_bank_cannot_hold_is_refused_by_name(method: Method, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"mine: a bank of adapters cannot hold .*{reason}"):
        check_held("mine", method, 4)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    base = spec_of("llama", Bank(slots=2, bank_rank=4, target_modules=("q_proj", "v_proj"))).abstract("cpu")

    def adapter(shapes: dict[str, tuple[int, int]], method: LoRA = METHODS[0]) -> Adapter:
        tensors = {f"base_model.model.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
        return Adapter("mine", method, None, tensors)

    layer = "model.layers.0.self_attn.q_proj"
    fitting = {f"{layer}.lora_A": (4, 64), f"{layer}.lora_B": (64, 4)}
    assert slot_values(base, adapter(fitting)) is not None
    for shapes, message in (
        ({f"{layer}.lora_A": (4, 32), f"{layer}.lora_B": (64, 4)}, "expected 64 to 64, r <= 4; found"),
        (
            {"model.layers.0.mlp.up_proj.lora_A": (4, 64), "model.layers.0.mlp.up_proj.lora_B": (128, 4)},
            "no place of the bank",
        ),
        ({"model.layers.7.self_attn.q_proj.lora_A": (4, 64), "model.layers.7.self_attn.q_proj.lora_B": (64, 4)}, "no place"),
        (
            {
                "encoder.block.0.layer.0.SelfAttention.q.lora_A": (4, 64),
                "encoder.block.0.layer.0.SelfAttention.q.lora_B": (64, 4),
            },
            "of a llama model",
        ),
        ({f"{layer}.lora_A": (4, 64)}, "expected lora_A and lora_B"),
    ):
        with pytest.raises(QLoRAError, match=message):
            slot_values(base, adapter(shapes))
    for metadata, message in (
        (AdapterMetadata(None, "chat"), "another base: linear layers"),
        (AdapterMetadata(Quantization(), "chat", converted_from="pissa"), "init_lora_weights pissa"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            slot_values(base, adapter(fitting), metadata)
