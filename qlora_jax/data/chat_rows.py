"""A conversation → one or several texts by the chat template, with the character ranges of the answers.

The texts of several answers (chat_answers.py) share one row if the row starts with each of them. So a template that writes
every message alike gives one row for the whole conversation. A template that rewrites earlier turns (Qwen 3 drops their
reasoning, Phi-3 writes EOS after the last answer only) gives more rows. Every answer is learned in exactly one of them.

An EOS token directly after an answer belongs to it, even if the template writes that only before a further turn. So does the
special token that follows an answer without an end-of-turn token of its own, the marker of the next turn: the models of such
templates (GLM-4) stop there at inference. After the last answer EOS takes its place (format.py).

If the template has `{% generation %}` tags, of each answer only the ranges within tags are learned: with the end-of-turn
token if the tags leave that out, with a line end after it if they enclose it, and without the header of the answer.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.data.chat import WAY_OUT, chat_text, reason_of, with_reasoning
from qlora_jax.data.chat_answers import Answer, find_answers
from qlora_jax.data.chat_checks import (
    check_answer,
    check_message,
    check_tools,
    tool_name,
)
from qlora_jax.data.chat_places import content_place
from qlora_jax.data.messages import Message
from qlora_jax.data.pieces import Piece, Span
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FIRST_ANSWER", "FOUND_BY_CONTENT", "TOOLS_NOT_DEFINED", "ChatRow", "conversation_rows"]

FOUND_BY_CONTENT = (
    "answers without the end of the generation prompt before them, because the chat template leaves it out of finished texts"
)
FIRST_ANSWER = "first message by the assistant not learned, because nothing comes before it"
TOOLS_NOT_DEFINED = "calls of tools that the text does not define, because the chat template writes calls only"
_MARKER = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_/]{1,60}\]")
_LAST_MARKER = re.compile(rf"(?:{_MARKER.pattern})\Z")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatRow:
    """One text of a conversation, and whether its end is learned."""

    piece: Piece
    ends_in_answer: bool


def conversation_rows(
    messages: Sequence[Message],
    learned: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Any] = (),
    *,
    removed: int = 0,
) -> tuple[list[ChatRow], tuple[str, ...]]:
    """Return (the texts of a conversation, at least one; notes on how its answers were found).

    Args:
        messages: the conversation.
        learned: the numbers of the messages that are learned, in order.
        tokenizer: has the chat template.
        tools: the tools that the conversation may call.
        removed: the number of messages that the data have before the first of these, for errors.

    Raises:
        DataError: the template refuses the conversation or leaves out a part of it, or an answer is not found.
    """
    if list(learned[:1]) == [0]:
        learned, notes = learned[1:], [FIRST_ANSWER]
        if not learned:
            raise DataError("template 'chat': expected a message before the first answer, found none")
    else:
        notes = []
    answers, whole = find_answers(messages, learned, tokenizer, tools, removed)
    rows = _rows(Answer(whole, len(whole), len(whole), len(messages)), answers, learned, messages[-1]["role"] == "assistant")
    notes += _check(messages, answers, rows, tools, removed)
    if any(answers[turn].by_content for turn in learned):
        notes.append(FOUND_BY_CONTENT)
    finished = [_row(messages, row, held, learned, answers, (tokenizer, tools)) for row, held in rows]
    if _is_tagged(tokenizer, tools):
        finished = [
            made if row.messages is None else _within_tags(made, messages[: row.messages], tokenizer, tools)
            for made, (row, _) in zip(finished, rows, strict=True)
        ]
    return finished, tuple(notes)


def _rows(
    whole: Answer, answers: dict[int, Answer], learned: Sequence[int], ends_in_answer: bool
) -> list[tuple[Answer, list[int]]]:
    """Return the rows of a conversation in order, at least one, each with the answers that it teaches."""
    rest, rows = list(learned), []
    # What follows the last answer is part of a row only if the text of the whole conversation starts with that answer.
    row = whole if not ends_in_answer or not rest else answers[rest[-1]]
    while rest or not rows:
        held = [turn for turn in rest if _holds(row, answers[turn])]
        if held or not rest:
            rows.append((row, held))
        rest = [turn for turn in rest if turn not in held]
        row = answers[rest[-1]] if rest else row
    return rows[::-1]


def _holds(row: Answer, answer: Answer) -> bool:
    return row.text.startswith(answer.text[: answer.end])


def _check(
    messages: Sequence[Message],
    answers: dict[int, Answer],
    rows: Sequence[tuple[Answer, list[int]]],
    tools: Sequence[Any],
    removed: int,
) -> list[str]:
    """Return what a user should know of the texts; raise DataError if a part of the conversation is in none of them."""
    texts = [row.text for row, _ in rows]
    last = max((turn for _, held in rows for turn in held), default=len(messages))
    for index, message in enumerate(messages[:last]):
        if message["role"] != "assistant":
            check_message(index + removed, message, texts)
    for row, held in rows:
        check_tools(tools, row.text)
        for turn in held:
            answer = answers[turn]
            check_answer(turn + removed, with_reasoning(messages[turn]), row.text[answer.start : answer.end])
    first = answers[min(answers)] if answers else None
    before = texts[0] if first is None else first.text[: first.start]
    return [] if all(tool_name(tool) in before for tool in tools) else [TOOLS_NOT_DEFINED]


def _row(
    messages: Sequence[Message],
    row: Answer,
    held: Sequence[int],
    learned: Sequence[int],
    answers: dict[int, Answer],
    template: tuple[Any, Sequence[Any]],
) -> ChatRow:
    """Return a row with the ranges of the answers that it teaches, and of what it does not teach in any case.

    Args:
        template: (the tokenizer, the tools that the conversation may call).
    """
    tokenizer, tools = template
    spans = tuple((answers[turn].start, _end_with_closing(row.text, answers[turn], tokenizer)) for turn in held)
    # The messages of which the start of the row was written, as a prompt if the rest was joined to it.
    count = row.messages if row.messages is not None else max(held, default=0)

    def write(messages: Sequence[Message]) -> str:
        return chat_text([messages], tokenizer, prompt=row.messages is None, tools=tools)[0]

    def place_of(index: int, start: int) -> Span | None:
        return content_place(messages[: max(count, index + 1)], index, row.text, write, start)

    others = (answer for turn, answer in answers.items() if turn not in held)
    excluded = [(answer.start, answer.end) for answer in others if _holds(row, answer)]
    excluded += _rewritten(messages, row, learned, answers, place_of)
    if held and any(turn < held[0] for turn in learned):
        # Another row teaches the turns before. The question to the first answer starts after the answer before it.
        question = next(
            (index for index in range(held[0] - 1, 0, -1) if messages[index - 1]["role"] == "assistant"), held[0] - 1
        )
        before = [answer.end for turn, answer in answers.items() if turn < question and _holds(row, answer)]
        place = place_of(question, max(before, default=0))
        excluded.append((0, place[0] if place is not None and 0 < place[0] < spans[0][0] else spans[0][0]))
    ends_in_answer = bool(held) and answers[held[-1]].end >= len(row.text.rstrip())
    return ChatRow(Piece(row.text, spans, tuple(excluded)), ends_in_answer)


def _rewritten(
    messages: Sequence[Message],
    row: Answer,
    learned: Sequence[int],
    answers: dict[int, Answer],
    place_of: Callable[[int, int], Span | None],
) -> list[Span]:
    """Return where a row has answers that are not learned in a form other than that of inference.

    Such an answer is between the texts of the messages around it, whose order a template keeps (but for the system message).
    The ranges reach from the end of the message before to the start of the next one.

    Args:
        place_of: returns where the row has the content of a message, from a position on.
    """
    held = {turn: answer for turn, answer in answers.items() if _holds(row, answer)}
    lost = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index not in learned]
    if held.keys() >= set(lost):
        return []
    spans: list[Span] = []
    end, start = 0, None  # of the last message that was found; of a range that is not closed yet
    for index, message in enumerate(messages):
        if index in lost and index not in held:
            start = end if start is None else start
        if message["role"] == "system":
            continue
        place = (held[index].start, held[index].end) if index in held else place_of(index, end)
        if place is None:
            continue
        if start is not None and (index not in lost or index in held):
            spans.append((start, place[0]))
            start = None
        end = max(end, place[1])
    return spans if start is None else [*spans, (start, len(row.text))]


def _end_with_closing(text: str, answer: Answer, tokenizer: Any) -> int:
    """Return where an answer ends in a text, with the token that closes it: EOS, or a marker of the next turn."""
    eos = tokenizer.eos_token
    if eos and (found := re.compile(rf"\s*{re.escape(str(eos))}").match(text, answer.end)):
        return found.end()
    following = _MARKER.match(text, answer.end)
    if following is None or following[0] == tokenizer.bos_token or not _is_special(following[0], tokenizer):
        return answer.end
    own = _LAST_MARKER.search(text, max(answer.start, answer.end - 64), answer.end)
    return answer.end if own is not None and _is_token(own[0], tokenizer) else following.end()


def _is_token(text: str, tokenizer: Any) -> bool:
    """Return whether a text is one token of the vocabulary."""
    index = tokenizer.convert_tokens_to_ids(text)
    return index is not None and tokenizer.convert_ids_to_tokens(index) == text


def _is_special(text: str, tokenizer: Any) -> bool:
    """Return whether a text is one special token of the vocabulary."""
    index = tokenizer.convert_tokens_to_ids(text)
    return _is_token(text, tokenizer) and not tokenizer.decode([index], skip_special_tokens=True)


def _is_tagged(tokenizer: Any, tools: Sequence[Any]) -> bool:
    return _GENERATION_TAG.search(tokenizer.get_chat_template(tools=list(tools) or None)) is not None


def _within_tags(row: ChatRow, messages: Sequence[Message], tokenizer: Any, tools: Sequence[Any]) -> ChatRow:
    """Return the row with only the parts of its answers that are within tags, and the end-of-turn tokens after them."""
    # These are the ranges of `apply_chat_template(return_assistant_tokens_mask=True)`. Its conversion from characters to
    # tokens is not used: if a range starts or ends in white space and the tokenizer trims offsets, no token is found there,
    # and the mask is empty or extends to the end of the sequence.
    try:
        (text,), (tags,) = cast(
            tuple[list[str], list[list[Span]]],
            render_jinja_template(
                conversations=[[with_reasoning(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=tokenizer.get_chat_template(tools=list(tools) or None),
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            ),
        )
    except Exception as error:  # the template is a program of others, which may fail in any way
        raise DataError(f"the chat template refuses this conversation: {reason_of(error)}; {WAY_OUT}") from error
    if text != row.piece.text:  # the template has tags in a branch that was not taken, or writes the time
        return row
    spans: list[Span] = []
    for start, end in row.piece.answers:
        stop = len(text) - len(text[end:].lstrip())  # a line end is learned if it is within tags
        for tag_start, tag_end in tags:
            first, last = max(start, tag_start), min(stop, tag_end)
            if first < last:
                spans.append((first, max(last, end) if _is_closing(text[last:end], tokenizer) else last))
    return replace(row, piece=replace(row.piece, answers=tuple(spans)))


def _is_closing(text: str, tokenizer: Any) -> bool:
    """Return whether a text has nothing but special tokens and white space."""
    if not text.strip():
        return True
    special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    while text := text.lstrip():
        found = max((token for token in special if text.startswith(token)), key=len, default="")
        if not found:
            return False
        text = text[len(found) :]
    return True
