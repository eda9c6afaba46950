"""How a model writes the calls of tools, as its chat template shows it, and grammars of such calls.

    hermes     <tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>          Hermes, Qwen, and `chatml` of this package
    list       [TOOL_CALLS][{"name": …, "arguments": {…}}, …]                    Mistral up to 2024
    named      [TOOL_CALLS]NAME[ARGS]{…}                                         Mistral since
    llama      {"name": …, "parameters": {…}}; …                                 Llama 3.1 and later
    json       {"name": …, "arguments": {…}}; …                                  other templates that write tools

In the last two, the answer consists of calls and of nothing else. A marker such as `[TOOL_CALLS]` is often a special token,
which the text of an answer does not contain; `special_markers` tells which ones.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Tool", "ToolFormat", "calls_grammar", "special_markers", "tool_format"]

_MOST_CALLS = 16  # in an answer that must consist of calls
# As in `grammars`: a model that may write any white space often writes nothing else.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "additionalProperties", "unevaluatedProperties")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that an answer may call; `schema` is the JSON schema of its arguments, `given` what the client sent."""

    name: str
    schema: Mapping[str, Any]
    given: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How calls are written.

    Attributes:
        start: what comes before a call; "": the answer begins with it.
        close: what comes after a call, or after a list of calls.
        between: what comes between two calls of one list.
        listed: whether `[` comes before the first call.
        arguments: the key of the arguments; "": a call is the name, `[ARGS]` and the arguments.
        optional_start: a marker that may come before the first call.
    """

    start: str = ""
    close: str = ""
    between: str = ""
    listed: bool = False
    arguments: str = "arguments"
    optional_start: str = ""


_HERMES = ToolFormat("<tool_call>", "</tool_call>")
_LIST = ToolFormat("[TOOL_CALLS]", "]", between=",", listed=True)
_NAMED = ToolFormat("[TOOL_CALLS]", arguments="")
_LLAMA = ToolFormat(between=";", arguments="parameters", optional_start="<|python_tag|>")
_JSON = ToolFormat(between=";")
_MARKERS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>")


def tool_format(tokenizer: "PreTrainedTokenizerFast") -> ToolFormat | None:
    """Return how a model writes calls, by its chat template; None if the template has no tools."""
    template: Any = tokenizer.chat_template
    if isinstance(template, Mapping):  # several templates, one of which may be for tools
        template = template.get("tool_use") or template.get("default")
    if not isinstance(template, str) or "tools" not in template:
        return None
    if "[TOOL_CALLS]" in template:
        return _NAMED if "[ARGS]" in template else _LIST
    if "<tool_call>" in template:
        return _HERMES
    return _LLAMA if "<|python_tag|>" in template or "parameters" in template else _JSON


def special_markers(tokenizer: "PreTrainedTokenizerFast") -> dict[int, str]:
    """Return the markers of calls that are special tokens, which decoding leaves out, by their ids."""
    added = tokenizer.added_tokens_decoder
    return {number: token.content for number, token in added.items() if token.special and token.content in _MARKERS}


def calls_grammar(tools: Sequence[Tool], form: ToolFormat, special: Mapping[int, str], *, many: bool) -> str:
    """Return the grammar (llguidance's Lark) of answers that call tools and do nothing else.

    Args:
        tools: the tools that may be called.
        form: how calls are written.
        special: see `special_markers`.
        many: whether an answer may have several calls.
    """
    ids = {text: number for number, text in special.items()}

    def marker(text: str) -> str:
        return f"<[{ids[text]}]>" if text in ids else json.dumps(text)

    def repeated(rule: str) -> str:
        return f" ({rule}){{0,{_MOST_CALLS - 1}}}" if many else ""

    alternatives = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = []
    for index, tool in enumerate(tools):
        name = json.dumps(tool.name)
        if form.arguments:
            head = json.dumps(f'{{"name": {name}, "{form.arguments}": ')
            rules.append(f'call_{index}: {head} arguments_{index} "}}"')
        else:
            rules.append(f"call_{index}: {json.dumps(tool.name)} {marker('[ARGS]')} arguments_{index}")
        rules.append(f"arguments_{index}: %json {json.dumps(_strict(tool.schema))}")
    opening = marker(form.start)
    if form.listed:
        start = f'{opening} "[" one' + repeated('", " one') + ' "]"'
    elif form.between:
        start = "one" + repeated(f'"{form.between} " one')
    elif form.close:
        rules.append(f'wrapped: {opening} "\\n" one "\\n" {marker(form.close)}')
        start = "wrapped" + repeated('"\\n" wrapped')
    else:
        rules.append(f"wrapped: {opening} one")
        start = "wrapped" + repeated("wrapped")
    return "\n".join((f"start: {start}", f"one: {alternatives}", *rules)) + "\n"


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a schema of objects that allows no other names of arguments, where it does not say which ones it allows."""
    found = {"x-guidance": _SPACES, "type": "object", **schema}
    if "properties" in schema and not any(key in schema for key in _COMBINED):
        found["additionalProperties"] = False
    return found
