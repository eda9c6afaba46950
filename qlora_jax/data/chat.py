"""Text of conversations by the tokenizer's chat template, in the form in which the template takes them.

A chat template is a program that comes with a model. It may refuse a conversation, or leave a part of it out without a
word. So the text of each conversation is checked (chat_checks.py): all messages must be in it. If the template refuses the
conversation, or drops a part, the conversation is offered in the other forms that templates are known to expect
(chat_forms.py), for example with the system message at the start of the first user turn. The first form that passes is
used, by the same rule for rows to train on and for prompts.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qlora_jax.data.chat_checks import Dropped, check_prompt
from qlora_jax.data.chat_forms import Form, forms_of
from qlora_jax.data.messages import REASONING_KEYS, Message, for_template
from qlora_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "WAY_OUT",
    "chat_prompt",
    "chat_text",
    "check_has_template",
    "first_form",
    "reason_of",
    "with_reasoning",
]

WAY_OUT = "choose another chat template (chat_template: a file, or a name such as chatml), or the template guanaco"
T = TypeVar("T")


def chat_text(
    conversations: Sequence[Sequence[Message]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt: bool,
    tools: Sequence[Any] = (),
) -> list[str]:
    """Return the text of each conversation by the chat template; with `prompt`, the header of the next answer is added.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    if not conversations:
        return []
    check_has_template(tokenizer)
    batch = [[with_reasoning(message) for message in conversation] for conversation in conversations]
    try:
        texts = tokenizer.apply_chat_template(batch, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # the template is a program of others, which may fail in any way
        raise DataError(f"the chat template refuses this conversation: {reason_of(error)}; {WAY_OUT}") from error
    return cast(list[str], texts)


def check_has_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise DataError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise DataError(
            "template 'chat': expected a tokenizer with a chat template, found one without; choose one (chat_template: a "
            "file, or a name such as chatml), or the template guanaco, alpaca or plain"
        )


def chat_prompt(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", tools: Sequence[Any] = ()
) -> tuple[str, tuple[str, ...]]:
    """Return (the text that a model continues with its answer, notes on the form of the conversation).

    Raises:
        DataError: the tokenizer has no chat template, or the template cannot write the conversation.
    """

    def render(form: Form) -> tuple[str, tuple[str, ...]]:
        (text,) = chat_text([form.messages], tokenizer, prompt=True, tools=tools)
        check_prompt(form.messages, tools, text, form.removed)
        return text, form.notes

    return first_form(messages, tokenizer, render)


def first_form(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", render: Callable[[Form], T]) -> T:
    """Return what `render` returns for the first form of a conversation that it can render.

    Raises:
        DataError: no form can be rendered. The error is about the part that the template drops in the form of which it
            writes most, if it accepts one; else it is that of the conversation as it is.
    """
    first: DataError | None = None
    dropped: Dropped | None = None
    # A template that reads parts asks for their type.
    for form in forms_of(messages, parts="type" in str(tokenizer.chat_template)):
        try:
            return render(form)
        except Dropped as error:
            dropped = error if dropped is None or error.index > dropped.index else dropped
        except DataError as error:
            first = first or error
    raise dropped or first or DataError("expected at least one message, found none")


def with_reasoning(message: Message) -> Message:
    """Return a message as templates read it: its reasoning, if it has any, is under each of the keys that they know."""
    message = for_template(message)
    found = next((value for key in REASONING_KEYS if isinstance(value := message.get(key), str)), None)
    return message if found is None else message | {"reasoning_content": found, "thinking": message.get("thinking", found)}


def reason_of(error: Exception) -> str:
    """Return in one line why a template failed."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".strip()
