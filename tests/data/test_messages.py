"""Messages of other forms: what they become, and that a chat template writes of them what transformers writes."""

import json
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, encode, encode_all
from qlora_jax.data.messages import checked_messages
from qlora_jax.data.schemas import parse

# As Qwen writes tools and calls, shortened; the answers and calls of the assistant are tagged.
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{{ '<call>' + call.function.name + ' ' + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
OPENAI = [
    {"role": "user", "content": "Rain in Lima?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Lima", "at": null}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "dry"},
    {"role": "assistant", "content": "No."},
]
# What a template is to be given, as transformers' documentation says: arguments as an object.
FOR_TEMPLATE = [
    OPENAI[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "id": "1", "function": {"name": "weather", "arguments": {"city": "Lima", "at": None}}}
        ],
    },
    *OPENAI[2:],
]
Make = Callable[..., PreTrainedTokenizerFast]


def of_transformers(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], tools: list[Any] | None
) -> tuple[list[int], list[int]]:
    out: Any = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def agrees(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, expected: tuple[list[int], list[int]]) -> None:
    example = encode(row, tokenizer, template="chat")
    np.testing.assert_array_equal(example.tokens, expected[0])
    np.testing.assert_array_equal(example.loss_mask, np.array(expected[1], bool))


def test_tool_calls_as_transformers_renders_and_masks_them(make_chatml: Make) -> None:
    tokenizer = make_chatml(TOOLS_TEMPLATE)
    expected = of_transformers(tokenizer, FOR_TEMPLATE, [TOOL])
    text = tokenizer.decode(expected[0])
    assert '<call>weather {"city": "Lima", "at": null}<|im_end|>' in text
    agrees({"messages": OPENAI, "tools": [TOOL]}, tokenizer, expected)
    agrees({"messages": OPENAI, "tools": json.dumps([TOOL])}, tokenizer, expected)
    # Without tags the answers are found by prefixes: the same tokens and the same mask.
    untagged = make_chatml(TOOLS_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    agrees({"messages": OPENAI, "tools": [TOOL]}, untagged, expected)


def test_rows_with_unlike_tools_keep_their_own(make_chatml: Make) -> None:
    tokenizer = make_chatml(TOOLS_TEMPLATE)
    other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"messages": OPENAI, "tools": [TOOL]},
        {"messages": chat, "tools": None},
        {"messages": chat, "tools": [other]},
        {"messages": OPENAI, "tools": [TOOL, other]},
    ]
    through_arrow = datasets.Dataset.from_list([row | {"tools": json.dumps(row["tools"] or [])} for row in rows])
    for records in (rows, through_arrow):
        examples, _ = encode_all(records, tokenizer, max_length=2000, progress=False)
        for row, example in zip(rows, examples, strict=True):
            messages = FOR_TEMPLATE if row["messages"] is OPENAI else chat
            assert example.tokens.tolist() == of_transformers(tokenizer, messages, row["tools"])[0]


def test_sharegpt_is_the_same_conversation(tagged: PreTrainedTokenizerFast) -> None:
    turns = [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello"), ("human", "Bye"), ("gpt", "Good day")]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles.get(speaker, speaker), "content": text} for speaker, text in turns]
    expected = of_transformers(tagged, messages, None)
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    agrees({"conversations": conversations}, tagged, expected)
    agrees({"system": "Be kind.", "conversations": conversations[1:]}, tagged, expected)
    agrees({"conversations": messages}, tagged, expected)


def test_sharegpt_with_a_function_call(make_chatml: Make) -> None:
    tokenizer = make_chatml(TOOLS_TEMPLATE)
    row = {
        "conversations": [
            {"from": "human", "value": "Rain in Lima?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Lima"}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([TOOL]),
    }
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    messages = [
        {"role": "user", "content": "Rain in Lima?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]
    agrees(row, tokenizer, of_transformers(tokenizer, messages, [TOOL]))


def test_tools_that_the_template_leaves_out_are_an_error(tagged: PreTrainedTokenizerFast, make_chatml: Make) -> None:
    with pytest.raises(DataError, match=r"row 1 .*drops the call of message 1 .*, found no 'weather'"):
        encode_all([{"question": "Q", "answer": "A"}, {"messages": OPENAI}], tagged, max_length=500, progress=False)
    with pytest.raises(DataError, match="'guanaco': expected a conversation without tools"):
        encode({"messages": OPENAI}, make_chatml(TOOLS_TEMPLATE), template="guanaco")


def test_a_template_that_fails_names_the_row(make_chatml: Make) -> None:
    # Text and a number cannot be added: a TypeError of Python inside the template.
    broken = make_chatml("{% for message in messages %}{{ message['content'] + message['n'] }}{% endfor %}")
    answer = {"role": "assistant", "content": "A", "n": "a"}
    rows = [{"messages": [{"role": "user", "content": "Q", "n": n}, answer]} for n in ("a", 3)]
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): the chat template refuses this conversation: can only"):
        encode_all(rows, broken, max_length=500, progress=False)
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): the chat template refuses .* 'missing' is undefined"):
        encode_all([{"question": "Q", "answer": "A"}], make_chatml("{{ missing.thing }}"), max_length=50, progress=False)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "Hi"}]},
            "message 0, from: expected user, assistant, .*'narrator'",
        ),
        (
            {"conversations": [{"from": "human", "value": {}}]},
            "'conversations', message 0, value: expected text, found dict",
        ),
        ({"conversations": [{"from": "human"}]}, r"message 0: expected the keys role and content, found \['from'\]"),
        ({"conversations": "Hi"}, "column 'conversations': expected a list of messages, found str"),
        (
            {"conversations": [{"from": "function_call", "value": "weather"}]},
            "0, value: expected JSON, found 'weather'",
        ),
        ({"conversations": [{"from": "system", "value": "S"}], "system": "T"}, "expected no system message"),
        (
            {"messages": [{"role": "assistant", "tool_calls": "x"}]},
            "0, tool_calls: expected a list of calls, found str",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "expected a function with a name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments of f: expected JSON, found '{'",
        ),
        ({"messages": [], "tools": [3]}, "column 'tools': expected a list of objects, found list"),
        ({"messages": [], "tools": "{"}, "column 'tools': expected JSON"),
    ],
)
def test_wrong_messages(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        parse(row)


def messages_of(*messages: Any) -> list[Any]:
    return list(parse({"messages": list(messages)}).messages)


@pytest.mark.parametrize(
    ("names", "role"),
    [
        (("user", "human", "Human", " USER ", "prompter", "customer"), "user"),
        (("assistant", "gpt", "GPT", "model", "bot", "ai", "chatgpt", "chatbot"), "assistant"),
        (("system", "System", "developer"), "system"),
        (("tool", "function", "observation", "ipython", "function response", "tool-response", "FUNCTION_RESULT"), "tool"),
    ],
)
def test_roles_by_every_common_name(names: tuple[str, ...], role: str) -> None:
    for name in names:
        for role_key, content_key in (("role", "content"), ("from", "value"), ("from", "content"), ("role", "text")):
            assert messages_of({role_key: name, content_key: "x"}) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": " b"}], "a b"),
        ([{"type": "input_text", "text": "a"}, "b"], "ab"),
        ([{"text": "a"}], "a"),
        ({"type": "text", "text": "a"}, "a"),
        ({"content_type": "text", "parts": ["a", "b"]}, "ab"),
        (["a"], "a"),
        (5, "5"),
        (True, "true"),
    ],
)
def test_contents_of_parts(content: Any, text: str) -> None:
    assert messages_of({"role": "user", "content": content}) == [{"role": "user", "content": text}]
    assert messages_of({"from": "gpt", "value": content}) == [{"role": "assistant", "content": text}]
    assert messages_of({"role": "model", "parts": [{"text": text}]}) == [{"role": "assistant", "content": text}]


def test_what_a_tool_returns_may_be_any_value() -> None:
    for value, text in (({"t": 5}, '{"t": 5}'), ([{"t": 5}], '[{"t": 5}]'), ([], "[]"), ("ü", "ü"), ([{"text": "a"}], "a")):
        assert messages_of({"role": "tool", "content": value}) == [{"role": "tool", "content": text}]


@pytest.mark.parametrize(
    "call",
    [
        {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "Lima"}'}},
        {"function_call": {"name": "weather", "arguments": {"city": "Lima"}}},
        {"content": "", "tool_calls": [{"name": "weather", "arguments": {"city": "Lima"}}], "function_call": None},
        {"content": None, "tool_calls": {"function": {"name": "weather", "parameters": {"city": "Lima"}}}},
    ],
)
def test_calls_of_the_older_form(call: dict[str, Any]) -> None:
    (message,) = messages_of({"role": "assistant"} | call)
    called = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    assert message == {"role": "assistant", "content": "", "tool_calls": [called]}
    text = messages_of({"role": "tool_call", "content": json.dumps({"name": "weather", "arguments": {"city": "Lima"}})})
    assert text == [message]
    assert messages_of({"role": "function", "name": "weather", "content": "sun"}) == [
        {"role": "tool", "content": "sun", "name": "weather"}
    ]


def test_functions_are_tools() -> None:
    row = {"messages": OPENAI, "functions": [TOOL["function"]]}
    assert parse(row).tools == parse({"messages": OPENAI, "tools": [TOOL]}).tools == (TOOL,)


@pytest.mark.parametrize(
    ("mark", "learned"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": "0"}, False),
        ({"train": False}, False),
        ({"training": "false"}, False),
        ({"loss": False}, False),
        ({"weight": 1}, True),
        ({"train": True}, True),
        ({"weight": None}, True),
        ({"loss": 1.25}, True),
        ({"loss": 0.0}, True),
        ({"weight": 1, "train": False}, False),
    ],
)
@pytest.mark.parametrize("template", ["chat", "guanaco"])
def test_answers_that_are_not_learned(chatml: Any, tagged: Any, mark: dict[str, Any], learned: bool, template: Any) -> None:
    turns = [("human", "Peru?"), ("gpt", "Quito."), ("human", "Sure?"), ("gpt", "No: Lima.")]
    row = {"conversations": [{"from": name, "value": text} for name, text in turns]}
    plain = [{"role": ROLES[name], "content": text} for name, text in turns]
    row["conversations"][1] |= mark
    row["conversations"][0] |= {"weight": 0}  # says nothing new of a question
    for tokenizer in (chatml, tagged):
        example, whole = (encode(one, tokenizer, template=template) for one in (row, {"messages": plain}))
        np.testing.assert_array_equal(example.tokens, whole.tokens)
        edges = np.flatnonzero(np.diff(example.loss_mask.astype(int)) == 1) + 1
        runs = [str(tokenizer.decode(example.tokens[edge : edge + 1])) for edge in edges]
        assert len(runs) == (2 if learned else 1)
        difference = str(tokenizer.decode(whole.tokens[whole.loss_mask & ~example.loss_mask]))
        assert difference.strip() == ("" if learned else "Quito.<|im_end|>" if template == "chat" else "Quito.")
        everything = encode(row, tokenizer, template=template, train_on_source=True)
        hidden = str(tokenizer.decode(everything.tokens[1:][~everything.loss_mask[1:]])).strip()
        assert hidden == difference.strip()


ROLES = {"human": "user", "gpt": "assistant"}


def test_a_mark_of_an_answer_that_says_nothing_is_an_error() -> None:
    for mark in ({"weight": 0.5}, {"weight": "half"}, {"train": "yes"}, {"weight": []}):
        with pytest.raises(DataError, match=r"message 0, (weight|train): expected 0 or 1 \(false or true\), found"):
            messages_of({"role": "assistant", "content": "A"} | mark)


def test_calls_may_be_json_text() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    for text in (json.dumps([call]), json.dumps(call["function"])):
        message = {"role": "assistant", "content": None, "tool_calls": text}
        assert checked_messages([message], "messages")[0]["tool_calls"] == [call]
