"""Calls of tools in texts: every family's format, in pieces of any size, and what only looks like a call (1 CPU-second)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.serve.tool_calls import CallReader, Part
from qlora_jax.serve.tool_format import Tool, ToolFormat, calls_grammar, special_markers, tool_format


class Template:
    """What `tool_format` reads of a tokenizer."""

    def __init__(self, chat_template: Any) -> None:
        self.chat_template, self.added_tokens_decoder = chat_template, {}


def form(template: Any) -> ToolFormat:
    found = tool_format(Template(template))  # pyright: ignore[reportArgumentType]
    assert found is not None
    return found


HERMES, LIST = form("{{tools}} <tool_call>"), form("{{tools}} [TOOL_CALLS]")
NAMED, LLAMA, JSON = form("{{tools}} [TOOL_CALLS][ARGS]"), form("{{tools}} <|python_tag|> parameters"), form("{{tools}}")
NAMES = ("weather", "time.now", "f")
ODD = '{"city": "a \\"}] </tool_call> \\\\", "x": [{"y": {}}]}'


def read(form: ToolFormat, pieces: Any, *, many: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """Return (the text, the calls) of an answer in pieces."""
    reader, text, calls = CallReader(form, NAMES, many=many), "", []
    for part in [part for piece in pieces for part in reader.push(piece)] + reader.finish():
        if part.call is None:
            assert part.name is None
            text += part.text
        elif part.name is not None:
            assert part.call == len(calls)
            calls.append((part.name, part.text))
        else:
            assert part.call == len(calls) - 1
            calls[-1] = calls[-1][0], calls[-1][1] + part.text
    return text, calls


ANSWERS = [
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": ' + ODD + "}\n</tool_call>", "", [("weather", ODD)]),
    (
        HERMES,
        'I look.\n\n<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>\n{"name": "time.now", '
        '"arguments": {"a": 1}, "id": "}"}\n</tool_call>\n',
        "I look.",
        [("f", "{}"), ("time.now", '{"a": 1}')],
    ),
    (HERMES, '<tool_call>{"arguments": {"a": "é"}, "name": "f"}</tool_call> so', " so", [("f", '{"a": "é"}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    (LIST, '[TOOL_CALLS][{"name": "f", "arguments": {"a": []}}, {"name": "weather", "arguments": {}}]', "",
     [("f", '{"a": []}'), ("weather", "{}")]),
    (LIST, 'Well [TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}] ', "Well", [("f", "{}")]),
    (NAMED, "[TOOL_CALLS]weather[ARGS]" + ODD + '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}', "",
     [("weather", ODD), ("f", '{"a": 1}')]),
    (LLAMA, ' <|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    (LLAMA, '{"type": "function", "name": "f", "parameters": {}}; {"name": "weather", "parameters": ' + ODD + "}\n", "",
     [("f", "{}"), ("weather", ODD)]),
    (JSON, '{"type": "function", "function": {"name": "f", "arguments": {"a": 2}}}', "", [("f", '{"a": 2}')]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS, ids=range(len(ANSWERS)))
def test_the_calls_of_each_family_whole_and_letter_by_letter(form: ToolFormat, text: str, content: str, calls: Any) -> None:
    assert read(form, [text]) == read(form, text) == (content, calls)
    assert read(form, text, many=False) == (content, calls[:1])


TEXTS = [
    (HERMES, "a < b, <tool_cal and <tool_call>no</tool_call> \n"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call> '),
    (HERMES, '<tool_call>\n{"name": ["f"], "arguments": "{}"}'),
    (HERMES, "<tool_call>"),
    (LIST, "[TOOL_CALLS]"),
    (LIST, "[TOOL_CALLS] weather"),
    (LIST, '[TOOL_CALLS][{"nam'),
    (NAMED, "[TOOL_CALLS]unknown[ARGS]{}"),
    (NAMED, "[TOOL_CALLS]f and more"),
    (LLAMA, '{"name": "unknown", "parameters": {}} '),
    (LLAMA, '\n{"answer": {"name": "f", "parameters": {}}}'),
    (LLAMA, 'It is {"name": "f", "parameters": {}}'),
    (JSON, "{not json}"),
    (JSON, '{"function": 3}'),
    (JSON, " \n"),
]


@pytest.mark.parametrize(("form", "text"), TEXTS, ids=range(len(TEXTS)))
def test_what_only_looks_like_a_call_is_text(form: ToolFormat, text: str) -> None:
    assert read(form, [text]) == read(form, text) == (text, [])


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = CallReader(LLAMA, NAMES)
    assert reader.push('{"answer"')[0].text == '{"answer"'
    reader = CallReader(HERMES, NAMES)
    assert reader.push("a <tool_")[0].text == "a"
    assert reader.push("x")[0].text == " <tool_x"
    assert reader.push('<tool_call>{"name": "f", "arguments": {"a')[0] == Part('{"a', 0, "f")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_pieces_change_nothing_and_no_letter_is_lost(data: Any) -> None:
    form = data.draw(st.sampled_from([HERMES, LIST, NAMED, LLAMA, JSON]))
    words = [
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        '{"name": "f", "arguments": {',
        '"a": "}"',
        "}",
        "}}",
        "[",
    ]
    words += ["]", ",", ";", " ", "\n", "f", "x", '"', "\\", "{", '{"name": "f", "parameters": {}}', "<|python_tag|>"]
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = read(form, pieces)
    assert read(form, [text]) == (content, calls)
    if not calls:
        assert content == text


@pytest.mark.parametrize("form", [HERMES, LIST, NAMED, LLAMA, JSON])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_the_grammar_writes_what_the_reader_reads(tiny_llama: Path, form: ToolFormat, many: bool, special: bool) -> None:
    pytest.importorskip("llguidance", reason="llguidance, for grammars, is not installed")
    import llguidance
    import llguidance.hf

    from qlora_jax.checkpoint.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(tiny_llama)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]", "[ARGS]", "<tool_call>"]})
    markers = special_markers(tokenizer)
    assert len(markers) == (3 if special else 0)
    schema = {"properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "$defs": {"city": {"type": "string"}}}
    tools = [Tool("weather", schema, {}), Tool("f", {"type": "object", "properties": {}}, {})]
    tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=len(tokenizer), eos_token=[1])
    grammar = llguidance.LLMatcher.grammar_from_lark(calls_grammar(tools, form, markers, many=many))
    assert not llguidance.LLMatcher.validate_grammar(grammar, tokens)
    calls = [("weather", '{"city": "}"}'), ("f", "{}")]
    for count in (1, 2):
        text = write(form, calls[:count])
        matcher = llguidance.LLMatcher(tokens, grammar)
        taken = all(matcher.consume_token(token) for token in tokenizer.encode(text, add_special_tokens=False))
        assert (taken and matcher.is_accepting()) == (many or count == 1), text
        assert read(form, [text]) == ("", calls[:count])
    wrong = llguidance.LLMatcher(tokens, grammar)
    assert not all(wrong.consume_token(token) for token in tokenizer.encode("weather is", add_special_tokens=False))


def write(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    if not form.arguments:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in calls)
    objects = [f'{{"name": {json.dumps(name)}, "{form.arguments}": {arguments}}}' for name, arguments in calls]
    if form is LIST:
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in objects)
    return "; ".join(objects)


def test_a_template_without_tools_has_no_format() -> None:
    for template in (None, "{{ messages }}", {"default": "{{ messages }}"}):
        assert tool_format(Template(template)) is None  # pyright: ignore[reportArgumentType]
    assert form({"default": "{{ messages }}", "tool_use": "{{ tools }} <tool_call>"}) == HERMES


def test_half_of_a_surrogate_pair_can_be_sent() -> None:
    _, ((name, arguments),) = read(HERMES, ['<tool_call>{"arguments": {"a": "\\ud800"}, "name": "f"}</tool_call>'])
    assert name == "f"
    assert arguments.encode() == b'{"a": "\\ud800"}'


@pytest.mark.parametrize("start", ["f", "f[CALL_ID]", "f[CALL_ID]a [B]c", '{"name": "f"', '{"arguments": {"a": 1}'])
def test_any_number_of_spaces_is_read_once(start: str) -> None:
    """Which takes minutes if all ways to divide them are tried, with each piece."""
    form, marker = (HERMES, "<tool_call>") if start.startswith("{") else (NAMED, "[TOOL_CALLS]")
    pieces = [marker, start, *[" "] * 3000, "!"]
    assert read(form, pieces) == read(form, ["".join(pieces)]) == ("".join(pieces), [])
