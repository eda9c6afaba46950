"""Scalings of positions put into a config.json: transformers reads what we mean, and both rotate alike."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models import RopeScaling, factor_for, family_of, scaled
from qlora_jax.models.scaling import RopeKind

OLDER: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
NEWER = {name: value for name, value in OLDER.items() if name != "rope_theta"} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}
}


def changed(config: dict[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    return scaled(config, family_of(config).config(config), scaling)


@pytest.mark.parametrize("length", [40, 200])
@pytest.mark.parametrize("base", [OLDER, NEWER], ids=["older", "newer"])
@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rotations_equal_those_of_transformers(kind: RopeKind, base: dict[str, Any], length: int) -> None:
    """Within the old context and beyond it."""
    torch: Any = pytest.importorskip("torch", reason="torch, to compare with, is not installed")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = changed(base, RopeScaling(kind, 4.0))
    ours = family_of(config).config(config).kinds[0].rope
    assert ours is not None
    cosine, sine = ours(jnp.arange(length)[None])
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    expected = theirs(torch.zeros(1, length, 64), torch.arange(length)[None])
    for found, other in zip((cosine, sine), expected, strict=True):
        np.testing.assert_allclose(found[0], other[0, :, :16].numpy(), atol=2e-5)
    plain = family_of(base).config(base).kinds[0].rope
    assert plain is not None
    stretched = np.abs(np.asarray(plain(jnp.arange(length)[None])[0]) - np.asarray(cosine)).max()
    assert (stretched > 0.1) == (kind != "dynamic" or length > 64)


def test_the_context_grows_by_the_factor() -> None:
    for kind, expected in (("linear", 256), ("yarn", 256), ("dynamic", 64)):
        config = changed(NEWER, RopeScaling(kind, 4.0))
        parsed: Any = family_of(config).config(config)
        assert parsed.max_position_embeddings == expected
        assert parsed.endless == (kind == "dynamic")
    assert "rope_scaling" not in NEWER
    assert NEWER["max_position_embeddings"] == 64  # the input is left as it was


def test_the_factor_makes_room() -> None:
    assert [factor_for(length, 4096) for length in (4097, 8192, 8193, 32768)] == [2, 2, 3, 8]


def test_what_cannot_be_scaled() -> None:
    with pytest.raises(ValueError, match="rope_scaling: expected one of linear, dynamic, yarn, found 'llama3'"):
        RopeScaling("llama3", 2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rope_factor: expected a number above 1, found 1\.0"):
        RopeScaling("linear", 1.0)
    own = OLDER | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(ValueError, match="expected a model without a scaling of its own, found linear"):
        changed(own, RopeScaling("yarn", 2.0))
    gemma: dict[str, Any] = OLDER | {"model_type": "gemma3_text", "num_key_value_heads": 2, "num_hidden_layers": 6}
    with pytest.raises(ValueError, match="rotary positions, alike in all layers, found several kinds"):
        changed(gemma, RopeScaling("linear", 2.0))
    t5 = {"model_type": "t5", "vocab_size": 32, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="rotary positions, alike in all layers, found none"):
        changed(t5 | {"decoder_start_token_id": 0}, RopeScaling("linear", 2.0))
