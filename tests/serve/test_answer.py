"""The text of an answer: complete characters, and nothing of a stop text, wherever the tokens divide them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.serve.answer import AnswerText

TEXTS = st.text(st.sampled_from("ab\n€😀"), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def test_pieces_join_to_the_text_before_the_first_stop_text(tokenizer: Any) -> None:
    """The tokens are bytes, so that each character has several."""

    @settings(max_examples=40, deadline=None)
    @given(TEXTS, st.lists(st.text(st.sampled_from("ab\n€"), min_size=1, max_size=4), max_size=3))
    def check(written: str, stop: list[str]) -> None:
        answer, pieces = AnswerText(tokenizer, stop, ()), []
        for token in tokenizer(written)["input_ids"]:
            pieces.append(answer.push(token))
            assert "\ufffd" not in pieces[-1]
            if answer.stopped:
                break
        pieces.append(answer.finish())
        # The first stop text that is complete ends the answer; of several that end in one character, the first to begin.
        ends = [end for end in range(len(written) + 1) if any(written[:end].endswith(text) for text in stop)]
        upto = written[: ends[0]] if ends else written
        begins = [upto.find(text) for text in stop if text in upto]
        assert "".join(pieces) == (upto[: min(begins)] if begins else written)
        assert answer.stopped == bool(begins)

    check()


def test_what_may_begin_a_stop_text_is_held_back(tokenizer: Any) -> None:
    answer = AnswerText(tokenizer, ["abc"], ())
    assert [answer.push(token) for token in tokenizer("xabaab")["input_ids"]] == ["x", "", "", "ab", "a", ""]
    assert answer.finish() == "ab"


def test_an_answer_without_a_tokenizer_has_no_text() -> None:
    answer = AnswerText(None, ["a"], ())
    assert answer.push(3) + answer.finish() == ""
