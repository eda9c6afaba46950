"""Regular expressions of configurations: those that do not end are refused, and those that people use are not."""

import re
import resource
import time

import pytest

from qlora_jax.errors import OptionError
from qlora_jax.peft import LoRA
from qlora_jax.peft.patterns import END, LAYER, match_name, pattern_error

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
        (r"(?:\w|\w\w|\W)+!", "whose match ends"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    assert re.search(message, str(pattern_error(pattern)))


def test_a_pattern_has_to_be_valid_where_it_is_put() -> None:
    """PEFT puts something before a rank's pattern: flags would not be first any more, and names of groups would be twice."""
    assert pattern_error("(?i).*Q_PROJ") is None
    assert match_name("(?i).*Q_PROJ", "layers.0.q_proj") is not None
    assert "no regular expression" in str(pattern_error("(?i)q_proj", END))
    assert "no regular expression" in str(pattern_error("(?P<number>layers)", LAYER))
    with pytest.raises(OptionError, match="rank_pattern"):
        LoRA(rank_pattern=(("(?i)q_proj", 4),))


def test_each_pattern_is_tried_once() -> None:
    """Processor time, which does not depend on what else the machine does; a method is made anew for each of its changes."""
    before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for _ in range(3):
        with pytest.raises(OptionError, match="whose match ends"):
            LoRA(target_modules=r"(.*)*(.*)*x")
    spent = time.process_time() - before[0] + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before[1]
    assert spent < 1
