"""Rendering a conversation with the tokenizer's chat template, and finding the character ranges of the answers.

The answers are found in one of two ways.
1. If the template has `{% generation %}` tags, their ranges are the answers. A range is extended over the end-of-turn token
   if the tags exclude it.
2. Otherwise, answer i is the text that `messages[:i + 1]` adds to `messages[:i]` with a generation prompt. Both must be
   prefixes of the complete text; if they are not (some templates rewrite earlier turns), an error is raised. White space at
   the end of an answer is not part of it: ChatML's line end after `<|im_end|>` belongs to the template, and a model should
   not generate a token for it.

Tools are passed to the template, which accepts one list of tools for all conversations of a call. So conversations with the
same tools are rendered together. If a template omits a tool or a call, its name is missing in the text, which is an error.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.data.messages import Message, called_names
from qlora_jax.data.pieces import CannotRender, Piece, Span
from qlora_jax.data.schemas import Record
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION_TAG = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")
_PROBE = "An answer that no template contains 7351"
# The errors that a template's code raises for messages that it does not support, such as text + None.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError)


def chat_text(
    conversations: Sequence[Sequence[Message]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt: bool,
    tools: Sequence[Any] = (),
) -> list[str]:
    """Return the text of each conversation by the chat template; with `prompt`, the header of the next answer is added.

    Raises:
        DataError: the tokenizer has no chat template.
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        raise DataError(
            "template 'chat': expected a tokenizer with a chat template, found one without; "
            "choose the template guanaco, alpaca or plain"
        )
    batch = [list(conversation) for conversation in conversations]
    return cast(
        list[str],
        tokenizer.apply_chat_template(batch, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt),
    )


def render_chats(records: Sequence[Record], indices: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """Return the piece of `records[index]` for each index.

    Raises:
        CannotRender: the chat template does not support a record.
    """
    by_tools: dict[str, list[int]] = {}
    for index in indices:
        if not records[index].messages:
            found = "a text without turns" if "text" in records[index].fields else "no messages"
            raise CannotRender(index, f"template 'chat': expected a conversation, found {found}")
        by_tools.setdefault(json.dumps(records[index].tools, sort_keys=True), []).append(index)
    pieces: dict[int, Piece] = {}
    for group in by_tools.values():
        pieces |= zip(group, _render_alike(records, group, tokenizer), strict=True)
    for index in indices:
        _check_tools_are_there(index, records[index], pieces[index].text)
    return [pieces[index] for index in indices]


def _render_alike(records: Sequence[Record], indices: Sequence[int], tokenizer: "PreTrainedTokenizerBase") -> list[Piece]:
    """Return the pieces of conversations with the same tools."""
    tools = records[indices[0]].tools
    conversations = [records[index].messages for index in indices]
    find = _tagged_answers if _has_generation_tags(tokenizer) else _answers_by_prefix
    try:
        found = find(conversations, tokenizer, tools)
    except (*_TEMPLATE_ERRORS, CannotRender):
        # One of the conversations causes the error. Render them one by one to find it.
        found = []
        for index, conversation in zip(indices, conversations, strict=True):
            try:
                found.extend(find([conversation], tokenizer, tools))
            except _TEMPLATE_ERRORS as error:
                raise CannotRender(index, f"the chat template refuses this conversation: {error}") from error
            except CannotRender as error:
                raise CannotRender(index, str(error)) from error
    return found


def _check_tools_are_there(index: int, record: Record, text: str) -> None:
    names = [str(tool.get("function", tool).get("name", "")) for tool in record.tools]
    names += [name for message in record.messages for name in called_names(message)]
    for name in names:
        if name not in text:
            raise CannotRender(
                index,
                f"template 'chat': expected a chat template that writes tools and calls, found no {name!r} in it",
            )


def _template_source(tokenizer: Any) -> str | None:
    return None if tokenizer.chat_template is None else tokenizer.get_chat_template()


def _has_generation_tags(tokenizer: Any) -> bool:
    source = _template_source(tokenizer)
    return source is not None and _GENERATION_TAG.search(source) is not None


def _tagged_answers(conversations: Sequence[Sequence[Message]], tokenizer: Any, tools: Sequence[Any] = ()) -> list[Piece]:
    # These are the ranges of `apply_chat_template(return_assistant_tokens_mask=True)`. Its conversion from characters to
    # tokens is not used: if a range starts or ends in white space and the tokenizer trims offsets, no token is found there,
    # and the mask is empty or extends to the end of the sequence.
    texts, ranges = cast(
        tuple[list[str], list[list[Span]]],
        render_jinja_template(
            conversations=[list(conversation) for conversation in conversations],
            tools=list(tools) or None,
            chat_template=_template_source(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        ),
    )
    ending = _end_of_turn(tokenizer)
    return [
        Piece(
            text,
            tuple((start, end + len(ending) if text.startswith(ending, end) else end) for start, end in spans),
        )
        for text, spans in zip(texts, ranges, strict=True)
    ]


def _end_of_turn(tokenizer: Any) -> str:
    """Return the text that the template writes after an answer, up to and including a special token; else an empty text."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
    text = chat_text([messages], tokenizer, prompt=False)[0]
    tail = text[text.rindex(_PROBE) + len(_PROBE) :] if _PROBE in text else ""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special, key=len, reverse=True)
    match = re.match(r"\s*(?:" + "|".join(map(re.escape, longest_first)) + ")", tail) if special else None
    return match.group() if match else ""


def _answers_by_prefix(conversations: Sequence[Sequence[Message]], tokenizer: Any, tools: Sequence[Any] = ()) -> list[Piece]:
    # All prefixes of all conversations are rendered in two calls.
    answers = [
        (row, turn)
        for row, conversation in enumerate(conversations)
        for turn, message in enumerate(conversation)
        if message["role"] == "assistant"
    ]
    for _, turn in answers:
        if turn == 0:
            raise CannotRender(0, "template 'chat': expected a message before the first answer, found none")
    before = chat_text([conversations[row][:turn] for row, turn in answers], tokenizer, prompt=True, tools=tools)
    inner = [(row, turn) for row, turn in answers if turn + 1 < len(conversations[row])]
    conversations_and_parts = [*conversations, *(conversations[row][: turn + 1] for row, turn in inner)]
    texts = chat_text(conversations_and_parts, tokenizer, prompt=False, tools=tools)
    whole, after_inner = (
        texts[: len(conversations)],
        dict(zip(inner, texts[len(conversations) :], strict=True)),
    )
    spans: list[list[Span]] = [[] for _ in conversations]
    for (row, turn), start in zip(answers, before, strict=True):
        end = after_inner.get((row, turn), whole[row])
        if not (whole[row].startswith(end) and end.startswith(start)):
            raise CannotRender(
                0,
                f"template 'chat': at message {turn} the tokenizer's chat template does not continue its "
                "own generation prompt, so the answer cannot be told from the rest: expected a text "
                f"that starts in {_tail(start)!r}, found {_tail(whole[row][: len(start)])!r}; mark the "
                "answers with {% generation %} in the template, or choose the template guanaco",
            )
        spans[row].append((len(start), max(len(start), len(end.rstrip()))))
    return [Piece(text, tuple(found)) for text, found in zip(whole, spans, strict=True)]


def _tail(text: str) -> str:
    return text if len(text) <= 60 else "…" + text[-60:]
