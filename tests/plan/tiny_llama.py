"""A tiny Llama, and how tests of plans change a step."""

import dataclasses
from typing import Any

from qlora_jax.train import StepSpec

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def changed(spec: StepSpec[Any], **parts: dict[str, Any]) -> StepSpec[Any]:
    """Return the step with other values in its parts, such as `batch={"length": 64}`."""
    return dataclasses.replace(
        spec, **{part: dataclasses.replace(getattr(spec, part), **values) for part, values in parts.items()}
    )
