"""The messages of a record → messages for a chat template: role, content and tool calls.

    {"role": "user", "content": "Hi"}                       OpenAI
    {"from": "human", "value": "Hi"}                        ShareGPT; also every other pair of the keys below
    {"role": "user", "content": [{"type": "text", …}]}      the texts of the parts, joined; for other parts see parts.py
    {"role": "assistant", "content": null,                  content becomes ""; arguments, which are JSON text, become an
     "tool_calls": [{"function": {"name", "arguments"}}]}   object, as templates expect
    {"role": "assistant", "function_call": {…}}             a tool call; a message of the role `function` is its result
    {"from": "function_call", "value": "{\\"name\\": …}"}     the same
    {"role": "assistant", "weight": 0, …}                   an answer that is not learned; also "train": false

Keys of a message that are not listed here are left in it, because a chat template may read them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qlora_jax.data.parts import split_parts
from qlora_jax.data.values import checked_text, described, from_json
from qlora_jax.errors import DataError

__all__ = [
    "CONTENT_KEYS",
    "REASONING_KEYS",
    "ROLES",
    "ROLE_KEYS",
    "Message",
    "called_names",
    "checked_messages",
    "checked_text",
    "checked_tools",
    "content_text",
    "for_template",
    "is_answer",
    "is_empty",
    "not_learned",
    "unread_keys",
]

# Messages are dictionaries, because a chat template may read more keys than role and content.
Message = dict[str, Any]

ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
# Keys of the reasoning before an answer. Templates read one of the first two.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys that say whether an answer is learned, of OpenAI and Mistral (weight), axolotl (train, training) and ms-swift (loss).
LEARNED_KEYS = ("weight", "train", "training", "loss")
# The names of each role, in lower case and with underscores. A function call is an assistant's message of JSON text.
ROLES: dict[str, tuple[str, ...]] = {
    "user": ("user", "human", "prompter", "customer", "client", "person"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "llm", "agent"),
    "system": ("system", "developer"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "function_result", "tool_response",
             "tool_result", "tool_results", "tool_output"),
    "function_call": ("function_call", "tool_call", "tool_calls"),
}  # fmt: skip
_ROLE_OF_NAME = {name: role for role, names in ROLES.items() for name in names}
_NOT_LEARNED = "train"  # the key of an answer that is not learned, with the value False
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def checked_messages(value: object, column: str) -> tuple[Message, ...]:
    """Return the messages of a list in any of the forms above, of its JSON text, or of a single message.

    Raises:
        DataError: a message is invalid; the error contains the column and the message's index.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = from_json(value, f"column {column!r}")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r}: expected a list of messages, found {described(value)}")
    return tuple(
        _checked_message(part, f"column {column!r}, message {index}")
        for index, message in enumerate(value)
        for part in (split_parts(message, _content_key(message)) if isinstance(message, Mapping) else [message])
    )


def checked_tools(value: object, column: str = "tools") -> tuple[Any, ...]:
    """Return the tools that a conversation may call, from a list of JSON schemas or its JSON text.

    Raises:
        DataError: the value is not a list of objects.
    """
    tools = (from_json(value, f"column {column!r}") if isinstance(value, str) and value.strip() else value) or []
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"column {column!r}: expected a list of objects, found {described(tools)}")
    for index, tool in enumerate(tools):
        if not isinstance(tool.get("function", {}), Mapping):
            raise DataError(f"column {column!r}, tool {index}, function: expected an object, found {tool['function']!r:.60}")
    return tuple(_tool(tool) for tool in tools)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool in the form that templates read; Anthropic's has its parameters under `input_schema`."""
    if "input_schema" not in tool or "function" in tool:
        return dict(tool)
    function = {name: part for name, part in tool.items() if name in ("name", "description")}
    return {"type": "function", "function": function | {"parameters": tool["input_schema"]}}


def called_names(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def is_answer(message: Message) -> bool:
    """Return whether a message is the assistant's and is learned."""
    return message["role"] == "assistant" and message.get(_NOT_LEARNED) is not False


def is_empty(message: Message) -> bool:
    """Return whether a message has nothing but white space: no text, no reasoning and no call."""
    texts = (message.get(key) for key in ("content", *REASONING_KEYS))
    return not message.get("tool_calls") and not any(isinstance(text, str) and text.strip() for text in texts)


def not_learned(message: Message) -> Message:
    """Return the message, marked as one that is not learned."""
    return message | {_NOT_LEARNED: False}


def for_template(message: Message) -> Message:
    """Return the message as a chat template reads it: without the mark of `not_learned`."""
    return {name: part for name, part in message.items() if name != _NOT_LEARNED}


def unread_keys(messages: Sequence[Message], tokenizer: Any, *, chat: bool) -> set[str]:
    """Return the keys of messages, with a value, that nothing reads.

    Args:
        messages: the messages.
        tokenizer: has the chat template.
        chat: whether the chat template writes them, which may read any key; otherwise only role and content are read.
    """
    pairs = [pair for message in messages for pair in message.items() if pair[1] not in ("", [], {})]
    # A question that is to be learned is not.
    keys = {name for name, part in pairs if name != _NOT_LEARNED or part is not False}
    keys -= {"role", "content", "tool_calls"}
    source = json.dumps(tokenizer.chat_template) if keys and chat else ""  # several templates may have names
    unread = {name for name in keys if re.search(rf"\b{re.escape(name)}\b", source) is None}
    # A template gets the reasoning under all of its names, and what it drops of a learned answer is written or refused.
    ignored = {name for message in messages if not is_answer(message) for name in message}
    read = chat and (any(key in source for key in REASONING_KEYS) or not ignored.intersection(REASONING_KEYS))
    return unread - set(REASONING_KEYS) if read else unread


def _content_key(message: Mapping[Any, Any]) -> str:
    return next((key for key in CONTENT_KEYS if message.get(key) is not None), CONTENT_KEYS[0])


def _checked_message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: expected an object with role and content, found {described(value)}")
    parts = {name: part for name, part in value.items() if part is not None}
    role_key, content_key = (next((key for key in keys if key in parts), None) for keys in (ROLE_KEYS, CONTENT_KEYS))
    calls, calls_key = parts.pop("tool_calls", None), "tool_calls"
    if (legacy := parts.pop("function_call", None)) and not calls:
        calls, calls_key = [legacy], "function_call"
    if role_key is None or (content_key is None and not calls):
        empty = sorted(str(name) for name, part in value.items() if part is None)
        found = f"{sorted(map(str, value.keys() - set(empty)))}{f' (null here: {empty})' if empty else ''}"
        raise DataError(f"{place}: expected the keys role and content, found {found}")
    role, content = _role(parts.pop(role_key), f"{place}, {role_key}"), ""
    if content_key is not None:
        content = parts.pop(content_key)
        if role == "function_call":
            role, calls, calls_key, content = (
                "assistant",
                _calls_of_text(content, f"{place}, {content_key}"),
                content_key,
                "",
            )
        else:
            content = content_text(content, f"{place}, {content_key}", of_tool=role == "tool")
    if "tool_call_id" in parts:
        parts["tool_call_id"] = checked_text(parts["tool_call_id"], f"{place}, tool_call_id")
    learned = _is_learned(parts, role, place)
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = _checked_calls(calls, f"{place}, {calls_key}")
    return message | parts if learned else not_learned(message | parts)


def _role(value: object, place: str) -> str:
    name = re.sub(r"[\s\-]+", "_", checked_text(value, place).strip().lower())
    if name not in _ROLE_OF_NAME:
        raise DataError(f"{place}: expected user, assistant, system, tool or another name of these, found {value!r:.60}")
    return _ROLE_OF_NAME[name]


def _is_learned(parts: dict[str, Any], role: str, place: str) -> bool:
    """Return whether a message is learned, and remove the keys that say so from its parts."""
    learned = True
    for key in LEARNED_KEYS:
        if key not in parts:
            continue
        if key == "loss" and not isinstance(parts[key], bool):
            continue  # the loss of a message is sometimes recorded there
        truth = _TRUTH.get(str(parts[key]).strip().lower())
        if truth is None:
            if role != "assistant":
                continue
            raise DataError(f"{place}, {key}: expected 0 or 1 (false or true), found {parts[key]!r:.60}")
        if role == "assistant" or not truth:  # a question that is to be learned is not, so its key stays, as one not used
            del parts[key]
        learned = learned and truth
    return learned or role != "assistant"


def content_text(value: object, place: str, *, of_tool: bool = False) -> str:
    """Return the text of a content: a text, a list of parts of text, or, if a tool returned it, any JSON value.

    Raises:
        DataError: a value of another kind; the message starts with `place`.
    """
    if isinstance(value, Mapping) and isinstance(value.get("parts"), list | tuple):
        value = value["parts"]
    elif _is_part(value):
        value = [value]
    if isinstance(value, list | tuple) and value and (not of_tool or all(map(_is_part, value))):
        return "".join(_text_of_part(part, f"{place}, part {index}") for index, part in enumerate(value))
    if of_tool and isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return checked_text(value, place)


def _is_part(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and ("text" in value or isinstance(value.get("type"), str)))


def _text_of_part(part: object, place: str) -> str:
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in _TEXT_PARTS:
            raise DataError(f"{place}: expected a part of the type text, found {kind!r:.60}")
        if "text" not in part:
            raise DataError(f"{place}: expected the key text, found {sorted(map(str, part))}")
        return checked_text(part["text"], f"{place}, text")
    return checked_text(part, place)


def _calls_of_text(value: object, place: str) -> list[Any]:
    calls = from_json(value, place) if isinstance(value, str) else value
    return list(calls) if isinstance(calls, list | tuple) else [calls]


def _checked_calls(calls: object, place: str) -> list[Any]:
    if isinstance(calls, str) and calls.lstrip().startswith(("[", "{")):
        calls = from_json(calls, place)  # as tables keep calls of different arguments
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list | tuple):
        raise DataError(f"{place}: expected a list of calls, found {described(calls)}")
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: expected a function with a name, found {call!r:.60}")
        arguments = function.get("arguments", function.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = from_json(arguments, f"{place}, arguments of {function['name']}") or {}
        if not isinstance(arguments, Mapping):
            raise DataError(f"{place}, arguments of {function['name']}: expected an object, found {described(arguments)}")
        used = ("function", "name", "arguments", "parameters")
        rest = {name: part for name, part in call.items() if name not in used and part is not None}
        for name in ("id", "type"):
            if name in rest:
                rest[name] = checked_text(rest[name], f"{place}, {name}")
        called = {"name": function["name"], "arguments": dict(arguments)}
        checked.append({"type": "function"} | rest | {"function": called})
    return checked
