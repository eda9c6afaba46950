"""The rows of preference pairs → a prompt and two conversations that go on from it.

    columns                        contents of a pair
    prompt, chosen, rejected       three texts, joined as they are; or messages and two lists of messages
    question, chosen, rejected     a question (also instruction and input, with context) and two answers
    conversations, chosen, …       (LLaMA-Factory) the messages before two answers; also messages
    chosen, rejected               two texts `\\n\\nHuman: … \\n\\nAssistant: …` (hh-rlhf); two other texts, without a
                                   prompt; or two lists of messages

More columns are those of questions and answers: the system message, a history, tools (more_columns.py). With one of them,
or with the template chat or guanaco, a prompt of text is a question.

The two conversations must be equal up to an answer of the assistant. The part before it is the prompt. A pair with equal
answers, or whose first difference is not in an answer, cannot be used.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data.columns import nearest_schema
from qlora_jax.data.messages import Message, checked_messages
from qlora_jax.data.more_columns import MORE, column_text, earlier_messages, joined_texts, tools_of
from qlora_jax.data.schemas import Template, present_columns
from qlora_jax.data.values import described
from qlora_jax.errors import DataError

__all__ = ["PREFERENCE_COLUMNS", "Pair", "parse_pair", "split_dialogue"]

PREFERENCE_COLUMNS = ("chosen", "rejected")
# Columns that hold the prompt; of several, the first one is used.
_PROMPTS = ("prompt", "question", "instruction")
# Columns that hold the prompt where none of those is there, and the answers are no whole conversations.
_LISTS = ("conversations", "messages")  # of messages, also as JSON text
_OTHER_PROMPTS = ("input", *_LISTS)
_CONTEXTS = ("input", "context")
_USED = {*PREFERENCE_COLUMNS, *_PROMPTS, *_OTHER_PROMPTS, *_CONTEXTS, *MORE}
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
# The columns of which a prompt is joined, by the one that holds it.
_PARTS = {
    "question": ("context", "question"),
    "instruction": ("instruction", "input", "context"),
    "input": ("context", "input"),
}


@dataclass(frozen=True)
class Pair:
    """A pair; without messages in the prompt, the answers are plain texts after the text `before`."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    before: str = ""
    unused: tuple[str, ...] = ()


def parse_pair(row: Any, template: Template) -> Pair:
    """Return the pair of a row; with the templates auto and plain, a prompt of text is not a question.

    Raises:
        DataError: the row is no pair.
    """
    present = present_columns(row)
    if not present.keys() >= set(PREFERENCE_COLUMNS):
        near = nearest_schema(present, {"preference pairs": PREFERENCE_COLUMNS})
        way_out = near or "--columns OURS=THEIRS renames columns; single answers are learned without --objective dpo"
        raise DataError(f"expected the columns chosen and rejected, found {sorted(map(str, present))}; {way_out}")
    answers = [present[name] for name in PREFERENCE_COLUMNS]
    column = _prompt_column(present, answers)
    more = _PARTS.get(column or "", ())
    unused = tuple(
        name
        for name, value in present.items()
        if value not in ("", [], {})
        and (name not in _USED or (name in (*_PROMPTS, *_OTHER_PROMPTS, *_CONTEXTS) and name not in (column, *more)))
    )
    before, tools = earlier_messages(present), tools_of(present)
    texts = all(_is_text(value) for value in answers)
    if texts and column == "prompt" and template in ("auto", "plain") and not before and not tools:
        prompt = present["prompt"]
        if _is_text(prompt) and not _is_dialogue(str(prompt)):
            chosen, rejected = ((_answer(column_text(present, name)),) for name in PREFERENCE_COLUMNS)
            _check_different(chosen, rejected)
            return Pair((), chosen, rejected, before=column_text(present, "prompt"), unused=unused)
    asked = _prompt(present, column)
    chosen, rejected = ((*before, *_conversation(present, name, asked)) for name in PREFERENCE_COLUMNS)
    same = _first_difference(chosen, rejected)
    return Pair(chosen[:same], chosen[same:], rejected[same:], tools, unused=unused)


def _prompt_column(row: Mapping[str, Any], answers: Sequence[Any]) -> str | None:
    """Return the column that holds the prompt; None if there is none beside the answers."""
    if (column := next((name for name in _PROMPTS if name in row), None)) is not None:
        return column
    if any(map(_is_whole, PREFERENCE_COLUMNS, answers)):
        return None
    return next((name for name in _OTHER_PROMPTS if row.get(name) not in (None, "", [])), None)


def _is_whole(column: str, answer: Any) -> bool:
    """Return whether an answer is a whole conversation, with its questions: a dialogue, or a list that starts with one."""
    if isinstance(answer, list | tuple) and answer and isinstance(answer[0], Mapping):
        return checked_messages(answer[:1], column)[0]["role"] != "assistant"
    return isinstance(answer, str) and _is_dialogue(answer)


def _is_dialogue(text: str) -> bool:
    """Return whether a text is a dialogue in the form of hh-rlhf; the line ends before its first turn may be missing."""
    return text.startswith(("\n\nHuman:", "\n\nAssistant:")) or (text.startswith("Human:") and "\n\nAssistant:" in text)


def _is_text(value: object) -> bool:
    return not isinstance(value, list | tuple | Mapping)


def _answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _check_different(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    if chosen == rejected:
        raise DataError("expected two different answers, chosen and rejected, found equal ones")


def _first_difference(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return the number of messages that both conversations start with, after which both go on with an answer."""
    _check_different(chosen, rejected)
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        role = messages[same]["role"] if same < len(messages) else "nothing"
        if role != "assistant":
            raise DataError(
                f"column {column!r}, message {same}: expected the assistant's answer as the first difference of chosen and "
                f"rejected, found {role}"
            )
    if same == 0 and max(len(chosen), len(rejected)) > 1:
        raise DataError("expected a message before the answers, found none")
    return same


def _prompt(row: Mapping[str, Any], column: str | None) -> tuple[Message, ...]:
    """Return the messages of the prompt, which is a text, hh-rlhf's dialogue, or a list of messages."""
    if column is None:
        return ()
    if not _is_text(row[column]) or column in _LISTS:
        messages = checked_messages(row[column], column)
        if column in _LISTS and messages and messages[-1]["role"] == "assistant":
            if messages[-1] == _answer(str(row["chosen"])):
                return messages[:-1]
            raise DataError(
                f"column {column!r}: expected a prompt beside chosen and rejected, which ends with the user's turn; found a "
                "conversation that ends with an answer"
            )
        return messages
    column_text(row, column)
    text = joined_texts(row, *_PARTS.get(column, (column,)))
    if not _is_dialogue(text):
        return ({"role": "user", "content": text},)
    turns = split_dialogue(text)
    # `\n\nAssistant:` with nothing after it is only the header of the answer.
    return turns[:-1] if turns[-1] == _answer("") else turns


def _conversation(row: Mapping[str, Any], column: str, before: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the complete conversation that ends with the answers of a column."""
    value = row[column]
    if _is_text(value):
        text = column_text(row, column)
        return split_dialogue(text) if not before and _is_dialogue(text) else (*before, _answer(text))
    messages = checked_messages(value, column)
    if not messages or messages[0]["role"] == "assistant":
        return (*before, *messages)
    if any(message not in messages for message in before):
        raise DataError(f"column {column!r}: expected a conversation that holds the prompt, found {described(messages)}")
    return messages


def split_dialogue(text: str) -> tuple[Message, ...]:
    """Return the turns of a text in the form of hh-rlhf."""
    markers = list(_TURN.finditer(text))
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    return tuple(
        {"role": _ROLES[marker.group(1)], "content": text[marker.end() : end].strip()}
        for marker, end in zip(markers, ends, strict=True)
    )
