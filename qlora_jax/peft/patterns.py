"""Regular expressions in the configurations of adapters: whether they are valid, and whether matching them ends.

Some expressions take a time that grows exponentially with the length of the text, such as `(a+)+$`. Python cannot interrupt
a match. An expression with several repetitions is therefore tried on names of modules in a process of its own, which is
stopped after a few seconds.
"""

import re
import subprocess
import sys
from re import _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

__all__ = ["pattern_error"]

_SECONDS = 3.0
_LONGEST = 10_000  # characters; lists of full names of modules have some thousands
_NAMES = (
    "model.layers.31.self_attn.q_proj",
    "model.language_model.layers.31.self_attn.o_proj",
    "gpt_neox.layers.31.attention.query_key_value",
    "encoder.block.11.layer.0.SelfAttention.q",
    "model.layers.31.mlp.down_proj.",
    "model.embed_tokens",
    "lm_head",
)
_TRY = (
    "import re, sys\nfor name in sys.argv[2:]: re.fullmatch(sys.argv[1], name); re.match(rf'(.*\\.)?({sys.argv[1]})$', name)"
)


def pattern_error(pattern: str) -> str | None:
    """Return what is wrong with a regular expression over names of modules; None: nothing."""
    if len(pattern) > _LONGEST:
        return f"expected at most {_LONGEST:,} characters, found {len(pattern):,}"
    try:
        re.compile(pattern)
        repetitions = _repetitions(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression: {error}"
    if repetitions < 2:
        return None
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _TRY, pattern, *_NAMES], timeout=_SECONDS, check=False, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return f"expected a regular expression whose match ends, found one that takes more than {_SECONDS:g} s on a name"
    except (OSError, ValueError):  # no processes here, or a null character, which no name has
        return None
    return None


def _repetitions(parsed: Any) -> int:
    """Return the number of repetitions without a small limit in a parsed expression."""
    count = 0
    for operation, argument in parsed:
        if operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            count += (argument[1] > 3) + _repetitions(argument[2])
        elif operation is _constants.BRANCH:
            count += sum(_repetitions(branch) for branch in argument[1])
        elif operation is _constants.SUBPATTERN:
            count += _repetitions(argument[-1])
        elif operation in (_constants.ASSERT, _constants.ASSERT_NOT):
            count += _repetitions(argument[1])
        elif operation is _constants.GROUPREF_EXISTS:
            count += sum(_repetitions(part) for part in argument[1:] if part)
        elif operation in (getattr(_constants, name, None) for name in ("POSSESSIVE_REPEAT", "ATOMIC_GROUP")):
            count += 1
    return count
