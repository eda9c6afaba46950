"""Chat templates by name and from files: against TRL's templates of the same families, and their errors."""

import json
from pathlib import Path
from typing import Any

import pytest
from peer_templates import CONVERSATIONS, TOOL, letters_for, trl_templates, user
from test_chat_answers import Peer, check_against_inference, encoded
from tokenizers import processors

from qlora_jax.data import CHAT_TEMPLATES, encode_prompt, read_chat_template, unknown_markers
from qlora_jax.errors import OptionError

PEERS = {str(case.values[0]): str(case.values[1]) for case in trl_templates()}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_every_message_alike(name: str) -> None:
    tokenizer = letters_for("<|im_start|><|im_end|>")
    tokenizer.chat_template = read_chat_template(name, tokenizer)
    for what in ("single", "multi", "system", "tags"):
        messages = CONVERSATIONS[what]
        examples, _ = encoded(tokenizer, messages)
        assert len(examples) == 1
        if name == "gemma" and what == "system":
            messages = [user(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]
        check_against_inference(examples, Peer(tokenizer, messages, None), tokenizer, by_content=False)


@pytest.mark.parametrize(
    ("name", "peer"), [("llama3", "llama3"), ("gemma", "gemma"), ("phi3", "phi3"), ("chatml", "qwen3_instruct_2507")]
)
def test_a_named_template_is_that_of_its_family(name: str, peer: str) -> None:
    if peer not in PEERS:
        pytest.skip("trl, to compare with, is not installed")
    tokenizer = letters_for(PEERS[peer])
    if "bos_token" in PEERS[peer]:
        put_bos_before(tokenizer)
    ours = read_chat_template(name, tokenizer)
    for what in ("single", "multi", "open") if name == "gemma" else ("single", "multi", "open", "system"):
        for prompt in (False, True):
            theirs, mine = (
                str(
                    tokenizer.apply_chat_template(
                        CONVERSATIONS[what], chat_template=template, tokenize=False, add_generation_prompt=prompt
                    )
                )
                for template in (PEERS[peer], ours)
            )
            assert mine == theirs.removesuffix(tokenizer.eos_token if name == "phi3" and not prompt else "")


def put_bos_before(tokenizer: Any) -> None:
    single = "<bos> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_bos_stands_once_where_the_tokenizer_puts_it(name: str) -> None:
    plain, with_bos = letters_for(""), letters_for("")
    put_bos_before(with_bos)
    for tokenizer, count in ((plain, 0), (with_bos, 1)):
        tokenizer.chat_template = read_chat_template(name, tokenizer)
        tokens = encode_prompt("Hi", tokenizer, template="chat").tolist()
        assert tokens.count(tokenizer.bos_token_id) == count
        assert tokens[:count] == [tokenizer.bos_token_id] * count


def test_chatml_writes_tools_and_reasoning() -> None:
    tokenizer = letters_for("<|im_start|><|im_end|>")
    tokenizer.chat_template = read_chat_template("chatml", tokenizer)
    for what in ("tools", "reasoning", "tools and reasoning"):
        examples, report = encoded(tokenizer, CONVERSATIONS[what], tools=[TOOL] if "tools" in what else None)
        assert len(examples) == 1
        assert not report.notes


def test_files_of_templates(tmp_path: Path) -> None:
    tokenizer = letters_for("")
    source = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(source, "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source}), "utf-8")
    (tmp_path / "bom.jinja").write_text(source, "utf-8-sig")
    named = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": source}]
    (tmp_path / "several.json").write_text(json.dumps({"chat_template": named}), "utf-8")
    (tmp_path / "by_name.json").write_text(json.dumps({"chat_template": {"default": source, "rag": "x"}}), "utf-8")
    for name in ("mine.jinja", "tokenizer_config.json", "bom.jinja", "several.json", "by_name.json"):
        assert read_chat_template(tmp_path / name, tokenizer) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{% for message in messages %}", "line 1: expected a Jinja program, found a syntax error"),
        (b"a\n{{ messages[ }}", "line 2: expected a Jinja program"),
        (b" \n", "expected a Jinja program, found an empty file"),
        (b"\xff\xfe", "expected UTF-8 text, found byte 0xff"),
        (b'{"model": 1}', "expected a text under chat_template, found NoneType"),
        (b'{"chat_template": [{"name": "rag", "template": "x"}, 3]}', "expected a text under chat_template, found NoneType"),
        (b'{"chat_template": ', "expected a Jinja program or JSON, found neither"),
    ],
)
def test_files_that_are_no_template(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "mine").write_bytes(text)
    with pytest.raises(OptionError, match=rf"chat_template: {tmp_path}/mine.*{message}") as error:
        read_chat_template(tmp_path / "mine", letters_for(""))
    assert "\n" not in str(error.value)


def test_markers_that_are_no_tokens() -> None:
    tokenizer = letters_for("<|im_start|>")
    assert unknown_markers(
        "{{ '<|im_start|>' + '<think>' + '<|im_end|>' + '<end_of_turn>' + '<|im_end|>' }}", tokenizer
    ) == [
        "<|im_end|>",
        "<end_of_turn>",
    ]


def test_case_and_hyphens_of_a_name_do_not_matter() -> None:
    tokenizer = letters_for("")
    for name, known in (
        ("ChatML", "chatml"),
        ("Llama-3", "llama3"),
        ("phi_4", "phi4"),
        ("Phi-3.5", "phi3"),
        ("gemma-2", "gemma"),
    ):
        assert read_chat_template(name, tokenizer) == read_chat_template(known, tokenizer)


def test_an_unknown_name() -> None:
    with pytest.raises(
        OptionError,
        match=r"expected a file or one of chatml, gemma, .*, found 'chatlm', which is neither; did you mean chatml\?$",
    ):
        read_chat_template("chatlm", letters_for(""))
    with pytest.raises(OptionError, match=r"found 'Llama-3\.1', which is neither; did you mean llama3\?$"):
        read_chat_template("Llama-3.1", letters_for(""))
    with pytest.raises(OptionError, match=r"found 'xyz', which is neither$"):
        read_chat_template("xyz", letters_for(""))
