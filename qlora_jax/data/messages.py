"""The messages of a record → messages for a chat template: role, content and tool calls.

    OpenAI     {"role": "user", "content": "Hi"}                       unchanged
               {"role": "assistant", "content": null,                  content becomes ""; arguments, which are JSON text,
                "tool_calls": [{"function": {"name", "arguments"}}]}   become an object, as templates expect
    ShareGPT   {"from": "human", "value": "Hi"}                        role user; gpt: assistant; observation: tool
               {"from": "function_call", "value": "{\\"name\\": …}"}     an assistant's message with a tool call

Arrow gives each message, call and tool of a file the union of all their keys, with null for missing ones. Therefore nulls
are removed at every depth. Only nulls inside an `arguments` text are known to be in the data, and are not removed.
"""

import json
from collections.abc import Mapping
from typing import Any

from qlora_jax.errors import DataError

# Messages are dictionaries, because a chat template may read more keys than role and content.
Message = dict[str, Any]
_NOT_LEARNED = "train"  # the key of an answer that is not learned, with the value False

ROLE_OF_SPEAKER = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def checked_messages(value: object, column: str) -> tuple[Message, ...]:
    """Return the messages of a list in either form.

    Raises:
        DataError: a message is invalid; the error contains the column and the message's index.
    """
    if not isinstance(value, list | tuple):
        raise DataError(f"column {column!r}: expected a list of messages, found {type(value).__name__} {value!r:.60}")
    return tuple(_checked_message(message, f"column {column!r}, message {index}") for index, message in enumerate(value))


def checked_tools(value: object) -> tuple[Any, ...]:
    """Return the tools that a conversation may call, from a list of JSON schemas or its JSON text.

    Raises:
        DataError: the value is not a list of objects.
    """
    tools = _from_json(value, "column 'tools'") if isinstance(value, str) and value.strip() else value or []
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"column 'tools': expected a list of objects, found {type(tools).__name__} {tools!r:.60}")
    return tuple(_without_nulls(tool) for tool in tools)


def checked_text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, found {type(value).__name__} {value!r:.60}")
    return value


def called_names(message: Message) -> list[str]:
    """Return the names of the functions that a message calls."""
    return [call["function"]["name"] for call in message.get("tool_calls", ())]


def is_answer(message: Message) -> bool:
    """Return whether a message is the assistant's and is learned."""
    return message["role"] == "assistant" and message.get(_NOT_LEARNED) is not False


def not_learned(message: Message) -> Message:
    """Return the message, marked as one that is not learned."""
    return message | {_NOT_LEARNED: False}


def for_template(message: Message) -> Message:
    """Return the message as a chat template reads it: without the mark of `not_learned`."""
    return {name: part for name, part in message.items() if name != _NOT_LEARNED}


def _checked_message(value: object, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: expected an object with role and content, found {type(value).__name__} {value!r:.60}")
    message = {name: part for name, part in value.items() if part is not None}
    if {"from", "value"} <= message.keys():
        return _from_sharegpt(message, place)
    calls = message.get("tool_calls")
    if calls:
        message["tool_calls"] = _checked_calls(calls, f"{place}, tool_calls")
        message.setdefault("content", "")  # because templates concatenate the content
    else:
        message.pop("tool_calls", None)
    if not {"role", "content"} <= message.keys():
        raise DataError(f"{place}: expected the keys role and content, found {sorted(message)}")
    checked_text(message["role"], f"{place}, role")
    checked_text(message["content"], f"{place}, content")
    return message


def _from_sharegpt(message: Mapping[str, Any], place: str) -> Message:
    speaker = checked_text(message["from"], f"{place}, from")
    if speaker not in ROLE_OF_SPEAKER:
        raise DataError(f"{place}, from: expected one of {', '.join(ROLE_OF_SPEAKER)}, found {speaker!r}")
    content = checked_text(message["value"], f"{place}, value")
    if speaker != "function_call":
        return {"role": ROLE_OF_SPEAKER[speaker], "content": content}
    calls = _from_json(content, f"{place}, value")
    calls = [{"function": call} for call in (calls if isinstance(calls, list) else [calls])]
    return {"role": "assistant", "content": "", "tool_calls": _checked_calls(calls, f"{place}, value")}


def _checked_calls(calls: object, place: str) -> list[Any]:
    if not isinstance(calls, list | tuple):
        raise DataError(f"{place}: expected a list of calls, found {type(calls).__name__} {calls!r:.60}")
    checked = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{place}: expected a function with a name, found {call!r:.60}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _from_json(arguments, f"{place}, arguments of {function['name']}")
        else:
            arguments = _without_nulls(arguments)
        rest = _without_nulls({name: part for name, part in call.items() if name not in ("function", "name", "arguments")})
        checked.append({"type": "function"} | rest | {"function": {"name": function["name"], "arguments": arguments}})
    return checked


def _from_json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: expected JSON, found {text!r:.60} ({error.msg})") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(part) for part in value]
    return value
