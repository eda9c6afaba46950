"""Streaming: the pieces are the text, and no piece ends within a character."""

from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.errors import CheckpointError
from qlora_jax.serve import TextStream, stream_text

TEXTS = st.lists(
    st.sampled_from(
        [
            "北京は大きい",
            "Größe",
            "👩‍👩‍👧",
            "🎉",
            " e\u0301",
            "한국어",
            "שלום",
            "  ",
            "\n\n",
            "don't .",
            "\ufffd",
        ]
    )
    | st.text(max_size=8),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    try:
        return load_tokenizer(fetch_default_model())
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2 does: ▁ is a space, the first one is dropped, unknown characters are bytes."""
    pieces = ["<unk>", "</s>", "▁", "▁Hello", "▁world", "!", "▁Paris", "is"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def pieces_of(tokenizer: Any, ids: list[int], context: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, context or [])
    return [*(stream.push(index) for index in ids), stream.finish()]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
    if "\ufffd" not in decode(tokenizer, ids):
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(0, 400) | st.integers(0, 49151), max_size=24))
@settings(max_examples=150, deadline=None)
def test_the_pieces_are_the_text_of_any_tokens(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    """Special tokens and bytes that are no character among them."""
    assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids)


@given(ids=st.lists(st.integers(0, 260) | st.sampled_from([0, 2, 127, 163]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_text_do_not_wait_for_ever(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_jax.serve.text_stream._MOST_WAITING", 5)
        assert "".join(pieces_of(tokenizer, ids)) == decode(tokenizer, ids)


@pytest.mark.parametrize("tokens", [["<0xE4>"] * 1500, ["<0x80>"] * 1500, ["</s>"] * 1500, ["<0xE4>", *["</s>"] * 1500]])
def test_each_token_is_decoded_a_limited_number_of_times(
    sentencepiece: PreTrainedTokenizerFast, tokens: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode_all = sentencepiece.decode

    def counted(ids: list[int], **options: Any) -> Any:
        decoded.append(len(ids))
        return decode_all(ids, **options)

    ids = cast(list[int], sentencepiece.convert_tokens_to_ids(["▁Hello", *tokens, "▁Paris"]))
    expected = decode(sentencepiece, ids)
    monkeypatch.setattr(sentencepiece, "decode", counted)
    assert "".join(pieces_of(sentencepiece, ids)) == expected
    assert sum(decoded) < 100 * len(ids)


def test_a_character_of_several_tokens_comes_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a 🦙!")["input_ids"]
    assert len(ids) > 4
    pieces = pieces_of(tokenizer, ids)
    assert [piece for piece in pieces if piece][-2:] == ["🦙", "!"] or " 🦙" in pieces


@pytest.mark.parametrize("special", ["</s>", None])
def test_spaces_are_those_of_the_whole_text(sentencepiece: PreTrainedTokenizerFast, special: str | None) -> None:
    words = [
        "▁Hello",
        "▁world",
        "!",
        "▁",
        "▁",
        "▁Paris",
        "<0xE4>",
        "<0xBD>",
        "<0xA0>",
        "<0xE5>",
        "<0xA5>",
        "<0xBD>",
        "▁Paris",
    ]
    ids = sentencepiece.convert_tokens_to_ids([special, *words[:2], special, *words[2:]] if special else words)
    pieces = [piece for piece in pieces_of(sentencepiece, ids) if piece]
    assert pieces == ["Hello", " world", "!", " ", " ", " Paris", "你", "好", " Paris"]


def test_an_answer_that_continues_a_text_keeps_its_space(sentencepiece: PreTrainedTokenizerFast) -> None:
    prompt, answer = (sentencepiece.convert_tokens_to_ids(words) for words in (["▁Hello"], ["▁Paris", "!"]))
    assert pieces_of(sentencepiece, answer) == ["Paris", "!", ""]
    assert pieces_of(sentencepiece, answer, prompt) == [" Paris", "!", ""]


def test_what_waits_is_written_when_the_stream_is_left(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("So 🦙")["input_ids"]
    written: list[str] = []

    def interrupted() -> None:
        with stream_text(tokenizer, written.append) as on_token:
            for index in ids[:-1]:
                on_token(0, index)
                on_token(1, 17)  # another row's
            assert "\ufffd" not in "".join(written)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "".join(written) == decode(tokenizer, ids[:-1])
    assert all(written)
