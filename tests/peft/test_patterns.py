"""Regular expressions of configurations: those that do not end are refused, and those that people use are not."""

import re

import pytest

from qlora_jax.peft.patterns import pattern_error

UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj|q_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
)


@pytest.mark.parametrize(
    "pattern", ["q_proj", r".*\.(q|k)_proj", r"model\.layers\.\d+\..*_proj", UNSLOTH, r"(?!.*vision).*q"]
)
def test_usual_patterns(pattern: str) -> None:
    assert pattern_error(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        ("x" * 20_000, "expected at most 10,000 characters"),
        (r"([a-z_.0-9]+)+!", "whose match ends"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_jax.peft.patterns._SECONDS", 0.5)
    assert re.search(message, str(pattern_error(pattern)))
