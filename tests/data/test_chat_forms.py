"""The forms of conversations that templates expect: what each form is, and that training and prompts use the same one."""

from typing import Any

import pytest
from peer_templates import CALL, RESULT, answer, letters_for, system, user
from test_chat_answers import encoded, runs

from qlora_jax.data import DataError, chat_prompt, encode_prompt
from qlora_jax.data.chat_forms import SYSTEM_IN_USER_TURN, forms_of

LOOP = "{% for message in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
REFUSES_SYSTEM = (
    LOOP + "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}" + END
)
# The second message has to be the assistant's, so that a system message is an error of the order.
ALTERNATES = (
    LOOP + "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must\nalternate.') }}"
    "{% endif %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}" + END
)
PARTS = (
    LOOP + "{{ '<|' + message.role + '|>' }}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{{ '<|end|>' }}" + END
)
CALLS = (
    LOOP + "{{ '<|' + message.role + '|>' + message.content }}{% for call in message.tool_calls or [] %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif %}"
    "{{ call.function.name + ' ' + call.function.arguments + ' ' + call.id }}{% endfor %}"
    "{% if message.role == 'tool' %}{{ message.name + ' ' + message.tool_call_id }}{% endif %}{{ '<|end|>' }}" + END
)
TALK = [system("Be brief."), user("A fruit?"), answer("Pear.")]


@pytest.mark.parametrize("source", [REFUSES_SYSTEM, ALTERNATES])
def test_a_refused_system_message_stands_in_the_first_user_turn(source: str) -> None:
    tokenizer = letters_for(source, "</s>")
    (example,), report = encoded(tokenizer, TALK)
    ((before, learned),) = runs(example, tokenizer)
    assert (before, learned) == ("<|user|>Be brief.\n\nA fruit?<|end|><|assistant|>", "Pear.<|end|></s>")
    assert report.notes == {SYSTEM_IN_USER_TURN: 1}
    assert SYSTEM_IN_USER_TURN in str(report)
    assert chat_prompt(TALK[:2], tokenizer) == (before, (SYSTEM_IN_USER_TURN,))
    assert tokenizer.decode(encode_prompt(TALK[:2], tokenizer).tolist()) == before
    assert chat_prompt(TALK[1:2], tokenizer)[1] == ()


def test_a_system_message_without_a_user_turn_after_it_is_an_error_of_one_line() -> None:
    tokenizer = letters_for(ALTERNATES, "</s>")
    for messages in ([system("Be brief.")], [system("Be brief."), answer("Yes.")], [user("A"), user("B")]):
        with pytest.raises(DataError, match=r"refuses this conversation: Roles must alternate; choose another ") as error:
            encode_prompt(messages, tokenizer)
        assert "\n" not in str(error.value)


def test_errors_count_the_messages_of_the_data() -> None:
    tokenizer = letters_for(REFUSES_SYSTEM, "</s>")
    with pytest.raises(DataError, match=r"drops the reasoning of message 2 \(assistant\), found no 'Why\.'"):
        encoded(tokenizer, [*TALK[:2], answer("Pear.", reasoning_content="Why.")])


def test_content_as_parts() -> None:
    tokenizer = letters_for(PARTS, "</s>")
    (example,), _ = encoded(tokenizer, TALK)
    assert runs(example, tokenizer)[0][1] == "Pear.<|end|></s>"
    assert chat_prompt(TALK[:2], tokenizer)[0] == "<|system|>Be brief.<|end|><|user|>A fruit?<|end|><|assistant|>"


def test_calls_with_arguments_as_text_and_ids_of_nine_characters() -> None:
    tokenizer = letters_for(CALLS, "</s>")
    call: dict[str, Any] = CALL | {"id": "call_1"}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "dry"}
    messages = [user("Rain?"), answer("", tool_calls=[call]), result, answer("No.")]
    (example,), _ = encoded(tokenizer, messages)
    called, last = runs(example, tokenizer)
    name, city, key, identifier = called[1].removesuffix("<|end|>").split()
    assert (name, city, key) == ("weather", '{"city":', '"Lima"}')
    assert len(identifier) == 9
    assert identifier.isalnum()
    assert f"<|tool|>dryweather {identifier}<|end|>" in last[0]


def test_the_conversation_itself_is_the_first_form() -> None:
    messages = [*TALK, user("Rain?"), answer("", tool_calls=[CALL]), RESULT]
    forms = list(forms_of(messages))
    assert list(forms[0].messages) == messages
    assert len(forms) == 1 + 4 + 6
    assert messages[0] == system("Be brief.")  # nothing is changed in place
    assert len(list(forms_of(TALK[1:]))) == 2
    assert len(list(forms_of(TALK[1:], parts=False))) == 1


@pytest.mark.parametrize("text", ['for i:\n  x = "1"', "it's", "C:\\dir\n", "'\"\u00fc"])
@pytest.mark.parametrize(
    "written",
    [
        "{{ value | tojson }}",
        "{{ [value] }}",  # a list is written as Python does
        "{{ \"'\" + (value | replace('\\\\', '\\\\\\\\') | replace(\"'\", \"\\\\'\") | replace('\\n', '\\\\n')) + \"'\" }}",
    ],
)
def test_arguments_in_the_escapes_of_json_and_python(written: str, text: str) -> None:
    calls = "{% for call in message.tool_calls or [] %}{% for value in call.function.arguments.values() %}" + written
    source = (
        LOOP + "{{ '<|' + message.role + '|>' + message.content }}" + calls + "{% endfor %}{% endfor %}{{ '<|end|>' }}" + END
    )
    call = CALL | {"function": {"name": "weather", "arguments": {"code": text}}}
    tokenizer = letters_for(source, "</s>")
    (example,), _ = encoded(tokenizer, [user("Now?"), answer("weather", tool_calls=[call]), RESULT, answer("Done.")])
    assert len(runs(example, tokenizer)) == 2
