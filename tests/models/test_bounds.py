"""config.json with fields that no model has: refused in one line, at once, whatever the field; never another error.

About 5 seconds.
"""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
from family_configs import CONFIGS, SIZES
from tiers import tiered

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.errors import CheckpointError, QLoRAError, UnsupportedError
from qlora_jax.models import FAMILIES, with_model_type
from qlora_jax.models.bounds import BOUNDS

ODD: list[Any] = [
    0,
    -1,
    10**7,
    10**9,
    2**63,
    10**400,
    4096.0,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "64",
    "",
    [],
    [64],
    {},
]
ODD += [
    {"a": 1},
    [[1]],
    ["full_attention"] * 10**4,
    ["x"] * 4,
    {"rope_type": "linear"},
    {"rope_type": ["yarn"], "factor": 2},
]


def parse(kind: str, config: dict[str, Any]) -> None:
    """What every command does with a config.json before it looks at the weights."""
    shapes = {f"tensor {index}": (101, 1000) for index in range(60)}
    _ = Checkpoint("model", {"model_type": kind} | config, shapes, lambda _: pytest.fail("reads")).model_config


def outcome(kind: str, config: dict[str, Any]) -> str | None:
    """The message, of one line; None: the config is read."""
    start = time.perf_counter()
    said: str | None = None
    try:
        parse(kind, config)
    except QLoRAError as error:
        said = str(error)
    assert time.perf_counter() - start < 5
    assert said is None or ("\n" not in said and len(said) < 2000)
    return said


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_field_is_checked(kind: str) -> None:
    assert outcome(kind, CONFIGS[kind]) is None
    for name in CONFIGS[kind]:
        for value in ODD:
            said = outcome(kind, CONFIGS[kind] | {name: value})
            bound = BOUNDS.get(name)
            if bound is not None and value is not None and bound.problem(value) is not None and said is None:
                # A field that a family does not read may be anything.
                assert name in {"hidden_act", "attention_bias", "num_key_value_heads", "rms_norm_eps", "head_dim"}, (
                    name,
                    value,
                )


def _mutated(config: dict[str, Any], draws: random.Random) -> dict[str, Any]:
    """A config with one to three values changed, dropped or moved, also in objects and lists."""
    config = copy.deepcopy(config)
    for _ in range(draws.randint(1, 3)):
        places: list[tuple[Any, Any]] = []

        def collect(value: Any, places: list[tuple[Any, Any]] = places) -> None:
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    collect(value[key])

        collect(config)
        if not places:
            break
        holder, key = draws.choice(places)
        other, other_key = draws.choice(places)
        change: Callable[[], Any] = draws.choice(
            [
                lambda holder=holder, key=key: holder.__setitem__(key, copy.deepcopy(draws.choice(ODD))),
                lambda holder=holder, key=key: holder.pop(key),
                lambda holder=holder, key=key, other=other, other_key=other_key: holder.__setitem__(
                    key, copy.deepcopy(other[other_key])
                ),
            ]
        )
        change()
    return config


@pytest.mark.parametrize("kind", tiered(FAMILIES, quick=("llama", "gemma3_text", "t5")))
def test_mutations(kind: str) -> None:
    draws = random.Random(kind)
    for _ in range(60):
        outcome(kind, _mutated(CONFIGS[kind], draws))


def test_what_the_messages_say() -> None:
    said = outcome("llama", SIZES | {"num_hidden_layers": 10**7, "hidden_size": 64.0, "rms_norm_eps": "1e-5"})
    assert said is not None
    for part in (
        "config.json of a Llama model: ",
        "num_hidden_layers: expected a whole number from 1 to 4096, found 10000000",
        "hidden_size: expected a whole number from 1 to 4194304, found 64.0",
        "rms_norm_eps: expected a number above 0, at most 1, found '1e-5'",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 61}, "expected at most as many layers as tensors, 60, found 61"),
        ({"vocab_size": 10**7}, "expected a model of at most 12,120,000 parameters, found vocab_size 10,000,000"),
        ({"intermediate_size": 4 * 10**6}, "found intermediate_size 4,000,000 and 64 features"),
        ({"head_dim": 15}, "expected an even number of rotated features, found 15"),
        (
            {"num_attention_heads": 128, "num_key_value_heads": 2, "head_dim": None},
            "head_dim: expected a whole number from 1 to 16384, found 0",
        ),
    ],
)
def test_sizes_are_compared_with_the_file(fields: dict[str, Any], expected: str) -> None:
    assert expected in str(outcome("llama", SIZES | fields))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "llama"),
        ({"architectures": [None, "Gemma3ForCausalLM"], "model_type": None}, "gemma3_text"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": ""}, "t5"),
        ({"model_type": "unheard-of", "architectures": ["LlamaForCausalLM"]}, "unheard-of"),
    ],
)
def test_a_config_without_model_type_has_its_class(config: dict[str, Any], expected: str) -> None:
    assert with_model_type(config, "model")["model_type"] == expected


@pytest.mark.parametrize("config", [{}, {"architectures": ["BertModel"]}, {"architectures": 5}, {"model_type": ["llama"]}])
def test_a_config_that_names_no_model(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"model: config.json: expected a model_type, found .* add it to config.json"):
        with_model_type(config, "model")


def test_an_unhashable_model_type() -> None:
    with pytest.raises(QLoRAError, match="is not supported"):
        parse("llama", {"model_type": ["llama"]} | SIZES)
    assert issubclass(CheckpointError, QLoRAError)
