"""Conversations → text, with the character ranges of the assistant's answers.

    chat      the tokenizer's chat template, one piece
    guanaco   `### Human: … ### Assistant: …`, one piece; a text in this form is used unchanged
    alpaca    the prompt of Stanford Alpaca, which ends in `### Response: `, and the answer: two pieces
    plain     the input and the answer, two pieces without a separator; a `text` column unchanged, all of it learned
    auto      the template that the record's schema names (`schemas.Schema.template`)

All of a `completion` is learned, both in guanaco (if the text has that form) and in plain. The template only determines how
prompts are written at inference.

Pieces are tokenized separately, so that the tokens of a prompt do not depend on the answer after it and are the same in
training and in generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from qlora_jax.data.chat import check_has_template, first_form
from qlora_jax.data.chat_forms import Form
from qlora_jax.data.chat_rows import conversation_rows
from qlora_jax.data.messages import Message, is_answer
from qlora_jax.data.pieces import CannotRender, Piece, Span
from qlora_jax.data.schemas import SCHEMAS, TURN_MARKER, Record, Template
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response: "
)
ALPACA_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response: "
)
_MARKER_OF_ROLE = {"user": "### Human:", "assistant": "### Assistant:"}


@dataclass(frozen=True)
class Rendered:
    """A record, or a part of one, as the text of one row.

    Attributes:
        pieces: the text.
        template: the template that was used, never "auto".
        ends_in_answer: whether the end of the text is learned.
        notes: what a user should know about the record; in its first row only.
    """

    pieces: tuple[Piece, ...]
    template: Template
    ends_in_answer: bool
    notes: tuple[str, ...] = ()


def choose_template(record: Record, template: Template, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """Return the template for a record: the given one or, for "auto", the one that suits the record.

    Raises:
        DataError: an unknown template.
    """
    if template not in get_args(Template):
        raise DataError(f"template: expected one of {', '.join(get_args(Template))}, found {template!r}")
    if template != "auto":
        return template
    return SCHEMAS[record.schema].template(record, tokenizer.chat_template is not None)


def render(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[tuple[Rendered, ...]]:
    """Return the rows of every record: one, or several for a conversation whose earlier turns the chat template rewrites.

    Raises:
        CannotRender: the template does not support a record.
    """
    rows = []
    for index, record in enumerate(records):
        name = choose_template(record, template, tokenizer)
        rows.append(_render_chat(index, record, tokenizer) if name == "chat" else (_render_one(index, record, name),))
    return rows


def _render_chat(index: int, record: Record, tokenizer: "PreTrainedTokenizerBase") -> tuple[Rendered, ...]:
    if not record.messages:
        found = "a text without turns; choose auto or plain" if "text" in record.fields else "no messages"
        raise CannotRender(index, f"template 'chat': expected a conversation, found {found}")
    check_has_template(tokenizer)

    def rows_of(form: Form) -> tuple[Rendered, ...]:
        learned = [turn for turn, message in enumerate(form.messages) if is_answer(message)]
        rows, notes = conversation_rows(form.messages, learned, tokenizer, record.tools, removed=form.removed)
        notes = (*form.notes, *notes)
        return tuple(
            Rendered((row.piece,), "chat", row.ends_in_answer, () if number else notes) for number, row in enumerate(rows)
        )

    try:
        return first_form(record.messages, tokenizer, rows_of)
    except DataError as error:
        raise CannotRender(index, str(error)) from error


def _render_one(index: int, record: Record, template: str) -> Rendered:
    try:
        if record.tools or any("tool_calls" in message for message in record.messages):
            raise DataError(f"template {template!r}: expected a conversation without tools, found some; choose chat")
        return _RENDERERS[template](record)
    except DataError as error:
        raise CannotRender(index, str(error)) from None


def render_guanaco(record: Record) -> Rendered:
    text = record.fields.get("text")
    if text is not None and not record.messages and TURN_MARKER.search(text):
        return Rendered((_learned(text),), "guanaco", True)  # a completion, of which all is learned
    if not record.messages:
        raise DataError("template 'guanaco': expected turns, found none (`### Human:` and `### Assistant:`)")
    piece = join_guanaco(record.messages) if text is None else _marked(text)
    return Rendered((piece,), "guanaco", record.messages[-1]["role"] == "assistant")


def _marked(text: str) -> Piece:
    markers = list(TURN_MARKER.finditer(text))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    answers = []
    for marker, end in zip(markers, ends, strict=True):
        if marker.group(1) == "Assistant":
            # White space before the next marker belongs to the marker; at the end of the text it belongs to the answer.
            end = end if end == len(text) else marker.end() + len(text[marker.end() : end].rstrip())
            answers.append((marker.end(), end))
    return Piece(text, tuple(answers))


def join_guanaco(messages: Sequence[Message]) -> Piece:
    """Return the text of a conversation; a system message becomes a first line."""
    text = ""
    answers: list[Span] = []
    excluded: list[Span] = []
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and index == 0:
            text = content + "\n"
        elif role in _MARKER_OF_ROLE:
            after_system = index == 1 and messages[0]["role"] == "system"
            text += ("" if not text or after_system else " ") + _MARKER_OF_ROLE[role]
            # The position is counted and not searched, because a message may contain a marker.
            start, text = len(text), f"{text} {content}"
            if role == "assistant":
                (answers if is_answer(message) else excluded).append((start, len(text)))
        else:
            raise DataError(
                f"template 'guanaco': expected the roles user and assistant, and system first, "
                f"found {role!r} at message {index}"
            )
    return Piece(text, tuple(answers), tuple(excluded))


def render_alpaca(record: Record) -> Rendered:
    if "instruction" in record.fields:
        instruction, extra, text = (record.fields.get(name, "") for name in ("instruction", "input", "output"))
        answer = _learned(text)
    else:
        (instruction, answer), extra = _one_exchange(record, "alpaca"), ""
    return Rendered((Piece(alpaca_prompt(instruction, extra)), answer), "alpaca", bool(answer.answers))


def alpaca_prompt(instruction: str, extra: str = "") -> str:
    prompt = ALPACA_PROMPT_WITH_INPUT if extra else ALPACA_PROMPT
    return prompt.format(instruction=instruction, input=extra)


def render_plain(record: Record) -> Rendered:
    if "text" in record.fields:
        return Rendered((_learned(record.fields["text"]),), "plain", True)
    question, answer = _one_exchange(record, "plain")
    return Rendered((Piece(question), answer), "plain", bool(answer.answers))


_RENDERERS: dict[str, Callable[[Record], Rendered]] = {
    "guanaco": render_guanaco,
    "alpaca": render_alpaca,
    "plain": render_plain,
}


def _learned(text: str) -> Piece:
    return Piece(text, ((0, len(text)),))


def _one_exchange(record: Record, template: str) -> tuple[str, Piece]:
    """Return a question and its answer, which may be one that is not learned."""
    roles = [message["role"] for message in record.messages]
    if roles != ["user", "assistant"]:
        found = ", ".join(roles) or "a text without turns"
        raise DataError(
            f"template {template!r}: expected one user message and one answer, found {found}; choose chat or guanaco"
        )
    question, answer = record.messages
    text = answer["content"]
    return question["content"], _learned(text) if is_answer(answer) else Piece(text, excluded=((0, len(text)),))
