"""The messages and the tools of a chat, checked field by field, in the form in which chat templates take them.

An assistant's message may have calls of tools, whose arguments are JSON text in OpenAI's API and objects in most templates;
`data.chat` tries the other forms. `tool_choice` decides which tools the model sees, and whether its answer must call one:

    auto (the default)     all of them; the answer may call some
    none                   no tools
    required               all of them; the answer consists of calls
    a named function       that one; the answer is one call of it
"""

import dataclasses
import re
from typing import Any

from qlora_jax.serve.http_body import Fields, read_json
from qlora_jax.serve.http_errors import ApiError
from qlora_jax.serve.tool_format import Tool

__all__ = ["Tools", "read_messages", "read_tools"]

_MOST_MESSAGES, _MOST_TOOLS, _MOST_CALLS = 10_000, 256, 256
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")


@dataclasses.dataclass(frozen=True)
class Tools:
    """What an answer may or must call.

    Attributes:
        tools: the functions.
        required: whether the answer must consist of calls.
        many: whether it may have several.
    """

    tools: tuple[Tool, ...]
    required: bool = False
    many: bool = True


def read_messages(fields: Fields) -> tuple[dict[str, Any], ...]:
    """Return the messages of a chat.

    Raises:
        ApiError: a message that is wrong, or none.
    """
    messages = fields.must("messages", fields.items("messages", _MOST_MESSAGES))
    if not messages:
        fields.wrong("messages", "at least one message", "none")
    return tuple(_message(message, f"messages[{number}]") for number, message in enumerate(messages))


def _message(message: Any, place: str) -> dict[str, Any]:
    fields = _object(message, place)
    role = fields.must("role", fields.text("role", choices=_ROLES))
    calls = fields.items("tool_calls", _MOST_CALLS) or []
    if calls and role != "assistant":
        fields.wrong("tool_calls", "none in a message of this role", calls)
    content = fields.any("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        fields.wrong("content", "a text or a list of parts of text", content)
    found: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content}
    if calls:
        found["tool_calls"] = [_call(call, f"{place}.tool_calls[{number}]") for number, call in enumerate(calls)]
    fields.unsupported("function_call", "audio", "refusal")
    name, answered = fields.text("name"), fields.text("tool_call_id")
    if role == "tool":
        found |= {key: value for key, value in (("name", name), ("tool_call_id", answered)) if value}
    fields.ignore("annotations", "reasoning_content")  # of an answer that comes back
    fields.none_left()
    return found


def _part(part: Any, place: str) -> str:
    fields = _object(part, place)
    fields.must("type", fields.text("type", choices=("text",)))
    text = fields.must("text", fields.text("text"))
    fields.none_left()
    return text


def _call(call: Any, place: str) -> dict[str, Any]:
    fields = _object(call, place)
    fields.text("type", choices=("function",))
    identity = fields.must("id", fields.text("id"))
    function = fields.must("function", fields.fields("function"))
    fields.ignore("index")
    fields.none_left()
    name = _name(function)
    written = function.text("arguments") or "{}"
    function.none_left()
    try:
        arguments = read_json(written)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        function.wrong("arguments", "the text of a JSON object", written)
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(fields: Fields) -> Tools | None:
    """Return what the answers of a chat may call; None: nothing.

    Raises:
        ApiError: a tool or a choice that is wrong.
    """
    fields.unsupported("functions", "function_call")
    given, choice = fields.items("tools", _MOST_TOOLS) or [], fields.any("tool_choice")
    parallel = fields.any("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        fields.wrong("parallel_tool_calls", "true or false", parallel)
    tools = tuple(_tool(tool, f"tools[{number}]") for number, tool in enumerate(given))
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        fields.wrong("tools", "functions of different names", next(name for name in names if names.count(name) > 1))
    many = parallel is not False
    if isinstance(choice, dict):
        named = _named(choice)
        if named not in names:
            fields.wrong("tool_choice", "a function of tools", named)
        return Tools(tuple(tool for tool in tools if tool.name == named), required=True, many=False)
    if choice not in (None, "none", "auto", "required"):
        fields.wrong("tool_choice", "none, auto, required or a named function", choice)
    if choice == "required" and not tools:
        fields.wrong("tool_choice", "tools beside it", choice)
    return Tools(tools, required=choice == "required", many=many) if tools and choice != "none" else None


def _tool(tool: Any, place: str) -> Tool:
    fields = _object(tool, place)
    fields.must("type", fields.text("type", choices=("function",)))
    function = fields.must("function", fields.fields("function"))
    fields.none_left()
    name, schema = _name(function), function.any("parameters")
    if not isinstance(schema, dict | None):
        function.wrong("parameters", "a JSON schema", schema)
    described = function.text("description")
    function.flag("strict")
    function.none_left()
    schema = schema or {"type": "object", "properties": {}}
    written = {"name": name} | ({"description": described} if described else {}) | {"parameters": schema}
    return Tool(name, schema, {"type": "function", "function": written})


def _named(choice: dict[str, Any]) -> str:
    fields = Fields(choice, "tool_choice.")
    fields.must("type", fields.text("type", choices=("function",)))
    function = fields.must("function", fields.fields("function"))
    name = _name(function)
    function.none_left()
    fields.none_left()
    return name


def _name(function: Fields) -> str:
    name = function.must("name", function.text("name"))
    if not _NAME.fullmatch(name):
        function.wrong("name", "at most 128 letters, digits, dots, hyphens and underscores", name)
    return name


def _object(value: Any, place: str) -> Fields:
    if not isinstance(value, dict):
        raise ApiError(400, f"{place}: expected an object.", param=place, code="invalid_value")
    return Fields(value, f"{place}.")
