"""Content as a list of parts that are no text → the keys and messages that chat templates read.

    {"type": "thinking", "thinking": …}       (Anthropic, Mistral) the reasoning of an answer: `reasoning_content`
    {"type": "reasoning", "text": …}          the same
    {"type": "tool_use", "id", "name", "input"}             (Anthropic) a call of the assistant: `tool_calls`
    {"type": "tool_result", "tool_use_id", "content"}       (Anthropic) a message of the role tool, before what else the user
                                                            says in this message

Parts of text stay in the content.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["split_parts"]

_REASONING = ("thinking", "reasoning")


def split_parts(message: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the messages that a message is, given the key of its content; the message itself without such parts."""
    content = message.get(key)
    if not isinstance(content, list | tuple):
        return [message]
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    if not {*_REASONING, "tool_use", "tool_result"}.intersection(kind for kind in kinds if isinstance(kind, str)):
        return [message]
    rest, reasoning, calls, results = list[Any](), list[str](), list[Any](), list[Mapping[str, Any]]()
    for part, kind in zip(content, kinds, strict=True):
        if kind in _REASONING and (text := _reasoning(part)) is not None:
            reasoning.append(text)
        elif kind == "tool_use":
            call: dict[str, Any] = {"function": {"name": part.get("name"), "arguments": part.get("input")}}
            calls.append(call | ({"id": part["id"]} if part.get("id") is not None else {}))
        elif kind == "tool_result":
            result: dict[str, Any] = {"role": "tool", "content": "" if part.get("content") is None else part["content"]}
            results.append(result | ({"tool_call_id": part["tool_use_id"]} if part.get("tool_use_id") is not None else {}))
        else:
            rest.append(part)
    if results and not rest and not reasoning and not calls:
        kept = {name: value for name, value in message.items() if name not in ("role", key)}
        return [{**kept, **result} for result in results]
    if reasoning and isinstance(stated := message.get("reasoning_content"), str) and stated not in ("", *reasoning):
        reasoning.insert(0, stated)
    more: dict[str, Any] = {"reasoning_content": "\n\n".join(reasoning)} if reasoning else {}
    more |= {"tool_calls": [*(message.get("tool_calls") or ()), *calls]} if calls else {}
    return [*results, dict(message) | {key: rest or ""} | more]


def _reasoning(part: Mapping[str, Any]) -> str | None:
    """Return the text of a part of the reasoning, which may itself be a list of parts; None if it is of another form."""
    value = next((part[key] for key in (*_REASONING, "text", "content") if part.get(key) is not None), None)
    if isinstance(value, list | tuple) and all(
        isinstance(one, Mapping) and isinstance(one.get("text"), str) for one in value
    ):
        return "".join(one["text"] for one in value)
    return value if isinstance(value, str) else None
