"""Rows of conversations by templates with habits of their own, each written here in short; about 2 seconds."""

from typing import Any

import numpy as np
import pytest
from peer_templates import CALL, TOOL, answer, letters_for, system, user
from test_chat_answers import encoded, runs

from qlora_jax.data import DataError, encode, encode_all, encode_preferences, encode_prompt
from qlora_jax.data.chat_rows import FIRST_ANSWER, FOUND_BY_CONTENT, TOOLS_NOT_DEFINED

LOOP = "{% for message in messages %}"
CHATML = (
    LOOP + "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The system message stands before the last question, and nowhere if an answer follows, as in Mistral 7B v0.3.
MOVES_SYSTEM = (
    "{{ '<s>' }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    + LOOP
    + "{% if message.role == 'user' %}{{ '[INST] ' + (system + '\n\n' if loop.last and system else '')"
    " + message.content + '[/INST]' }}{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
    "{% endif %}{% endfor %}"
)
# A final EOS after all messages, as in Phi-3.
FINAL_EOS = (
    LOOP + "{{ '<|' + message.role + '|>\n' + message.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# Reasoning is dropped from every answer, and the prompt opens it, as in the distilled DeepSeek-R1.
OPENS_REASONING = (
    LOOP + "{% if message.role == 'user' %}{{ '<|User|>' + message.content }}{% else %}"
    "{{ '<|Assistant|>' + message.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The header of the next answer is always written, as in Command-R7B.
ALWAYS_HEADER = (
    LOOP + "{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}{{ '<|assistant|><|text|>' }}"
).replace("<|' + message.role + '|>'", "<|' + message.role + '|>' + ('<|text|>' if message.role == 'assistant' else '')")
# EOS stands before a further turn only, as in Apertus.
EOS_BETWEEN = (
    LOOP + "{% if message.role == 'user' %}{{ (eos_token if loop.index0 else '') + '<|user|>' + message.content }}"
    "{% else %}{{ '<|assistant|>' + message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# No end of a turn but EOS after all messages.
ONLY_FINAL_EOS = (
    LOOP + "{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt else eos_token }}"
)
TALK = [user("A fruit?"), answer("Pear."), user("A tree?"), answer("Oak."), user("A fish?"), answer("Cod.")]


def learned(source: str, messages: list[dict[str, Any]], eos: str = "</s>", **options: Any) -> list[list[tuple[str, str]]]:
    tokenizer = letters_for(source, eos)
    return [runs(example, tokenizer) for example in encoded(tokenizer, messages, **options)[0]]


def test_one_row_where_every_message_is_written_alike() -> None:
    (row,) = learned(CHATML, TALK, "<|im_end|>")
    assert [text for _, text in row] == ["Pear.<|im_end|>", "Oak.<|im_end|>", "Cod.<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            MOVES_SYSTEM,
            [
                [("<s>[INST] S\n\nA fruit?[/INST]", " Pear.</s>")],
                [("<s>[INST] A fruit?[/INST] Pear.</s>[INST] S\n\nA tree?[/INST]", " Oak.</s>")],
            ],
        ),
        (
            FINAL_EOS,
            [
                [("<|system|>\nS<|end|>\n<|user|>\nA fruit?<|end|>\n<|assistant|>\n", "Pear.<|end|>\n</s>")],
                [
                    (
                        "<|system|>\nS<|end|>\n<|user|>\nA fruit?<|end|>\n<|assistant|>\nPear.<|end|>\n"
                        "<|user|>\nA tree?<|end|>\n<|assistant|>\n",
                        "Oak.<|end|>\n</s>",
                    )
                ],
            ],
        ),
        (
            ONLY_FINAL_EOS,
            [
                [("system: S\nuser: A fruit?\nassistant: ", "Pear.\n</s>")],
                [("system: S\nuser: A fruit?\nassistant: Pear.\nuser: A tree?\nassistant: ", "Oak.\n</s>")],
            ],
        ),
    ],
    ids=["a moved system message", "a final EOS", "EOS as the only end"],
)
def test_a_template_that_rewrites_earlier_turns_takes_a_row_for_each(source: str, expected: Any) -> None:
    assert learned(source, [system("S"), *TALK[:4]]) == expected


def test_the_account_says_how_many_rows_there_are() -> None:
    tokenizer = letters_for(FINAL_EOS, "</s>")
    _, report = encode_all([{"messages": TALK}, {"messages": TALK[:2]}], tokenizer, max_length=500, progress=False)
    assert (report.rows, report.kept, report.examples) == (2, 2, 4)
    assert "2 of 2 rows kept" in str(report)
    assert "4 examples" in str(report)
    with pytest.raises(DataError, match="found 3 rows, because the chat template writes earlier turns otherwise"):
        encode({"messages": TALK}, tokenizer)


def test_rows_that_are_too_long_are_said() -> None:
    tokenizer = letters_for(FINAL_EOS, "</s>")
    (first, second), report = encode_all([{"messages": TALK}], tokenizer, max_length=70, progress=False)
    assert [text for _, text in runs(first, tokenizer)] == ["Pear.<|end|>\n</s>"]
    assert [text for _, text in runs(second, tokenizer)] == ["Oak.<|end|>\n</s>"]
    assert (report.kept, report.truncated, report.longest_row) == (1, 1, 81)
    assert "1 cut to 70 tokens (the longest had 81)" in str(report)


def test_opened_reasoning_goes_on_with_that_of_the_answer() -> None:
    # The reasoning of the first answer is in the question as well.
    talk = [user("Add.?"), answer("<think>\nAdd.\n</think>\n\n4"), user("n"), answer("5", reasoning_content="Count.")]
    assert learned(OPENS_REASONING, talk) == [
        [("<|User|>Add.?<|Assistant|><think>\n", "Add.\n</think>\n\n4<|end|></s>")],
        [("<|User|>Add.?<|Assistant|>\n\n4<|end|><|User|>n<|Assistant|><think>\n", "Count.\n</think>\n\n5<|end|></s>")],
    ]


def test_an_answer_without_reasoning_is_found_by_its_content() -> None:
    tokenizer = letters_for(OPENS_REASONING, "</s>")
    # The header holds the text of the second question.
    (example,), report = encoded(tokenizer, [user("Sum?"), answer("4"), user("think"), answer("<5")])
    assert runs(example, tokenizer) == [
        ("<|User|>Sum?<|Assistant|>", "4<|end|>"),
        ("<|User|>Sum?<|Assistant|>4<|end|><|User|>think<|Assistant|>", "<5<|end|></s>"),
    ]
    assert report.notes == {FOUND_BY_CONTENT: 1}


def test_a_header_that_is_always_written_is_no_part_of_the_answer() -> None:
    assert learned(ALWAYS_HEADER, TALK[:4]) == [
        [
            ("<|user|>A fruit?<|end|><|assistant|><|text|>", "Pear.<|end|>"),
            (
                "<|user|>A fruit?<|end|><|assistant|><|text|>Pear.<|end|><|user|>A tree?<|end|><|assistant|><|text|>",
                "Oak.<|end|></s>",
            ),
        ]
    ]


def test_eos_that_is_written_before_a_further_turn_is_learned() -> None:
    ((first, second),) = learned(EOS_BETWEEN, TALK[:4])
    assert first == ("<|user|>A fruit?<|assistant|>", "Pear.</s>")
    assert second[1] == "Oak.</s>"


def test_an_answer_that_is_not_learned_is_context() -> None:
    talk = [*TALK[:1], answer("Pear.", weight=0), *TALK[2:4]]
    ((only,),) = learned(CHATML, talk, "<|im_end|>")
    assert only[1] == "Oak.<|im_end|>"
    assert "Pear.<|im_end|>" in only[0]
    # Not even if the prompts are learned.
    tokenizer = letters_for(CHATML, "<|im_end|>")
    (example,), _ = encoded(tokenizer, talk, train_on_source=True)
    texts = [text for _, text in runs(example, tokenizer)]
    assert len(texts) == 2
    assert texts[0].endswith("<|im_start|>assistant\n")
    assert texts[1].startswith("\n<|im_start|>user\nA tree?")


def test_sources_are_learned_once_in_several_rows() -> None:
    tokenizer = letters_for(FINAL_EOS, "</s>")
    first, second, third = encoded(tokenizer, TALK, train_on_source=True)[0]
    assert first.loss_mask[1:].all()
    assert [text for _, text in runs(second, tokenizer)] == ["A tree?<|end|>\n<|assistant|>\nOak.<|end|>\n</s>"]
    assert [text for _, text in runs(third, tokenizer)] == ["A fish?<|end|>\n<|assistant|>\nCod.<|end|>\n</s>"]


@pytest.mark.parametrize("weights", [(1, 1, 1), (0, 0, 1), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("source", [FINAL_EOS, MOVES_SYSTEM], ids=["final_eos", "moves_system"])
def test_a_message_that_occurs_in_a_marker_is_found(source: str, weights: tuple[int, ...]) -> None:
    """What is learned does not depend on the letters of the questions."""
    tokenizer = letters_for(source, "</s>")

    def masks(question: str) -> list[list[bool]]:
        talk = [part for weight in weights for part in (user(question), answer("Pear.", weight=weight))]
        return [example.loss_mask.tolist() for example in encoded(tokenizer, talk, train_on_source=True)[0]]

    for question in ("assistant", "user", "end", "INST", "<"):
        assert masks(question) == masks("ZqZqZqZqZ"[: len(question)])


def test_tags_of_whole_messages_are_learned_without_the_header() -> None:
    tagged = (
        LOOP + "{% if message.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' + message.content }}"
        "{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = letters_for(tagged, "<|im_end|>")
    (example,), _ = encoded(tokenizer, TALK[:4])
    assert [text for _, text in runs(example, tokenizer)] == ["Pear.<|im_end|>\n", "Oak.<|im_end|>\n"]
    assert (example.tokens == tokenizer.eos_token_id).sum() == 4


def test_a_first_message_of_the_assistant_is_context() -> None:
    tokenizer = letters_for(CHATML, "<|im_end|>")
    (example,), report = encoded(tokenizer, [answer("Hello."), *TALK[:2]])
    assert [text for _, text in runs(example, tokenizer)] == ["Pear.<|im_end|>"]
    assert report.notes == {FIRST_ANSWER: 1}
    with pytest.raises(DataError, match="expected a message before the first answer"):
        encoded(tokenizer, [answer("Hello.")])


def test_a_pair_of_preferences_is_the_row_of_its_answers() -> None:
    tokenizer = letters_for(FINAL_EOS, "</s>")
    row = {"prompt": TALK[:3], "chosen": [answer("Oak.")], "rejected": [answer("Pike.")]}
    (pair,), _ = encode_preferences([row], tokenizer, max_length=500)
    np.testing.assert_array_equal(pair.prompt, encode_prompt(TALK[:3], tokenizer))
    assert [text for _, text in runs(pair.chosen, tokenizer)] == ["Oak.<|end|>\n</s>"]


def test_what_a_template_drops_is_named() -> None:
    deaf = CHATML.replace("message.content", "(message.content if message.role != 'system' else '')")
    first = system("Be brief."), user("A fruit?"), answer("Pear.")
    # The system message then stands in the first user turn, in prompts as well.
    ((row,),) = learned(deaf, list(first), "<|im_end|>")
    assert "Be brief.\n\nA fruit?" in row[0]
    tokenizer = letters_for(deaf, "<|im_end|>")
    assert tokenizer.decode(encode_prompt(first[:2], tokenizer).tolist()) == row[0]
    with pytest.raises(
        DataError, match=r"row 0 .*drops the reasoning of message 1 \(assistant\), found no 'Why\.' in its text"
    ):
        learned(CHATML, [user("A fruit?"), answer("Pear.", reasoning_content="Why.")])
    with pytest.raises(DataError, match="drops the call of message 1 "):
        learned(CHATML, [user("The weather?"), answer("", tool_calls=[CALL])])
    with pytest.raises(DataError, match="drops the tools of this conversation, found no 'weather'"):
        learned(CHATML, TALK, tools=[TOOL])
    half = CHATML.replace("message.content +", "message.content[:9] +")
    with pytest.raises(DataError, match=r"drops the content of message 2 \(user\), found no 'A longer question\?'"):
        learned(half, [*TALK[:2], user("A longer question?"), answer("Yes.")])


def test_what_a_template_changes_is_not_dropped() -> None:
    changes = CHATML.replace("message.content +", "message.content.replace('/no_think', '').title() | trim | tojson +")
    talk = [system("be brief. /no_think"), user('a "fruit"?\n'), answer("Pear.")]
    ((row,),) = learned(changes, talk, "<|im_end|>")
    assert row == (
        '<|im_start|>system\n"Be Brief."<|im_end|>\n<|im_start|>user\n"A \\"Fruit\\"?"<|im_end|>\n<|im_start|>assistant\n',
        '"Pear."<|im_end|>',
    )


def test_tools_that_are_only_called_are_said() -> None:
    calls = CHATML.replace(
        "message.content +", "message.content + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    tokenizer = letters_for(calls, "<|im_end|>")
    _, report = encoded(tokenizer, [user("Rain?"), answer("", tool_calls=[CALL])], tools=[TOOL])
    assert report.notes == {TOOLS_NOT_DEFINED: 1}


def test_several_templates_of_one_tokenizer() -> None:
    tokenizer = letters_for(CHATML, "<|im_end|>")
    with_tools = CHATML.replace("{% for", "{{ tools | tojson }}{% for", 1).replace(
        "message.content +", "message.content + (message.tool_calls | tojson if message.tool_calls else '') +"
    )
    tokenizer.chat_template = {"default": CHATML, "tool_use": with_tools}  # pyright: ignore[reportAttributeAccessIssue]
    assert [text for _, text in runs(encoded(tokenizer, TALK[:2])[0][0], tokenizer)] == ["Pear.<|im_end|>"]
    (example,), _ = encoded(tokenizer, [user("Rain?"), answer("", tool_calls=[CALL])], tools=[TOOL])
    ((before, called),) = runs(example, tokenizer)
    assert '"description": "The weather of a city."' in before
    assert called.startswith('[{"')


def test_the_rows_of_a_conversation_are_known_as_such() -> None:
    """They are held out together; a conversation in one row, and the rows of a long text, stand alone."""
    tokenizer = letters_for(FINAL_EOS)
    short, pieces = [{"messages": TALK[:2]}], [{"text": "A pear, an oak and a cod. " * 9}]
    records: list[dict[str, Any]] = [*short, {"messages": TALK}, *short, *pieces, {"messages": TALK[2:]}]
    examples, _ = encode_all(records, tokenizer, max_length=80, progress=False)
    numbers = [example.conversation for example in examples]
    assert numbers[:5] == [None, 1, 1, 1, None]
    assert numbers[5:] == [None] * (len(examples) - 7) + [4, 4]
    assert len(examples) > 8
