"""Regular expressions in the configurations of adapters: whether they are valid, and whether matching them ends.

Some expressions take a time that grows exponentially with the length of the text, such as `(a+)+$`. Python cannot interrupt
a match. An expression with several repetitions is therefore tried on names of modules in a process of its own, which ends
itself after a fraction of a second of processor time; how busy the machine is does not matter. Valid expressions take a
thousandth of that. Each expression is tried once, and so is each match.
"""

import re
import subprocess
import sys
from functools import lru_cache
from re import _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

__all__ = ["END", "FULL", "LAYER", "match_name", "pattern_error"]

# How a pattern is matched, by PEFT's rules: the whole name; its end, from a dot on; the name of a list of layers.
FULL, END, LAYER = "{}", r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<number>\d{{1,9}})\."

_SECONDS = 0.3  # of processor time, for all names of `_NAMES`
_WAITING_SECONDS = 120.0  # where processor time cannot be limited, and for a process that does not start
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
# The timer's signal ends the process, also within a match.
_TRY = (
    "import re, signal, sys\n"
    "if hasattr(signal, 'setitimer'): signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))\n"
    "match = getattr(re, sys.argv[2])\n"
    "for name in sys.argv[4:]: match(sys.argv[3], name)"
)


@lru_cache(maxsize=1024)
def pattern_error(pattern: str, form: str = FULL) -> str | None:
    """Return what is wrong with a regular expression over names of modules; None: nothing.

    Args:
        pattern: the expression.
        form: how it is matched: `FULL`, `END` or `LAYER`.
    """
    if len(pattern) > _LONGEST:
        return f"expected at most {_LONGEST:,} characters, found {len(pattern):,}"
    try:
        re.compile(pattern)
        re.compile(form.format(pattern))
        repetitions = _repetitions(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"no regular expression: {error}"
    if repetitions < 2:
        return None
    command = [sys.executable, "-I", "-S", "-c", _TRY, str(_SECONDS), _way(form), form.format(pattern), *_NAMES]
    try:
        done = subprocess.run(command, timeout=_WAITING_SECONDS, check=False, capture_output=True)
        ends = done.returncode >= 0  # else a signal ended it
    except subprocess.TimeoutExpired:
        ends = False
    except (OSError, ValueError):  # no processes here, or a null character, which no name has
        ends = True
    if ends:
        return None
    return f"expected a regular expression whose match ends, found one that takes more than {_SECONDS:g} s on a name"


@lru_cache(maxsize=2**15)
def match_name(pattern: str, name: str, form: str = FULL) -> re.Match[str] | None:
    """Return the match of a pattern that `pattern_error` accepts in the full name of a module; None: there is none."""
    return getattr(re, _way(form))(form.format(pattern), name)


def _way(form: str) -> str:
    return "fullmatch" if form == FULL else "match"


def _repetitions(parsed: Any) -> int:
    """Return the number of repetitions without a small limit in a parsed expression."""
    count = 0
    for operation, argument in parsed:
        if operation in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
            count += (argument[1] > 3) + (argument[1] > 3 and _has_branch(argument[2])) + _repetitions(argument[2])
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


def _has_branch(parsed: Any) -> bool:
    """Return whether a repeated part is a choice: two branches may match the same text in many ways."""
    return any(
        operation is _constants.BRANCH or (operation is _constants.SUBPATTERN and _has_branch(argument[-1]))
        for operation, argument in parsed
    )
