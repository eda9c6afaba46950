"""Tokens and masks, against strings written by hand and against transformers' own mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, Example, NothingToLearn, Template, encode, encode_all, encode_prompt, load_records
from qlora_jax.data.schemas import parse

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Peru?"},
        {"role": "assistant", "content": "Lima."},
    ]
}
FLAT = {"text": "### Human: Hi ### Assistant: Hello there. ### Human: Bye ### Assistant: Good day.\n"}
ALPACA = {"instruction": "Name the sum.", "input": "2 + 3", "output": "5"}
PAIR = {"question": "Why?", "answer": "So."}
Make = Callable[..., PreTrainedTokenizerFast]


def learned_runs(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask.astype(int), [0]])))
    return [str(tokenizer.decode(example.tokens[start:end])) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def answer_of_transformers(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, as transformers has them from the template's `{% generation %}` tags."""
    out: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return np.asarray(out["input_ids"]), np.asarray(out["assistant_masks"], bool)


def text_of(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(example.tokens))


def test_chatml_learns_answers_and_their_ends_but_no_line_end(chatml: PreTrainedTokenizerFast) -> None:
    example = encode(CHAT, chatml)
    assert example.tokens.dtype == np.int32
    assert example.loss_mask.dtype == bool
    assert text_of(example, chatml) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis.<|im_end|>\n<|im_start|>user\nAnd of Peru?<|im_end|>\n"
        "<|im_start|>assistant\nLima.<|im_end|>\n"
    )
    assert learned_runs(example, chatml) == ["Paris.<|im_end|>", "Lima.<|im_end|>"]


def test_flat_text_stays_as_it_is_and_gains_one_end(bare: PreTrainedTokenizerFast) -> None:
    example = encode(FLAT, bare)
    assert text_of(example, bare) == FLAT["text"] + "<|endoftext|>"
    assert learned_runs(example, bare) == [" Hello there.", " Good day.\n<|endoftext|>"]


def test_flat_text_that_ends_in_a_question_is_not_closed(bare: PreTrainedTokenizerFast) -> None:
    example = encode({"text": "### Human: Hi ### Assistant: Hello. ### Human: Bye"}, bare)
    assert learned_runs(example, bare) == [" Hello."]
    assert bare.eos_token_id not in example.tokens


def test_plain_text_is_learned_whole(bare: PreTrainedTokenizerFast, inst: PreTrainedTokenizerFast) -> None:
    example = encode({"text": "Paris is the capital."}, bare)
    assert text_of(example, bare) == "Paris is the capital.<|endoftext|>"
    assert not example.loss_mask[0]
    assert example.loss_mask[1:].all()
    # With a token to begin with, the first word has something to be predicted from.
    assert learned_runs(encode({"text": "Paris."}, inst), inst) == ["Paris.</s>"]


def test_alpaca_prompt_and_answer(bare: PreTrainedTokenizerFast) -> None:
    example = encode(ALPACA, bare)
    assert text_of(example, bare) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nName the sum.\n\n"
        "### Input:\n2 + 3\n\n### Response: 5<|endoftext|>"
    )
    assert learned_runs(example, bare) == ["5<|endoftext|>"]
    without = text_of(encode({"instruction": "Say {x}.", "input": "", "output": "x"}, bare), bare)
    assert without == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay {x}.\n\n### Response: x<|endoftext|>"
    )


def test_instructions_of_either_name_are_one_form(bare: PreTrainedTokenizerFast) -> None:
    ours = encode(ALPACA, bare)
    other = encode({"instruction": ALPACA["instruction"], "context": ALPACA["input"], "response": ALPACA["output"]}, bare)
    np.testing.assert_array_equal(other.tokens, ours.tokens)
    np.testing.assert_array_equal(other.loss_mask, ours.loss_mask)


def test_prompts_and_completions_are_joined_as_they_are(chatml: PreTrainedTokenizerFast) -> None:
    example = encode({"prompt": "Task: sum\nOutput:", "completion": " 5"}, chatml)
    assert text_of(example, chatml) == "Task: sum\nOutput: 5<|im_end|>"
    assert learned_runs(example, chatml) == [" 5<|im_end|>"]
    chat = encode({"prompt": "Sum?", "completion": "5"}, chatml, template="chat")
    assert learned_runs(chat, chatml) == ["5<|im_end|>"]


def test_a_completion_is_learned_whole_whatever_it_holds(chatml: PreTrainedTokenizerFast) -> None:
    for text in ("Once upon a time.", FLAT["text"], "\n\nHuman: Hi\n\nAssistant: Hello"):
        example = encode({"completion": text}, chatml)
        assert text_of(example, chatml) == text + "<|im_end|>"
        assert not example.loss_mask[0]
        assert example.loss_mask[1:].all()
    _, report = encode_all([{"completion": FLAT["text"]}], chatml, max_length=200, progress=False)
    assert report.templates == {"guanaco": 1}
    with pytest.raises(DataError, match="expected a conversation, found a text without turns"):
        encode({"completion": FLAT["text"]}, chatml, template="chat")


def test_pairs_use_the_chat_template_if_there_is_one(chatml: PreTrainedTokenizerFast, bare: PreTrainedTokenizerFast) -> None:
    assert text_of(encode(PAIR, chatml), chatml) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    )
    example = encode({"input": "Answer:", "output": "A"}, bare)
    assert text_of(example, bare) == "Answer:A<|endoftext|>"
    assert learned_runs(example, bare) == ["A<|endoftext|>"]


@pytest.mark.parametrize(
    ("record", "template", "text", "runs"),
    [
        (CHAT, "guanaco", "Be brief.\n### Human: What is the capital of France? ### Assistant: Paris. "
         "### Human: And of Peru? ### Assistant: Lima.<|im_end|>", [" Paris.", " Lima.<|im_end|>"]),
        (FLAT, "chat", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello there.<|im_end|>\n"
         "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nGood day.<|im_end|>\n",
         ["Hello there.<|im_end|>", "Good day.<|im_end|>"]),
        (ALPACA, "chat", "<|im_start|>user\nName the sum.\n\n2 + 3<|im_end|>\n"
         "<|im_start|>assistant\n5<|im_end|>\n",
         ["5<|im_end|>"]),
        (ALPACA, "guanaco", "### Human: Name the sum.\n\n2 + 3 ### Assistant: 5<|im_end|>", [" 5<|im_end|>"]),
        (ALPACA, "plain", "Name the sum.\n\n2 + 35<|im_end|>", ["5<|im_end|>"]),
        (PAIR, "plain", "Why?So.<|im_end|>", ["So.<|im_end|>"]),
        (PAIR, "guanaco", "### Human: Why? ### Assistant: So.<|im_end|>", [" So.<|im_end|>"]),
    ],
)  # fmt: skip
def test_any_schema_in_another_template(
    chatml: PreTrainedTokenizerFast, record: dict[str, object], template: Template, text: str, runs: list[str]
) -> None:
    example = encode(record, chatml, template=template)
    assert text_of(example, chatml) == text
    assert learned_runs(example, chatml) == runs


@pytest.mark.parametrize(
    ("record", "template", "expected"),
    [
        (
            CHAT,
            "alpaca",
            "'alpaca': expected one user message and one answer, found system, user, assistant, user",
        ),
        (CHAT, "plain", "'plain': expected one user message and one answer, found system"),
        ({"text": "No turns"}, "chat", "'chat': expected a conversation, found a text without turns"),
        ({"text": "No turns"}, "guanaco", "'guanaco': expected turns, found none"),
        ({"text": "No turns"}, "alpaca", "'alpaca': expected one user message .* found a text without turns"),
        ({"messages": []}, "chat", "'chat': expected a conversation, found no messages"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "guanaco", "expected the roles .* found 'tool'"),
        (PAIR, "llama", "expected one of auto, chat, guanaco, alpaca, plain, found 'llama'"),
    ],
)
def test_what_a_template_cannot_express(
    chatml: PreTrainedTokenizerFast, record: dict[str, object], template: Template, expected: str
) -> None:
    with pytest.raises(DataError, match=expected):
        encode(record, chatml, template=template)


def test_chat_without_a_chat_template(bare: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="expected a tokenizer with a chat template, found one without"):
        encode(CHAT, bare)


def test_template_with_its_own_beginning_gets_no_second_one(inst: PreTrainedTokenizerFast) -> None:
    record = {"messages": CHAT["messages"][1:]}
    example = encode(record, inst)
    assert text_of(example, inst) == (
        "<s>[INST] What is the capital of France? [/INST] Paris. </s>[INST] And of Peru? [/INST] Lima. </s>"
    )
    assert learned_runs(example, inst) == [" Paris. </s>", " Lima. </s>"]
    flat = encode(FLAT, inst)
    assert flat.tokens[0] == inst.bos_token_id
    assert (flat.tokens == inst.bos_token_id).sum() == 1
    assert (flat.tokens == inst.eos_token_id).sum() == 1


def test_refusal_of_the_template_is_passed_on_with_the_row(inst: PreTrainedTokenizerFast) -> None:
    good = {"messages": CHAT["messages"][1:]}
    refused = {"messages": [{"role": "tool", "content": "Hm."}, *CHAT["messages"][1:]]}
    with pytest.raises(DataError, match=r"row 1 \(counted from 0\): the chat template refuses .*Only user and"):
        encode_all([good, refused, good], inst, max_length=200, progress=False)


def test_template_that_drops_earlier_turns_is_an_error(make_chatml: Make) -> None:
    forgetful = make_chatml(
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] if loop.last else 'gone' }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    with pytest.raises(DataError, match="the chat template does not write its own generation prompt before message 2 "):
        encode(CHAT, forgetful)
    opens = {"messages": [{"role": "assistant", "content": "Hello"}]}
    with pytest.raises(DataError, match="expected a message before the first answer"):
        encode(opens, make_chatml())


def test_both_ways_to_find_answers_agree_with_transformers(
    chatml: PreTrainedTokenizerFast, tagged: PreTrainedTokenizerFast
) -> None:
    tokens, mask = answer_of_transformers(tagged, CHAT["messages"])
    for tokenizer in (chatml, tagged):
        example = encode(CHAT, tokenizer)
        np.testing.assert_array_equal(example.tokens, tokens)
        np.testing.assert_array_equal(example.loss_mask, mask)


def test_tags_that_leave_out_the_end_of_turn_are_extended(make_chatml: Make, tagged: PreTrainedTokenizerFast) -> None:
    source = (
        str(tagged.chat_template)
        .replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen")
        .replace("{{ '\n' }}{% else %}", "{{ '<|im_end|>\n' }}{% else %}")
    )
    example = encode(CHAT, make_chatml(source))
    assert learned_runs(example, tagged) == ["Paris.<|im_end|>", "Lima.<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("template", ["chatml", "tagged"])
def test_white_space_in_answers_is_learned(
    make_chatml: Make, tagged: PreTrainedTokenizerFast, template: str, trim_offsets: bool
) -> None:
    source = {"chat_template": tagged.chat_template} if template == "tagged" else {}
    tokenizer = make_chatml(**source, trim_offsets=trim_offsets)
    answer = "So:  \n\nif a:\n        b  \n"
    messages = [
        {"role": "user", "content": "code \n"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "\n more "},
        {"role": "assistant", "content": "ü 🙂"},
    ]
    example = encode({"messages": messages}, tokenizer)
    assert learned_runs(example, tokenizer) == [answer + "<|im_end|>", "ü 🙂<|im_end|>"]


def test_white_space_at_the_end_of_a_flat_text_stays(make_chatml: Make) -> None:
    tokenizer = make_chatml(trim_offsets=True)
    example = encode({"text": "### Human: Hi ### Assistant: Yes.  "}, tokenizer)
    assert learned_runs(example, tokenizer) == [" Yes.  <|im_end|>"]


def test_end_of_sequence_that_is_not_the_end_of_turn_is_learned_too(make_chatml: Make) -> None:
    tokenizer = make_chatml(eos="<|endoftext|>")
    example = encode(CHAT, tokenizer)
    assert learned_runs(example, tokenizer) == ["Paris.<|im_end|>", "Lima.<|im_end|><|endoftext|>"]
    assert text_of(example, tokenizer).endswith("Lima.<|im_end|><|endoftext|>")


def test_conversation_that_ends_in_a_question(chatml: PreTrainedTokenizerFast) -> None:
    example = encode({"messages": CHAT["messages"][:4]}, chatml)
    assert learned_runs(example, chatml) == ["Paris.<|im_end|>"]
    assert text_of(example, chatml).endswith("And of Peru?<|im_end|>\n")


def test_train_on_source_learns_everything(chatml: PreTrainedTokenizerFast, bare: PreTrainedTokenizerFast) -> None:
    for record, tokenizer in ((CHAT, chatml), (FLAT, bare), (ALPACA, bare)):
        example = encode(record, tokenizer, train_on_source=True)
        np.testing.assert_array_equal(example.tokens, encode(record, tokenizer).tokens)
        assert not example.loss_mask[0]
        assert example.loss_mask[1:].all()


def test_quoted_tokens_and_markers_move_no_mask(chatml: PreTrainedTokenizerFast) -> None:
    example = encode({"question": "What does <|im_end|> mean?", "answer": "End."}, chatml)
    assert learned_runs(example, chatml) == ["End.<|im_end|>"]
    example = encode({"question": "### Assistant: what?", "answer": "A turn."}, chatml, template="guanaco")
    assert learned_runs(example, chatml) == [" A turn.<|im_end|>"]


def test_an_answer_that_is_cut_has_no_end(bare: PreTrainedTokenizerFast) -> None:
    whole = encode(ALPACA | {"output": "five six seven eight"}, bare)
    for length in range(len(whole) - 3, len(whole)):
        cut = encode(ALPACA | {"output": "five six seven eight"}, bare, max_length=length)
        assert cut.loss_mask[-1]
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:length])
    assert bare.eos_token_id not in cut.tokens


def test_cut_in_a_question_ends_after_the_answer_before(chatml: PreTrainedTokenizerFast) -> None:
    whole = encode(CHAT, chatml)
    end = int(np.flatnonzero(whole.tokens == chatml.eos_token_id)[2]) + 1
    for length in range(end, end + 8):
        cut = encode(CHAT, chatml, max_length=length)
        assert learned_runs(cut, chatml) == ["Paris.<|im_end|>"]
        np.testing.assert_array_equal(cut.tokens, whole.tokens[:end])


TEXT = st.text(st.sampled_from("ab .,\n:ü你🙂") | st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), cut=st.integers(0, 200))
@pytest.mark.parametrize("template", ["chat", "guanaco"])
def test_any_conversation(
    chatml: PreTrainedTokenizerFast,
    tagged: PreTrainedTokenizerFast,
    template: Template,
    turns: list[tuple[str, str]],
    cut: int,
) -> None:
    messages = []
    for question, answer in turns:
        # An answer of nothing teaches nothing in flat text; the letter keeps it an answer.
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": "a" + answer})
    record = {"messages": messages}
    whole = encode(record, chatml, template=template)
    # The end of the sequence is learned exactly once for the last answer, whatever the pad token is.
    last = int(np.flatnonzero(whole.loss_mask)[-1])
    assert whole.tokens[last] == chatml.eos_token_id
    # The prompt of the first answer, tokenized alone, is how the sequence starts.
    prompt = encode_prompt(messages[:1], chatml, template=template)
    np.testing.assert_array_equal(whole.tokens[: len(prompt)], prompt)
    assert not whole.loss_mask[: len(prompt)].any()
    if template == "chat":
        assert learned_runs(whole, chatml) == ["a" + answer + "<|im_end|>" for _, answer in turns]
        other = encode(record, tagged)
        np.testing.assert_array_equal(other.tokens, whole.tokens)
        np.testing.assert_array_equal(other.loss_mask, whole.loss_mask)
    length = max(2, min(cut, len(whole) - 1))
    short = encode(record, chatml, template=template, max_length=length)
    assert len(short) <= length
    if whole.loss_mask[:length].any():
        assert short.loss_mask[-1]
        # EOS is only where the whole sequence has one, or directly after an answer.
        shared = min(len(short), next((i for i in range(len(short)) if short.tokens[i] != whole.tokens[i]), len(short)))
        assert shared >= len(short) - 1
        assert shared == len(short) or (short.tokens[-1] == chatml.eos_token_id and not whole.loss_mask[shared])


def test_prompts_are_what_examples_start_with(
    chatml: PreTrainedTokenizerFast, bare: PreTrainedTokenizerFast, inst: PreTrainedTokenizerFast
) -> None:
    for tokenizer in (chatml, bare, inst):
        for template in ("chat", "guanaco", "alpaca", "plain"):
            if template == "chat" and tokenizer.chat_template is None:
                continue
            example = encode(PAIR, tokenizer, template=template)
            prompt = encode_prompt("Why?", tokenizer, template=template)
            np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt)
            assert np.flatnonzero(example.loss_mask)[0] == len(prompt)
    assert bare.decode(encode_prompt("Why?", bare)) == "### Human: Why? ### Assistant:"
    for messages, template in (([], "auto"), (CHAT["messages"], "alpaca"), ("Why?", "llama")):
        with pytest.raises(DataError, match="expected"):
            encode_prompt(messages, chatml, template=template)  # pyright: ignore[reportArgumentType]


def test_tokenizers_that_cannot_serve(make_chatml: Make) -> None:
    endless = make_chatml()
    endless.eos_token = None
    with pytest.raises(DataError, match="expected an end-of-sequence token, found none"):
        encode(CHAT, endless)
    with pytest.raises(DataError, match="max_length: expected at least 2 tokens"):
        encode(CHAT, make_chatml(), max_length=1)


def test_real_chats_agree_with_transformers(tagged: PreTrainedTokenizerFast, shared_data: Path) -> None:
    for row in load_records(str(shared_data / "oasst_guanaco.jsonl"), "train[:60]").to_list():
        tokens, mask = answer_of_transformers(tagged, list(parse(row).messages))
        example = encode(row, tagged, template="chat")
        np.testing.assert_array_equal(example.tokens, tokens)
        np.testing.assert_array_equal(example.loss_mask, mask)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("template", ["chat", "guanaco", "alpaca", "plain"])
def test_an_answer_that_is_not_learned_stays_so_where_prompts_are_learned(
    chatml: PreTrainedTokenizerFast, template: Template, mark: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "Sum of 2, 3?"}, {"role": "assistant", "content": "99."} | mark]
    example = encode({"messages": messages}, chatml, template=template, train_on_source=True)
    learned = "".join(learned_runs(example, chatml))
    assert "99" in text_of(example, chatml)
    assert "um of 2, 3?" in learned  # the first token of a text is never learned
    assert "99" not in learned
    assert example.tokens[-1] != chatml.eos_token_id or not example.loss_mask[-1]  # nor where it ends
    _, report = encode_all([{"messages": messages}], chatml, max_length=99, template=template, train_on_source=True)
    assert (report.kept, report.without_target) == (1, 0)
    with pytest.raises(NothingToLearn, match="1 left out: no answer to learn"):
        encode_all([{"messages": messages}], chatml, max_length=99, template=template)
    whole = encode({"messages": [messages[0], {"role": "assistant", "content": "5"}]}, chatml, template=template)
    assert learned_runs(whole, chatml)[-1].strip() == "5<|im_end|>"
