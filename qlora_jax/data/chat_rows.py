"""A conversation → one or several texts by the chat template, with the character ranges of the answers.

An answer is what the model has to say after the text that it is given at inference: the messages before the answer,
rendered with the header of the next answer (the *generation prompt*). For answer i, `messages[:i]` is rendered in this way
(the prompt), and `messages[:i + 1]` without a further header (the finished text).

1. The finished text starts with the prompt. The rest of it is the answer.
2. The finished text differs, because the template writes earlier messages otherwise if an answer follows (Mistral writes
   the system message before the last question only; gpt-oss drops the reasoning before calls that have an answer). The
   text is then the prompt, and after it what follows the last message and the header in the finished text.
3. The prompt opens the reasoning (`<think>`), and the finished text leaves reasoning out. If the message has reasoning,
   the text is the prompt, the rest of the reasoning, and the answer. If it has none, the answer is found in the finished
   text by its content; the text before it is then only the start of the prompt.

White space at the end of an answer is not part of it: ChatML's line end after `<|im_end|>` belongs to the template, and a
model should not generate a token for it.

The texts of several answers share one row if the row starts with each of them. So a template that writes every message
alike gives one row for the whole conversation. A template that rewrites earlier turns (Qwen 3 drops their reasoning, Phi-3
writes EOS after the last answer only) gives more rows. Every answer is learned in exactly one of them.

If the template has `{% generation %}` tags, of each answer only the ranges within tags are learned, with the end-of-turn
token if the tags leave that out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from transformers.utils.chat_template_utils import render_jinja_template

from qlora_jax.data.chat import WAY_OUT, chat_text, reason_of, with_reasoning
from qlora_jax.data.chat_checks import check_answer, check_message, check_tools, forms_of_text, tool_name, written
from qlora_jax.data.chat_forms import text_of
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
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PROBE = "\ue000 an answer that no conversation contains"
_OPENED_REASONING = re.compile(r"<(think|thinking|thought|reasoning|reason)>\s*\Z")
_MARKER = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_/]{1,60}\]")


@dataclass(frozen=True)
class ChatRow:
    """One text of a conversation, and whether its end is learned."""

    piece: Piece
    ends_in_answer: bool


@dataclass(frozen=True)
class _Answer:
    """The text that ends in an answer.

    Attributes:
        text: the text.
        start: where the answer starts in it.
        end: where it ends.
        messages: the number of messages that the text is the rendering of; None: it was joined from two of them.
        by_content: whether the text before the answer is only the start of the prompt.
    """

    text: str
    start: int
    end: int
    messages: int | None
    by_content: bool = False


def conversation_rows(
    messages: Sequence[Message], learned: Sequence[int], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] = ()
) -> tuple[list[ChatRow], tuple[str, ...]]:
    """Return (the texts of a conversation, at least one; notes on how its answers were found).

    Args:
        messages: the conversation.
        learned: the numbers of the messages that are learned, in order.
        tokenizer: has the chat template.
        tools: the tools that the conversation may call.

    Raises:
        DataError: the template refuses the conversation or leaves out a part of it, or an answer is not found.
    """
    if list(learned[:1]) == [0]:
        learned, notes = learned[1:], [FIRST_ANSWER]
        if not learned:
            raise DataError("template 'chat': expected a message before the first answer, found none")
    else:
        notes = []
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > 0]
    # The whole conversation is the last of the texts, whether it ends in an answer or not.
    ends = sorted({len(messages), *(turn + 1 for turn in turns)})
    texts = dict(zip(ends, chat_text([messages[:end] for end in ends], tokenizer, prompt=False, tools=tools), strict=True))
    prompts = chat_text([messages[:turn] for turn in turns], tokenizer, prompt=True, tools=tools)
    answers = {
        turn: _find(messages, turn, prompt, texts[turn + 1], tokenizer, tools)
        for turn, prompt in zip(turns, prompts, strict=True)
        if turn in learned or texts[turn + 1].startswith(prompt)  # an answer that is not learned need not be found
    }
    whole = texts[len(messages)]
    rows = _rows(
        _Answer(whole, len(whole), len(whole), len(messages)), answers, learned, messages[-1]["role"] == "assistant"
    )
    notes += _check(messages, answers, rows, tools)
    if any(answers[turn].by_content for turn in learned):
        notes.append(FOUND_BY_CONTENT)
    finished = [_row(messages, row, held, learned, answers) for row, held in rows]
    if _is_tagged(tokenizer, tools):
        finished = [
            made if row.messages is None else _within_tags(made, messages[: row.messages], tokenizer, tools)
            for made, (row, _) in zip(finished, rows, strict=True)
        ]
    return finished, tuple(notes)


def _rows(
    whole: _Answer, answers: dict[int, _Answer], learned: Sequence[int], ends_in_answer: bool
) -> list[tuple[_Answer, list[int]]]:
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


def _holds(row: _Answer, answer: _Answer) -> bool:
    return row.text.startswith(answer.text[: answer.end])


def _find(
    messages: Sequence[Message],
    turn: int,
    prompt: str,
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Any],
) -> _Answer:
    """Return the answer `messages[turn]`, given its prompt and its finished text."""
    if text.startswith(prompt):
        return _answer(text, len(prompt), turn + 1)
    probe = [*messages[:turn], {"role": "assistant", "content": _PROBE}]
    (probed,) = chat_text([probe], tokenizer, prompt=False, tools=tools)
    content = _common(text, probed)  # where the message's own text starts
    last = _place_of_last_message(messages[turn - 1], prompt)
    if last is not None:
        before = prompt[last[0] :]
        found = text.rfind(before, 0, content)
        if found >= 0:
            return _answer(prompt + text[found + len(before) :], len(prompt), None)
    reasoned = _after_opened_reasoning(messages[turn], prompt, text, probed)
    if reasoned is not None:
        return _answer(prompt + reasoned, len(prompt), None)
    start = _start_of_marker(text, min(content, _common(prompt, text)), tokenizer)
    if last is None or start < last[1]:
        raise DataError(
            f"the chat template does not write its own generation prompt before message {turn} (assistant), "
            f"found {_around(text, start)} in place of {_around(prompt, start)}; {WAY_OUT}"
        )
    return replace(_answer(text, start, turn + 1), by_content=True)


def _answer(text: str, start: int, messages: int | None) -> _Answer:
    return _Answer(text, start, max(start, len(text.rstrip())), messages)


def _place_of_last_message(message: Message, prompt: str) -> Span | None:
    """Return where the text of the message before an answer is in the prompt; None if it is not found."""
    content = text_of(message).strip()
    for form in forms_of_text(content) if content else ():
        start = prompt.rfind(form)
        if start >= 0:
            return start, start + len(form)
    return None


def _after_opened_reasoning(message: Message, prompt: str, text: str, probed: str) -> str | None:
    """Return what follows a prompt that ends in `<think>`, if the finished text leaves out the reasoning of the message."""
    opened = _OPENED_REASONING.search(prompt)
    content, reasoning = text_of(message), with_reasoning(message).get("reasoning_content")
    if opened is None or _PROBE not in probed:
        return None
    before, closed, after = content.partition(f"</{opened[1]}>")
    if closed:
        reasoning = before.strip().removeprefix(f"<{opened[1]}>")
    else:
        after = content
    if not reasoning or not reasoning.strip() or written(reasoning, text):
        return None
    ending = probed[probed.rindex(_PROBE) + len(_PROBE) :]
    return f"{reasoning.strip()}\n</{opened[1]}>\n\n{after.lstrip()}{ending}"


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _start_of_marker(text: str, position: int, tokenizer: Any) -> int:
    """Return the position, or the start of the marker or the added token that it is within."""
    markers = {token.content for token in tokenizer.added_tokens_decoder.values()}
    pattern = re.compile("|".join([_MARKER.pattern, *map(re.escape, sorted(markers, key=len, reverse=True))]))
    starts = [found.start() for found in pattern.finditer(text) if found.start() < position < found.end()]
    return min(starts, default=position)


def _around(text: str, position: int) -> str:
    return repr(f"{'…' if position > 20 else ''}{text[max(0, position - 20) : position + 30]}")


def _check(
    messages: Sequence[Message],
    answers: dict[int, _Answer],
    rows: Sequence[tuple[_Answer, list[int]]],
    tools: Sequence[Any],
) -> list[str]:
    """Return what a user should know of the texts; raise DataError if a part of the conversation is in none of them."""
    texts = [row.text for row, _ in rows]
    last = max((turn for _, held in rows for turn in held), default=len(messages))
    for index, message in enumerate(messages[:last]):
        if message["role"] != "assistant":
            check_message(index, message, texts)
    for row, held in rows:
        check_tools(tools, row.text)
        for turn in held:
            answer = answers[turn]
            check_answer(turn, with_reasoning(messages[turn]), row.text[answer.start : answer.end])
    first = answers[min(answers)] if answers else None
    before = texts[0] if first is None else first.text[: first.start]
    return [] if all(tool_name(tool) in before for tool in tools) else [TOOLS_NOT_DEFINED]


def _row(
    messages: Sequence[Message], row: _Answer, held: Sequence[int], learned: Sequence[int], answers: dict[int, _Answer]
) -> ChatRow:
    """Return a row with the ranges of the answers that it teaches, and of what it does not teach in any case."""
    spans = tuple((answers[turn].start, answers[turn].end) for turn in held)
    others = (answer for turn, answer in answers.items() if turn not in held)
    excluded = [(answer.start, answer.end) for answer in others if _holds(row, answer)]
    if held and any(turn < held[0] for turn in learned):
        # Another row teaches the turns before. The question to the first answer starts after the answer before it.
        question = next(
            (index for index in range(held[0] - 1, 0, -1) if messages[index - 1]["role"] == "assistant"), held[0] - 1
        )
        found = row.text.rfind(text_of(messages[question]).strip(), 0, spans[0][0])
        excluded.append((0, found if found > 0 else spans[0][0]))
    ends_in_answer = bool(held) and answers[held[-1]].end >= len(row.text.rstrip())
    return ChatRow(Piece(row.text, spans, tuple(excluded)), ends_in_answer)


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
    special = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    closing = re.compile(rf"(?:\s|{'|'.join(special)})*\Z" if special else r"\s*\Z")
    spans: list[Span] = []
    for start, end in row.piece.answers:
        for tag_start, tag_end in tags:
            first, last = max(start, tag_start), min(end, tag_end)
            if first < last:
                spans.append((first, end if closing.match(text[last:end]) else last))
    return replace(row, piece=replace(row.piece, answers=tuple(spans)))
