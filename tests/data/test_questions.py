"""Questions are found again in the prompts of every template."""

from pathlib import Path
from typing import Any

import pytest

from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import encode_prompt
from qlora_jax.data.questions import questions_of
from qlora_jax.data.render import alpaca_prompt

SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def asked(messages: list[Any], tokenizer: Any, template: Any) -> str:
    return questions_of([encode_prompt(messages, tokenizer, template=template)], tokenizer)[0]


@pytest.mark.parametrize("chat_template", [None, WITH_DEFAULT_SYSTEM])
@pytest.mark.parametrize("before", [[], [SYSTEM], EARLIER, [SYSTEM, *EARLIER]])
def test_the_last_question_of_a_chat(chat_template: str | None, before: list[Any], tokenizer: Any) -> None:
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    question = "What is\n  it: a <|im_end|>-like text?"
    assert asked([*before, {"role": "user", "content": question}], tokenizer, "chat") == question


@pytest.mark.parametrize("before", [[], EARLIER])
def test_the_last_question_of_guanaco(before: list[Any], tokenizer: Any) -> None:
    assert asked([*before, {"role": "user", "content": "What is it?"}], tokenizer, "guanaco") == "What is it?"


def test_an_instruction_with_and_without_input(tokenizer: Any) -> None:
    assert asked([{"role": "user", "content": "Add."}], tokenizer, "alpaca") == "Add."
    tokens = encode_prompt(alpaca_prompt("Add.", "1 2"), tokenizer, template="plain")
    assert questions_of([tokens], tokenizer) == ["Add.\n\n### Input:\n1 2"]


def test_a_plain_prompt_is_shown_whole(tokenizer: Any) -> None:
    assert asked([{"role": "user", "content": "Once upon a time"}], tokenizer, "plain") == "Once upon a time"
