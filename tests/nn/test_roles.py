"""The partition specs that follow from the roles of matrices; no devices are needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.roles import adapter_spec, frozen_specs, layer_specs, role_of, with_layout
from qlora_jax.quant import MixedStack, QuantizedTensor, quantize

LAYERS = 2


def stack(rows: int, columns: int, block_size: int = 64) -> Any:
    """The shapes of a stack of 4-bit matrices."""
    return jax.eval_shape(lambda: quantize(jnp.zeros((LAYERS, rows, columns)), "nf4", block_size))


def names(module: str, attribute: str = "weight") -> tuple[str, ...]:
    return ("layers", "mlp", module, attribute)


def test_an_output_matrix_is_split_along_its_columns() -> None:
    q = stack(512, 256)
    specs = layer_specs(names("gate_proj"), q, 4)
    columns = P(None, None, "tensor")
    assert (specs.codes, specs.scales) == (columns, columns)
    assert specs.scale_absmax == P(None, "tensor")  # 8 x 64 blocks on a device are two complete groups of 256
    assert specs.scale_offset == P()
    stored = frozen_specs(names("gate_proj"), q, 2, 4)
    assert stored.codes == P(None, "fsdp", "tensor")


def test_groups_that_would_be_split_stay_whole() -> None:
    q = stack(64, 256)  # 64 blocks on each of 4 devices, a quarter of a group
    specs = layer_specs(names("q_proj"), q, 4)
    assert specs.codes == P(None, None, "tensor")
    assert specs.scale_absmax == P()


def test_an_input_matrix_is_split_along_its_rows_if_it_is_packed_in_parts() -> None:
    q = stack(512, 256)
    assert layer_specs(names("down_proj"), q, 4).codes == P()
    q = with_layout(names("down_proj"), q, 4)
    assert q.parts == 4
    specs = layer_specs(names("down_proj"), q, 4)
    assert (specs.codes, specs.scales, specs.scale_absmax) == (P(None, "tensor"), P(None, "tensor"), P())
    assert frozen_specs(names("down_proj"), q, 2, 4).codes == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize("rows", [320, 512 + 32])
def test_a_shard_splits_no_block(rows: int) -> None:
    """Five blocks are not to be had in four parts; and rows that are no whole blocks have the flat layout."""
    q = with_layout(names("down_proj"), stack(rows, 256), 4)
    assert q.parts == 1
    specs = layer_specs(names("down_proj"), q, 4)
    assert {specs.codes, specs.scales} == {P()}


def test_whole_matrices_are_stored_in_parts_over_both_axes() -> None:
    q = stack(512, 256)
    assert layer_specs(names("gate_up_proj"), q, 2).codes == P()
    assert frozen_specs(names("gate_up_proj"), q, 2, 2).codes == P(None, ("fsdp", "tensor"))
    mixed = MixedStack(q, jax.ShapeDtypeStruct((1, 512, 256), jnp.float32), (0, 1, -1))
    assert layer_specs(names("gate_proj"), mixed, 2).packed.codes == P()


def test_without_a_tensor_axis_weights_are_stored_as_over_one_axis() -> None:
    q: QuantizedTensor = with_layout(names("down_proj"), stack(512, 256), 1)
    assert q.parts == 1
    stored = frozen_specs(names("down_proj"), q, 8, 1)
    assert (stored.codes, stored.scales) == (P(None, "fsdp"), P(None, "fsdp"))
    assert set(jax.tree.leaves(dataclasses.replace(layer_specs(names("down_proj"), q, 1)))) == {P()}


@pytest.mark.parametrize(
    ("module", "attribute", "shape", "spec"),
    [
        ("q_proj", "lora_a", (2, 256, 8), P()),
        ("q_proj", "lora_b", (2, 8, 256), P(None, None, "tensor")),
        ("o_proj", "lora_a", (2, 256, 8), P(None, "tensor")),
        ("o_proj", "lora_b", (2, 8, 256), P()),
        ("o_proj", "lora_a", (2, 254, 8), P()),  # 4 does not divide it
        ("gate_up_proj", "lora_b", (2, 8, 256), P()),
        ("q_proj", "lora_magnitude", (2, 256), P()),
    ],
)
def test_an_adapter_is_split_with_its_matrix(module: str, attribute: str, shape: tuple[int, ...], spec: P) -> None:
    assert adapter_spec(("layers", "self_attn", module, "adapter", attribute), shape, 4) == spec
    assert adapter_spec(("layers", "self_attn", module, "adapter", attribute), shape, 1) == P()


def test_dense_values() -> None:
    def spec(path: tuple[str, ...], *shape: int) -> tuple[P, P]:
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
        return layer_specs(path, leaf, 4), frozen_specs(path, leaf, 2, 4)

    assert spec(names("q_proj", "bias"), 2, 256) == (P(None, "tensor"), P(None, ("tensor", "fsdp")))
    assert spec(names("o_proj", "bias"), 2, 256) == (P(), P(None, ("fsdp", "tensor")))
    assert spec(names("o_proj"), 2, 256, 64) == (P(None, "tensor"), P(None, ("tensor", "fsdp")))
    assert spec(("embed_tokens", "weight"), 1000, 64) == (P("tensor"), P(("fsdp", "tensor")))
    assert spec(("embed_tokens", "weight"), 1004, 64) == (P("tensor"), P("tensor", "fsdp"))
    assert spec(("embed_tokens", "weight"), 1001, 64) == (P(), P(None, ("fsdp", "tensor")))
    assert spec(("encoder", "relative_attention_bias", "weight"), 8, 4)[0] == P()


def test_roles_by_path() -> None:
    assert role_of(("decoder", "layers", "cross_attention", "o", "weight")) == "input"
    assert role_of(("layers", "input_layernorm", "weight")) == "whole"
    assert role_of(("layers", "self_attn", "q_proj", "adapter", "lora_a")) == "output"
