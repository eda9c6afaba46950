"""The question in a prompt, as a person asked it, for progress messages.

A prompt is the text of a whole template: a system message, markers of turns, and the header of the coming answer. For each
template, a conversation with a known question is rendered, and the text around that question is found again in the prompt:

    <system message> <marker of the user> QUESTION <marker of the assistant>
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import jinja2
import numpy as np

from qlora_jax.data.format import encode_prompt
from qlora_jax.data.messages import Message
from qlora_jax.data.render import Template
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["questions_of"]

_PROBE = "a question that no template contains 4816"
_EARLIER: list[Message] = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "an answer 4817"}]
_TEMPLATES: tuple[Template, ...] = ("chat", "guanaco", "alpaca")
# Errors of the code of a chat template for messages that it does not support.
_TEMPLATE_ERRORS = (DataError, jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError)


def questions_of(prompts: Sequence[np.ndarray], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the last message of the user in each prompt; the whole text, if the prompt has none of the known templates.

    Args:
        prompts: token ids.
    """
    surroundings = [found for name in _TEMPLATES if (found := _surroundings(name, tokenizer)) is not None]
    return [_question(prompt, surroundings, tokenizer) for prompt in prompts]


def _question(prompt: np.ndarray, surroundings: Sequence[tuple[str, str]], tokenizer: Any) -> str:
    text = cast(str, tokenizer.decode(prompt.tolist())).rstrip()
    for before, after in surroundings:
        start = text.rfind(before)
        if start >= 0 and text.endswith(after) and start + len(before) <= len(text) - len(after):
            return text[start + len(before) : len(text) - len(after)].strip()
    return cast(str, tokenizer.decode(prompt.tolist(), skip_special_tokens=True)).strip()


def _surroundings(template: Template, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str] | None:
    """Return the text directly before a question and the text after it; None if the template does not show them."""
    first = _around_probe([], template, tokenizer)
    if first is None:
        return None
    before, after = first[0], first[1].strip()
    later = _around_probe(_EARLIER, template, tokenizer)
    # The marker of the user is before a first and before a later question. In a template with a single turn, it is the last
    # line before the question.
    last_line = before.rstrip().rpartition("\n")[-1]
    marker = last_line if later is None else _common_end(before, later[0]).strip()
    return (marker, after) if marker and after else None


def _common_end(one: str, other: str) -> str:
    """Return the longest text with which both texts end."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return one[len(one) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)) :]


def _around_probe(
    earlier: Sequence[Message], template: Template, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str] | None:
    """Return the text before and after a known question that follows `earlier` messages; None if it cannot be rendered."""
    if template == "chat" and tokenizer.chat_template is None:
        return None
    try:
        tokens = encode_prompt([*earlier, {"role": "user", "content": _PROBE}], tokenizer, template=template)
    except _TEMPLATE_ERRORS:
        return None
    before, found, after = cast(str, tokenizer.decode(tokens.tolist())).partition(_PROBE)
    return (before, after) if found else None
