"""Tokenizers rebuilt from GGUF metadata: against transformers, the pre-tokenizers' rules, and bad input."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer
from qlora_jax.errors import CheckpointError

DATA = Path(__file__).parents[3] / "shared" / "data"
TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  two spaces, 3  digits 12345 and 1,000.5\n\n\n  4\t\ttabs",
    "def f(x):\n    return {'a': x[0] ** 2}  # don't\r\n",
    "Größe, naïve, 北京は大きい, Привет мир, שלום, मुझे, 한국어, 👩‍👩‍👧 🎉",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|> <|endoftext|><|im_end",
    "I'll we've they're it's I'M 'S",
    "e\u0301 \u00a0 \u200b \u3000",
]
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Grüße\n"},
        {"role": "assistant", "content": "Hallo."},
        {"role": "user", "content": "  and\t?"},
    ],
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def default_model() -> Path:
    try:
        return fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")


def write(path: Path, specials: list[str] | None = None, **changes: Any) -> Path:
    """A GGUF file that holds only a small byte-level tokenizer; a change to None leaves an entry out."""
    specials = SPECIALS if specials is None else specials
    merges = ["l o", "lo w", "Ġ low", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    entries: dict[str, Any] = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": merges,
        "token_type": [3] * len(specials) + [1] * (len(tokens) - len(specials)),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (entries | changes).items():
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def texts_of(file: Path) -> Iterator[str]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def same(ours: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, texts: list[str]) -> None:
    for text, mine, theirs in zip(texts, ours(texts).input_ids, other(texts).input_ids, strict=True):
        assert mine == theirs, text[:200]


@pytest.fixture(scope="module")
def ours() -> PreTrainedTokenizerFast:
    return load_tokenizer(default_model())


@pytest.fixture(scope="module")
def peer() -> PreTrainedTokenizerFast:
    pytest.importorskip("torch", reason="transformers reads a GGUF tokenizer only with PyTorch")
    path = default_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        peer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers knows no pre-tokenizer "smollm" and takes GPT-2's. With SmolLM2's, which also cuts out single digits,
    # in its place the rest of its reading of the file is the reference.
    backend = peer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    return peer


def test_equals_transformers(ours: PreTrainedTokenizerFast, peer: PreTrainedTokenizerFast):
    same(ours, peer, TEXTS)
    assert ours.get_vocab() == peer.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert ours.chat_template == peer.chat_template
    assert set(ours.all_special_ids) == set(peer.all_special_ids)
    for text in TEXTS:
        mine, theirs = ours(text, return_offsets_mapping=True), peer(text, return_offsets_mapping=True)
        assert mine.offset_mapping == theirs.offset_mapping
        for skip in (False, True):
            assert ours.decode(mine.input_ids, skip_special_tokens=skip) == peer.decode(
                theirs.input_ids, skip_special_tokens=skip
            )
    for conversation in CONVERSATIONS:
        for prompt in (False, True):
            rendered = ours.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)
            assert rendered == peer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("name", ["oasst_guanaco", "code_alpaca", "gsm8k", "mmlu_zero_shot", "vicuna_questions"])
def test_real_texts_equal_transformers(ours: PreTrainedTokenizerFast, peer: PreTrainedTokenizerFast, name: str):
    file = DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the shared data are not here: {file}")
    same(ours, peer, list(texts_of(file)))


@pytest.mark.integration
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_folder_of_the_model_gives_the_same_tokens(ours: PreTrainedTokenizerFast, tmp_path: Path, name: str):
    """All texts of the shared data, whatever class the folder names: that of SmolLM2 on the hub is GPT2Tokenizer."""
    files = sorted(DATA.glob("*.jsonl"))
    if not files:
        pytest.skip(f"the shared data are not here: {DATA}")
    save_tokenizer(ours, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": name}))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    folder = load_tokenizer(tmp_path)
    for file in files:
        same(ours, folder, list(texts_of(file)))


@pytest.mark.parametrize("name", ["oasst_guanaco", "code_alpaca"])
def test_real_texts_come_back(ours: PreTrainedTokenizerFast, name: str):
    file = DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"the shared data are not here: {file}")
    for text in texts_of(file):
        assert ours.decode(ours(text).input_ids) == text


def test_texts_come_back(ours: PreTrainedTokenizerFast):
    for text in TEXTS:
        assert ours.decode(ours(text).input_ids) == text


def test_default_model(ours: PreTrainedTokenizerFast):
    assert len(ours) == 49152
    check_tokenizer(ours, {"vocab_size": 49152})
    assert ours.pad_token == "<|endoftext|>"
    assert ours.pad_token_id != ours.eos_token_id
    assert ours("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    rendered = ours.apply_chat_template(CONVERSATIONS[0], tokenize=False, add_generation_prompt=True)
    assert str(rendered).endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")


def test_saved_files_work_in_transformers(tmp_path: Path):
    changes: dict[str, Any] = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", **changes))
    save_tokenizer(tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    for again in (AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "saved")):
        same(again, tokenizer, TEXTS)
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.special_tokens_map == tokenizer.special_tokens_map
        assert again.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "low 123", ["low", "Ġ", "123"]),
        ("smollm", "low\n\n123", ["low", "ĊĊ", "1", "2", "3"]),
        ("starcoder", "low\n\n123", ["low", "ĊĊ", "1", "2", "3"]),
        ("qwen2", "low 123", ["low", "Ġ", "1", "2", "3"]),
        ("llama-bpe", "low  1234", ["<|im_start|>", "low", "Ġ", "Ġ", "123", "4"]),
        ("smaug-bpe", "low  1234", ["low", "Ġ", "Ġ", "123", "4"]),
        ("gpt-4o", "low  1234", ["low", "Ġ", "Ġ", "123", "4"]),
        ("tekken", "low 123", ["<|im_start|>", "low", "Ġ", "1", "2", "3"]),
        ("olmo", "low 123", ["low", "Ġ", "123"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, text: str, expected: list[str]):
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", pre=pre))
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == expected


def test_begin_and_end_are_added_where_the_file_says_so(tmp_path: Path):
    plain = load_tokenizer(write(tmp_path / "0.gguf", pre="llama-bpe", add_bos_token=False))
    assert plain("low").input_ids == plain.convert_tokens_to_ids(["low"])
    both = load_tokenizer(write(tmp_path / "1.gguf", add_bos_token=True, add_eos_token=True))
    for tokenizer in (both, _saved(both, tmp_path / "saved")):
        low = tokenizer.convert_tokens_to_ids("low")
        assert tokenizer("low").input_ids == [1, low, 2]
        assert tokenizer("low", "low").input_ids == [1, low, 2, 1, low, 2]
        assert tokenizer("low", add_special_tokens=False).input_ids == [low]


def _saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> PreTrainedTokenizerFast:
    save_tokenizer(tokenizer, folder)
    return load_tokenizer(folder)


def test_user_defined_tokens_are_whole_but_not_special(tmp_path: Path):
    specials = [*SPECIALS, "<think>"]
    path = write(tmp_path / "m.gguf", specials)
    count = len(load_tokenizer(path))
    tokenizer = load_tokenizer(write(path, specials, token_type=[3, 3, 3, 4] + [1] * (count - 4)))
    assert tokenizer("<think>low").input_ids[0] == 3
    assert tokenizer.decode(tokenizer("<|im_start|><think>low").input_ids, skip_special_tokens=True) == "<think>low"


@pytest.mark.parametrize(
    ("specials", "changes", "expected"),
    [
        ([*SPECIALS, "<pad>"], {}, "<pad>"),  # made for it
        ([*SPECIALS, "<pad>"], {"padding_token_id": 0}, "<|endoftext|>"),  # the file's own choice
        ([*SPECIALS, "<pad>"], {"padding_token_id": 2}, "<pad>"),  # the file's own choice is EOS
        ([*SPECIALS, "<|reserved_7|>"], {"unknown_token_id": 0}, "<|reserved_7|>"),
        ([*SPECIALS, "<x>"], {"unknown_token_id": 3}, "<x>"),
        (
            SPECIALS,
            {"tokenizer.chat_template": "<|endoftext|>"},
            "<|im_end|>",
        ),  # used for something: EOS remains
        (SPECIALS, {}, "<|endoftext|>"),
        (
            ["<|endoftext|>"],
            {"bos_token_id": 0, "eos_token_id": 0},
            "<|endoftext|>",
        ),  # GPT-2: there is nothing else
    ],
)
def test_padding(tmp_path: Path, specials: list[str], changes: dict[str, Any], expected: str):
    path = write(tmp_path / "m.gguf", specials, **changes)
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == expected
    assert len(tokenizer) == len(specials) + 256 + 7
    again = _saved(tokenizer, tmp_path / "saved")
    assert again.pad_token == expected
    assert len(again) == len(tokenizer)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "t5"}, r"tokenizer\.ggml\.model: expected 'gpt2' .*found 't5'.*Hugging Face folder"),
        ({"model": None}, "found None"),
        (
            {"pre": "unheard-of"},
            r"tokenizer\.ggml\.pre: expected the name of .* such as llama-bpe.*found 'unheard-of'.*too small",
        ),
        ({"pre": "gemma4"}, r"tokenizer\.ggml\.pre: expected the name of .* byte-level BPE, .*found 'gemma4'"),
        ({"pre": 4}, r"tokenizer\.ggml\.pre: expected the name of .* byte-level BPE, .*found 4"),
        ({"merges": None}, r"tokenizer\.ggml\.merges: expected a list of strings, found nothing"),
        ({"merges": ["low"]}, r"merges: expected pairs, found 'low'"),
        ({"merges": ["q x"]}, "merges do not fit"),
        ({"tokens": ["a", "a", "b"]}, "expected 3 different tokens, found 2"),
        ({"token_type": [1]}, "one for each token, found 1"),
        ({"eos_token_id": 999}, r"tokenizer\.ggml\.eos_token_id: expected a number below 266, found 999"),
    ],
)
def test_unusable_metadata(tmp_path: Path, changes: dict[str, Any], expected: str):
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_folder_without_a_tokenizer(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"has no tokenizer: expected tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_folder_with_a_damaged_tokenizer(tmp_path: Path):
    save_tokenizer(load_tokenizer(write(tmp_path / "m.gguf")), tmp_path / "saved")
    file = tmp_path / "saved" / "tokenizer.json"
    file.write_text(file.read_text()[:1000])
    with pytest.raises(CheckpointError, match="its tokenizer cannot be read"):
        load_tokenizer(tmp_path / "saved")


def test_tokenizer_of_another_model(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf"))
    check_tokenizer(tokenizer, {"vocab_size": 266})
    check_tokenizer(tokenizer, {"text_config": {"vocab_size": 300}})
    check_tokenizer(tokenizer, {"vocab_size": 265})  # a few may be without a row
    with pytest.raises(
        CheckpointError, match=r"does not belong to this model: expected token ids below 200 .*up to 265 for"
    ):
        check_tokenizer(tokenizer, {"vocab_size": 200})
    with pytest.raises(CheckpointError, match="expected a number vocab_size, found None"):
        check_tokenizer(tokenizer, {})


def test_the_folder_may_be_moved(tmp_path: Path):
    save_tokenizer(load_tokenizer(write(tmp_path / "m.gguf")), tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert str(tmp_path) not in (tmp_path / "moved" / "tokenizer_config.json").read_text()
    assert load_tokenizer(tmp_path / "moved")("low").input_ids
