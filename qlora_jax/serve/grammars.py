"""Answers that obey a JSON schema, a regular expression or a grammar, by llguidance.

    ("json", schema)       an object of JSON Schema; the answer has one space after each colon and comma
    ("regex", pattern)     in the syntax of Rust's regex crate
    ("lark", grammar)      in llguidance's dialect of Lark

Before each token, the tokens with which the answer can still be completed are allowed, and no others.
"""

import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_jax.errors import OptionError, shortened
from qlora_jax.serve.interfaces import Grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["constrain_by"]

# A model that may write any white space often writes nothing else.
_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def constrain_by(
    tokenizer: "PreTrainedTokenizerFast", vocabulary: int, eos_ids: Iterable[int]
) -> Callable[[Any], Grammar] | None:
    """Return a function from a (kind, value) above to the grammar of one answer; None if llguidance is not installed.

    The function raises OptionError for a schema, a pattern or a grammar that is wrong or too large.

    Args:
        tokenizer: of the answers.
        vocabulary: the number of logits.
        eos_ids: the tokens that end an answer.
    """
    try:
        import llguidance
        import llguidance.hf
    except ModuleNotFoundError:
        return None
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(eos_ids) or None)

    def constrain(given: Any) -> Grammar:
        kind, value = given
        try:
            if kind == "json":
                grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(value), defaults=_SPACES)
            elif kind == "regex":
                grammar = llguidance.LLMatcher.grammar_from_regex(value)
            else:
                grammar = llguidance.LLMatcher.grammar_from_lark(value)
            problem = llguidance.LLMatcher.validate_grammar(grammar, tokens)
        except (ValueError, TypeError) as error:
            problem = str(error)
        if problem:
            raise OptionError(
                f"response_format or tools: expected a {kind} grammar that can be obeyed: {shortened(problem, 300)}"
            )
        return _Matcher(llguidance.LLMatcher(tokens, grammar), vocabulary)

    return constrain


class _Matcher:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher, self._size = matcher, -(-vocabulary // 32)
        self._mask = self._next()

    def allowed(self) -> np.ndarray:
        """See `Grammar`."""
        return self._mask

    def accept(self, token: int) -> bool:
        """See `Grammar`."""
        self._matcher.consume_token(token)
        if self._matcher.is_stopped() or self._matcher.is_error():
            return True
        self._mask = self._next()
        return not self._mask.any()

    def _next(self) -> np.ndarray:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        return np.pad(mask, (0, max(0, self._size - mask.size)))[: self._size]
