"""The answers of a conversation, each at the end of a text that starts with inference's own prompt.

An answer is what the model has to say after the text that it is given at inference: the messages before the answer,
rendered with the header of the next answer (the *generation prompt*). For answer i, `messages[:i]` is rendered in this way
(the prompt), and `messages[:i + 1]` without a further header (the finished text).

1. The finished text starts with the prompt. The rest of it is the answer.
2. The finished text differs before the answer, because the template writes earlier messages otherwise if an answer follows
   (Mistral writes the system message before the last question only; gpt-oss drops the reasoning before a call if the call
   has an answer). The text is then the prompt, and after it what follows the header in the finished text.
3. The finished text lacks the reasoning of the answer (DeepSeek-R1 drops `<think>…</think>`). The text is then the prompt,
   and after it the content of the message as it is in the data, without an opening tag that the prompt ends in.
4. The finished text does not have the end of the generation prompt (DeepSeek-R1 opens `<think>` there), and the message has
   no reasoning. The answer is then found in the finished text by its content, and before it is only the start of the prompt.

White space at the end of an answer is not part of it: ChatML's line end after `<|im_end|>` belongs to the template, and a
model should not generate a token for it. Neither is a header of the next answer that a template always writes.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora_jax.data.chat import WAY_OUT, chat_text, with_reasoning
from qlora_jax.data.chat_checks import REASONING_TAGS, forms_of_text, written
from qlora_jax.data.chat_forms import text_of
from qlora_jax.data.messages import Message
from qlora_jax.data.pieces import Span
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "find_answers"]

_PROBE = "\ue000 an answer that no conversation contains"
_OPENED = re.compile(r"<(think|thinking|thought|reasoning|reason)>\s*\Z")
_MARKER = re.compile(r"<[^<>\s]{1,60}>|〈[^〈〉\s]{1,60}〉|\[[A-Z_/]{1,60}\]")


@dataclass(frozen=True)
class Answer:
    """A text that ends in an answer.

    Attributes:
        text: the text.
        start: where the answer starts in it.
        end: where it ends; only white space follows.
        messages: the number of messages that the text is the rendering of; None: it was joined from parts.
        by_content: whether the text before the answer is only the start of the prompt.
    """

    text: str
    start: int
    end: int
    messages: int | None
    by_content: bool = False


def find_answers(
    messages: Sequence[Message],
    learned: Collection[int],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Sequence[Any],
    removed: int = 0,
) -> tuple[dict[int, Answer], str]:
    """Return (the answers by their numbers, the text of the whole conversation).

    An answer that is not learned is left out if the finished text does not start with its prompt. `removed` is the number of
    messages that the data have before the first one, for errors.

    Raises:
        DataError: the template refuses the conversation, or an answer that is learned is not found.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index > 0]
    # The whole conversation is the last of the texts, whether it ends in an answer or not.
    ends = sorted({len(messages), *(turn + 1 for turn in turns)})
    texts = dict(zip(ends, chat_text([messages[:end] for end in ends], tokenizer, prompt=False, tools=tools), strict=True))
    prompts = chat_text([messages[:turn] for turn in turns], tokenizer, prompt=True, tools=tools)
    answers = {}
    for turn, prompt in zip(turns, prompts, strict=True):
        text = texts[turn + 1]
        if text.startswith(prompt) and not _drops_reasoning(messages[turn], text[len(prompt) :]):
            answers[turn] = _after_prompt(prompt, text[len(prompt) :], turn + 1)
        elif turn in learned:
            found = _search(messages[: turn + 1], prompt, text, tokenizer, tools)
            if isinstance(found, str):
                raise DataError(
                    "the chat template does not write its own generation prompt before message "
                    f"{turn + removed} (assistant), found {found}; {WAY_OUT}"
                )
            answers[turn] = found
    return answers, texts[len(messages)]


def _after_prompt(prompt: str, rest: str, messages: int | None, bare: str = "") -> Answer:
    """Return the answer that starts a text that follows a prompt; see `_ended` for the texts that it is compared with."""
    return _ended(Answer(prompt + rest, len(prompt), 0, messages), prompt, bare)


def _ended(answer: Answer, prompt: str, bare: str = "") -> Answer:
    """Return an answer with its end.

    Some templates write text after the last message whoever wrote it, such as the header of the next answer. Then the
    finished text and a text that ends in a question have the same end: what closes a message, and that text.

    Args:
        answer: an answer that goes to the end of the text.
        prompt: a text that ends in a question, with the generation prompt.
        bare: the same without the generation prompt; it may end in text only, because EOS may follow all messages.
    """
    text, messages = answer.text, answer.messages
    for other in (prompt, bare):
        if other and text[-4:] == other[-4:]:
            shared = _common(text[: max(0, answer.start - 1) : -1], other[::-1])
            closings = list(_MARKER.finditer(text, len(text) - shared))
            if len(closings) > 1 and (other is prompt or _MARKER.sub("", text[closings[0].end() :]).strip()):
                text, messages = text[: closings[0].end()], None
    return replace(answer, text=text, end=max(answer.start, len(text.rstrip())), messages=messages)


def _search(
    messages: Sequence[Message], prompt: str, text: str, tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any]
) -> Answer | str:
    """Return the last of the messages as an answer, if the finished text lacks its reasoning or does not start so.

    If the answer cannot be found, return what is in the text in place of the prompt, in words.
    """
    *before, message = messages
    probe = {"role": "assistant", "content": _PROBE}
    (probed, bare) = chat_text([[*before, probe], before], tokenizer, prompt=False, tools=tools)
    if (
        _drops_reasoning(message, text[_common(prompt, text) :])
        and (rest := _with_reasoning(message, prompt, probed)) is not None
    ):
        return _after_prompt(prompt, rest, None)
    if text.startswith(prompt):
        return _after_prompt(prompt, text[len(prompt) :], len(messages))
    content = _common(text, probed)  # where the message's own text starts
    # The header may hold the text of a short message once more, so it is looked for before the header first.
    header = _common(bare, prompt)
    last = _place_of(before[-1], prompt[:header]) or _place_of(before[-1], prompt) or (header, header)
    ending = prompt[last[0] :]
    place = text.rfind(ending, 0, content)
    if ending.strip() and text.count(ending, 0, content) < prompt.count(ending):
        place = -1  # it is that of an earlier turn with the same question
    if place < 0 and _common(bare, text) >= last[1] and prompt[header:].strip():
        ending = prompt[header:]
        place = text.find(ending, last[1], content)
    if place >= 0 and ending.strip():
        return _after_prompt(prompt, text[place + len(ending) :], None, bare)
    start = _start_of_marker(text, min(content, _common(prompt, text)))
    if start < last[1]:
        return f"{_around(text, start)} in place of {_around(prompt, start)}"
    return _ended(Answer(text, start, 0, len(messages), by_content=True), prompt, bare)


def _place_of(message: Message, text: str) -> Span | None:
    """Return where a message was written last in a text; None if it is not found."""
    content = text_of(message).strip()
    for form in forms_of_text(content) if content else ():
        start = text.rfind(form)
        if start >= 0:
            return start, start + len(form)
    return None


def _drops_reasoning(message: Message, text: str) -> bool:
    """Return whether a text lacks the reasoning of an answer: between tags in its content, or under a key of its own."""
    content = text_of(message)
    parts = REASONING_TAGS.split(content)[:-1] if "<" in content or "[" in content else []
    reasoning = with_reasoning(message).get("reasoning_content")
    parts += [reasoning] if isinstance(reasoning, str) else []
    return any(not written(part, text) for part in parts)


def _with_reasoning(message: Message, prompt: str, probed: str) -> str | None:
    """Return what follows a prompt if an answer is written as it is in the data; None if its form is not known."""
    place = probed.find(_PROBE)
    if place < 0 or message.get("tool_calls"):
        return None
    content, opened, ending = text_of(message), _OPENED.search(prompt), probed[place + len(_PROBE) :]
    before, closing, after = content.rpartition(f"</{opened[1]}>") if opened else ("", "", content)
    if opened is not None:
        reasoning = before.strip().removeprefix(f"<{opened[1]}>").strip() if closing else ""
        reasoning = reasoning or (with_reasoning(message).get("reasoning_content") or "").strip()
        return f"{reasoning}\n</{opened[1]}>\n\n{after.lstrip()}{ending}" if reasoning else None
    in_tags = REASONING_TAGS.search(content) is not None
    if not in_tags or not probed.startswith(prompt) or REASONING_TAGS.search(probed[len(prompt) - 20 : place]) is not None:
        return None
    return probed[len(prompt) : place] + content + ending


def _start_of_marker(text: str, position: int) -> int:
    """Return the position, or the start of the marker that it is within."""
    near = max(0, position - 64)
    found = (match for match in _MARKER.finditer(text, near, position + 64) if match.start() < position < match.end())
    return next((match.start() for match in found), position)


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _around(text: str, position: int) -> str:
    return repr(f"{'…' if position > 20 else ''}{text[max(0, position - 20) : position + 30]}")
