"""Preference pairs: one prompt, two answers, the same from every form of record; and batches of which rows are pairs."""

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qlora_jax.data import DataError, Example, PreferenceExample, encode, encode_preferences, preference_batches
from qlora_jax.data.pairs import parse_pair

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "Yes"), ("assistant", "No!"))
)
FORMS: dict[str, dict[str, Any]] = {
    "a question": {"question": "Q", "chosen": "Yes", "rejected": "No!"},
    "an instruction": {"instruction": "Q", "input": "", "chosen": "Yes", "rejected": "No!"},
    "hh-rlhf": {"chosen": "\n\nHuman: Q\n\nAssistant: Yes", "rejected": "\n\nHuman: Q\n\nAssistant: No!"},
    "hh-rlhf prompt": {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": "Yes", "rejected": "No!"},
    "messages": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "messages and a prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole messages and their question": {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
}


def learned(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(example.tokens[example.loss_mask]))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_pair(form: str, chatml: PreTrainedTokenizerFast) -> None:
    (pair,), report = encode_preferences([FORMS[form]], chatml, max_length=100)
    assert str(report) == "1 of 1 pairs kept as chat"
    assert chatml.decode(pair.prompt) == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for example, answer in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        alone = encode({"messages": [USER, answer]}, chatml)
        np.testing.assert_array_equal(example.tokens, alone.tokens)
        np.testing.assert_array_equal(example.loss_mask, alone.loss_mask)


def test_only_the_answers_that_differ_are_learned(chatml: PreTrainedTokenizerFast, bare: PreTrainedTokenizerFast) -> None:
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": before + " So.", "rejected": before + " Who knows?"}
    (pair,), _ = encode_preferences([row], chatml, max_length=200)
    assert learned(pair.chosen, chatml) == "So.<|im_end|>"
    assert "Hello" in str(chatml.decode(pair.prompt))
    # Without a chat template: Guanaco's form.
    (pair,), _ = encode_preferences([row], bare, max_length=200)
    assert bare.decode(pair.prompt) == "### Human: Hi ### Assistant: Hello ### Human: Why? ### Assistant:"
    assert learned(pair.rejected, bare) == " Who knows?<|endoftext|>"


def test_texts_without_a_prompt_are_learned_whole(inst: PreTrainedTokenizerFast) -> None:
    (pair,), _ = encode_preferences([{"chosen": "Yes", "rejected": "No!"}], inst, max_length=20)
    assert pair.prompt.tolist() == [inst.bos_token_id]
    assert learned(pair.chosen, inst) == "Yes</s>"


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_texts_are_joined_as_they_are(chatml: PreTrainedTokenizerFast, template: Any) -> None:
    """As the trainers of others do: a prompt of text may have its template already."""
    prompt, answers = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", ("Yes<|im_end|>\n", "No")
    row = dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True))
    (pair,), report = encode_preferences([row], chatml, max_length=100, template=template)
    assert report.templates == {"plain": 1}
    assert chatml.decode(pair.prompt) == prompt
    for example, answer in ((pair.chosen, answers[0]), (pair.rejected, answers[1] + "<|im_end|>")):
        assert chatml.decode(example.tokens) == prompt + answer
        assert learned(example, chatml) == answer
    # With the template chat, the prompt is a question.
    (pair,), _ = encode_preferences([row | {"prompt": "Q"}], chatml, max_length=100, template="chat")
    assert chatml.decode(pair.prompt) == prompt


@pytest.mark.parametrize(
    "more",
    [
        {"prompt": "Q", "system": "S"},
        {"question": "Q", "system": "S"},
        {"instruction": "Q", "system_prompt": "S"},
        {"prompt": [USER], "system": "S"},
        {"prompt": [{"role": "system", "content": "S"}, USER]},
        {"prompt": "Q", "history": [{"role": "system", "content": "S"}]},
    ],
)
def test_columns_beside_a_pair(chatml: PreTrainedTokenizerFast, more: dict[str, Any]) -> None:
    (pair,), report = encode_preferences([{"chosen": "Yes", "rejected": "No!"} | more], chatml, max_length=100)
    assert chatml.decode(pair.prompt).startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>")
    assert report.odd.unused == {}
    row = {"question": "Q", "context": "C", "chosen": [GOOD], "rejected": BAD, "score": 1, "instruction": "Q"}
    (pair,), report = encode_preferences([row], chatml, max_length=100)
    assert "user\nC\n\nQ<|im_end|>" in str(chatml.decode(pair.prompt))
    assert report.odd.unused == {"score": 1, "instruction": 1}


TEXT = st.text(st.sampled_from("ab .\nü🙂"), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=100, deadline=None)
@given(prompt=TEXT, chosen=TEXT, rejected=TEXT, most=st.integers(2, 60))
def test_any_pair(
    chatml: PreTrainedTokenizerFast,
    bare: PreTrainedTokenizerFast,
    prompt: str,
    chosen: str,
    rejected: str,
    most: int,
) -> None:
    for tokenizer in (chatml, bare):
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if chosen == rejected:
            with pytest.raises(DataError, match="found equal ones"):
                encode_preferences([row], tokenizer, max_length=most)
            continue
        try:
            (pair,), _ = encode_preferences([row], tokenizer, max_length=most)
        except DataError as error:
            assert f"1 left out: no two answers in {most} tokens" in str(error)  # noqa: PT017
            continue
        for example in (pair.chosen, pair.rejected):
            assert len(example) <= most
            np.testing.assert_array_equal(example.tokens[: len(pair.prompt)], pair.prompt)
            assert not example.loss_mask[: len(pair.prompt)].any()
            whole = encode({"prompt": prompt, "completion": chosen if example is pair.chosen else rejected}, tokenizer)
            np.testing.assert_array_equal(example.tokens, whole.tokens[: len(example)])


def test_a_cut_that_leaves_no_difference_is_counted(chatml: PreTrainedTokenizerFast) -> None:
    rows = [FORMS["a question"], {"question": "Q " * 50, "chosen": "Yes", "rejected": "No!"}]
    pairs, report = encode_preferences(rows, chatml, max_length=40)
    assert len(pairs) == 1
    assert str(report) == "1 of 2 pairs kept as chat; 1 left out: no two answers in 40 tokens"
    with pytest.raises(DataError, match="preference pairs: expected at least one, found none: 0 of 1 pairs kept"):
        encode_preferences(rows[1:], chatml, max_length=40)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "Q", "chosen": "A", "rejected": "A"},
            "expected two different answers, chosen and rejected",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "expected two different answers"),
        ({"chosen": "A"}, r"expected the columns chosen and rejected, found \['chosen'\]"),
        ({"chosen": "A", "rejected": None}, r"expected the columns chosen and rejected, found \['chosen'\]"),
        ({"chosen": "A", "rejected": {}}, "column 'rejected', message 0: expected the keys role and content"),
        (
            {"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "R"}, BAD]},
            "column 'chosen', message 0: expected the assistant's answer as the first difference of chosen and rejected",
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "column 'rejected', message 1: .*, found nothing"),
        ({"chosen": [GOOD, USER, GOOD], "rejected": [BAD]}, "expected a message before the answers, found none"),
        (
            {"prompt": "R", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "column 'chosen': expected a conversation that holds the prompt",
        ),
        (
            {"prompt": "Q", "preferred": "A", "loser": "B"},
            r".*; the nearest: preference pairs \(--columns chosen=preferred rejected=loser\)",
        ),
        (
            {"messages": [USER, GOOD | {"content": "Else"}], "chosen": "Yes", "rejected": "No!"},
            r"column 'messages': expected a prompt beside chosen and rejected, .* conversation that ends with an answer",
        ),
        ({"messages": [USER, GOOD]}, r"expected the columns chosen and rejected, found \['messages'\]"),
    ],
)
def test_bad_pairs_name_their_row(chatml: PreTrainedTokenizerFast, row: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=rf"^row 1 \(counted from 0\): {expected}"):
        encode_preferences([FORMS["a question"], row], chatml, max_length=100)


def test_a_template_that_refuses_names_its_row(inst: PreTrainedTokenizerFast) -> None:
    system = {"role": "tool", "content": "S"}
    row = {"chosen": [system, USER, GOOD], "rejected": [system, USER, BAD]}
    with pytest.raises(DataError, match=r"row 2 \(counted from 0\): the chat template refuses .*Only user and"):
        encode_preferences([{"chosen": "A", "rejected": "B"}, FORMS["a question"], row], inst, max_length=100)


def pairs(count: int) -> list[PreferenceExample]:
    """Pair p: prompt 100 p + 1, 100 p + 2; chosen goes on with +3 …, rejected with +50 …"""
    made = []
    for index in range(count):
        prompt = 100 * index + np.arange(1, 3, dtype=np.int32)
        answers = [100 * index + np.arange(start, start + 1 + index % 4, dtype=np.int32) for start in (3, 50)]
        halves = [
            Example(np.concatenate([prompt, answer]), np.array([False] * 2 + [True] * len(answer))) for answer in answers
        ]
        made.append(PreferenceExample(prompt, *halves))
    return made


def test_batches_by_hand() -> None:
    (batch,) = preference_batches(pairs(2), batch_size=2, length=4, pad_id=9, shuffle=False, epochs=1)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "chosen_inputs": [[1, 2, 9, 9], [101, 102, 103, 9]],
        "chosen_targets": [[2, 3, 9, 9], [102, 103, 104, 9]],
        "chosen_loss_mask": [[0, 1, 0, 0], [0, 1, 1, 0]],
        "rejected_inputs": [[1, 2, 9, 9], [101, 102, 150, 9]],
        "rejected_targets": [[2, 50, 9, 9], [102, 150, 151, 9]],
        "rejected_loss_mask": [[0, 1, 0, 0], [0, 1, 1, 0]],
    }


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 8])
def test_rows_stay_pairs_and_resume_anywhere(stop: int) -> None:
    options: dict[str, Any] = {"batch_size": 3, "length": 8, "pad_id": 0, "seed": 4}
    source = preference_batches(pairs(11), **options)
    read = list(islice(source, 12))
    assert source.batches_in_epoch() == 4
    for batch in read:
        assert {value.shape for value in batch.values()} == {(3, 8)}
        np.testing.assert_array_equal(batch["chosen_inputs"][:, 0], batch["rejected_inputs"][:, 0])
    for epoch in range(3):
        first = np.concatenate([batch["chosen_inputs"][:, 0] for batch in read[4 * epoch : 4 * epoch + 4]])
        assert sorted(first[first > 0] // 100) == list(range(11))
    first, second = preference_batches(pairs(11), **options), preference_batches(pairs(11), **options)
    list(islice(first, stop))
    second.set_state(json.loads(json.dumps(first.get_state())))
    for expected, found in zip(read[stop:], second, strict=False):
        assert all(np.array_equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": "No!",
        },
        {"messages": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"messages": json.dumps([USER]), "chosen": "Yes", "rejected": "No!"},
        {"conversations": json.dumps([{"from": "human", "value": "Q"}]), "chosen": "Yes", "rejected": "No!"},
        {"messages": [USER, GOOD], "chosen": "Yes", "rejected": "No!"},
        {"input": USER["content"], "chosen": "Yes", "rejected": "No!"},
        {"messages": [USER, GOOD], "input": "x", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "messages": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": "Human: Q\n\nAssistant: Yes", "rejected": "Human: Q\n\nAssistant: No!"},
    ],
)
def test_prompts_in_other_columns(row: dict[str, Any]) -> None:
    pair = parse_pair(row, "auto")
    assert [message["role"] for message in pair.prompt] == ["user"]
    assert [pair.chosen[0]["content"], pair.rejected[0]["content"]] == ["Yes", "No!"]
    used = {"chosen", "rejected", "prompt"} | ({"messages", "input"} if isinstance(row["chosen"], str) else set())
    assert set(pair.unused) <= set(row) - used


def test_a_context_goes_before_an_input() -> None:
    pair = parse_pair({"input": "Q", "context": "C", "chosen": "a", "rejected": "b"}, "auto")
    assert (pair.prompt[0]["content"], pair.unused) == ("C\n\nQ", ())


def test_odd_messages_of_an_answer_name_its_column() -> None:
    with pytest.raises(DataError, match=r"^column 'rejected', message 0, role: expected user"):
        parse_pair({"messages": [USER], "chosen": "a", "rejected": [{"role": "narrator", "content": "b"}]}, "auto")
