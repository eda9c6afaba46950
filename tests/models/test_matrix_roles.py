"""Every linear layer, embedding and head of every family has a role."""

import pytest

from qlora_jax.errors import OptionError
from qlora_jax.models import FAMILIES, check_heads, family_of, linear_mappings
from qlora_jax.nn import ROLES
from scripts.studies.meshes import CONFIGS, SIZES


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_matrix_has_a_role(name: str) -> None:
    config = family_of({"model_type": name}).config(SIZES | CONFIGS.get(name, {}) | {"model_type": name})
    linear = {mapping.path[-2] for mapping in linear_mappings(config.parameter_mappings)}
    assert linear <= set(ROLES)
    others = {path[0] for path in (m.path for m in config.parameter_mappings) if len(path) == 2 and path[0] != "norm"}
    assert {ROLES[module] for module in others} == {"vocabulary"}


def test_a_head_is_never_split() -> None:
    decoder = family_of({"model_type": "llama"}).config(SIZES | {"model_type": "llama"})
    check_heads(decoder, 4)
    with pytest.raises(OptionError, match="tensor=8: expected a divisor of the model's num_key_value_heads, 4"):
        check_heads(decoder, 8)
    with pytest.raises(OptionError, match="tensor=3: expected a divisor of the model's num_attention_heads, 8"):
        check_heads(decoder, 3)
    t5 = family_of({"model_type": "t5"}).config(SIZES | CONFIGS["t5"])
    with pytest.raises(OptionError, match="tensor=3: expected a divisor of the model's num_heads, 8"):
        check_heads(t5, 3)
