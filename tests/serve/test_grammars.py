"""Answers that obey a grammar, from a model that would write something else; about 4 seconds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")

from test_engine import Successors, make, request, run, tokens

from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.serve.grammars import constrain_by
from qlora_jax.serve.scheduler import Limits

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "size": {"type": "integer", "minimum": 10, "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def constrained(tiny_llama: Path) -> Any:
    """(an engine, its tokenizer): each token is a byte, and 1 ends an answer."""
    tokenizer: Any = load_tokenizer(tiny_llama)
    size = len(tokenizer)
    constrain = constrain_by(tokenizer, size, [1])
    return make(
        Successors(size), Limits(rows=3, capacity=96, chunk=16), size, tokenizer=tokenizer, constrain=constrain
    ), tokenizer


def answers(constrained: Any, *grammars: Any, **draws: Any) -> list[str]:
    engine, tokenizer = constrained
    prompt = tokenizer("a")["input_ids"]
    requests = [(0, request(prompt, 60, grammar=grammar, eos_ids=frozenset([1]), **draws)) for grammar in grammars]
    events = run(engine, requests)
    assert ["stop"] * len(grammars) == [own[-1].finish for own in events if own[-1].finish == "stop"]
    return ["".join(event.text for event in own) for own in events]


def test_a_schema_a_pattern_and_a_grammar_side_by_side(constrained: Any) -> None:
    for seed in range(4):
        found = answers(
            constrained,
            ("json", SCHEMA),
            ("regex", "[x-z]{3}[0-9]"),
            ("lark", 'start: "yes" | "no"'),
            temperature=2.0,
            seed=seed,
        )
        value = json.loads(found[0])
        assert value.keys() == {"name", "size"}
        assert len(value["name"]) <= 4
        assert 10 <= value["size"] <= 99
        assert re.fullmatch("[x-z]{3}[0-9]", found[1])
        assert found[2] in ("yes", "no")


def test_the_row_beside_a_restricted_one_is_not_restricted(constrained: Any) -> None:
    engine, tokenizer = constrained
    prompt = tokenizer("a")["input_ids"]
    restricted = request(prompt, 20, grammar=("regex", "zz"))
    events = run(engine, [(0, restricted), (0, request(prompt, 5))])
    assert [tokenizer.decode(tokens(own)) for own in events] == ["zz", "bcdef"]


@pytest.mark.parametrize("wrong", [("json", {"type": "king"}), ("regex", "("), ("lark", "start"), ("json", {"type": 3})])
def test_a_grammar_that_is_wrong_is_refused(constrained: Any, wrong: Any) -> None:
    engine, tokenizer = constrained
    with pytest.raises(ValueError, match=r"response_format or tools: expected a .* grammar that can be obeyed"):
        engine.submit(request(tokenizer("a")["input_ids"], 5, grammar=wrong))
    assert not engine.busy
