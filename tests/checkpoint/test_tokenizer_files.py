"""Tokenizers of folders: tokenizer.json runs verbatim, against the tokenizers library; the other files only name things.

All cases together take about 6 seconds.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_jax.checkpoint.hub import resolve
from qlora_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer, stop_ids, warn_of_unknown_ends
from qlora_jax.checkpoint.tokenizer_files import has_tokenizer
from qlora_jax.data import check_ids
from qlora_jax.errors import CheckpointError, DataError

TEXTS = ["In 2024, I'LL pay 123456!!\n\nOK  two  spaces", "<s>Grüße</s> <|im_end|>\n", " x", "Ab ab AB"]
SPECIALS = ("<unk>", "<s>", "</s>", "<|im_end|>")
CLASSES = (
    "LlamaTokenizerFast",
    "Qwen2Tokenizer",
    "GPT2TokenizerFast",
    "GemmaTokenizerFast",
    "TokenizersBackend",
    "MyTokenizer",
)


def byte_level(specials: tuple[str, ...] = SPECIALS, merges: tuple[tuple[str, str], ...] = (("a", "b"),)) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return backend


def with_bos(backend: Tokenizer) -> Tokenizer:
    start = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [start])  # pyright: ignore
    return backend


def lower_case(backend: Tokenizer) -> Tokenizer:
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # pyright: ignore
    return backend


def single_digits(backend: Tokenizer) -> Tokenizer:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte])  # pyright: ignore
    return backend


def prefix_space(backend: Tokenizer) -> Tokenizer:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore
    return backend


def cut_at_four(backend: Tokenizer) -> Tokenizer:
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    return backend


PIPELINES = {"bare": lambda x: x, "bos": with_bos, "lower": lower_case, "digits": single_digits, "prefix": prefix_space}


def write(folder: Path, backend: Tokenizer, settings: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder with tokenizer.json, tokenizer_config.json, and JSON files by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config": {"eos_token": "</s>"} if settings is None else settings, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def same(tokenizer: Any, expected: Tokenizer) -> None:
    for text in TEXTS:
        ids = expected.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected.encode(text, add_special_tokens=False).ids
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", CLASSES)
def test_the_file_runs_whatever_class_is_named(tmp_path: Path, name: str, pipeline: str) -> None:
    """The library's own reading of the file is the reference, before and after saving, here and in transformers."""
    config = {"tokenizer_class": name, "eos_token": "</s>", "add_bos_token": True, "add_prefix_space": True, "legacy": True}
    for kind in ("llama", "qwen2", "phi3"):
        folder = write(tmp_path / kind, PIPELINES[pipeline](byte_level()), config, config={"model_type": kind})
        expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(folder)
        same(tokenizer, expected)
        saved = tmp_path / f"{kind}-saved"
        save_tokenizer(tokenizer, saved)
        (saved / "config.json").write_text(json.dumps({"model_type": kind}))
        same(load_tokenizer(saved), expected)
        if kind != "qwen2" or pipeline == "bare":  # transformers has its own pipeline for this model_type, whatever is named
            same(AutoTokenizer.from_pretrained(saved), expected)
        before, after = (json.loads((at / "tokenizer.json").read_text()) for at in (folder, saved))
        assert {**before, "added_tokens": 0} == {**after, "added_tokens": 0}


def test_cutting_and_padding_in_the_file_change_no_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, cut_at_four(byte_level())))
    assert len(tokenizer(TEXTS[0])["input_ids"]) == len(byte_level().encode(TEXTS[0]).ids)


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"eos_token": "<|im_end|>"}, {}, "<|im_end|>"),
        ({"eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True}}, {}, "<|im_end|>"),
        ({}, {"special_tokens_map": {"eos_token": {"content": "</s>"}}}, "</s>"),
        ({"eos_token": "</s>"}, {"special_tokens_map": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),  # of older versions
        (
            {"eos_token": "</s>", "added_tokens_decoder": {}},
            {"special_tokens_map": {"eos_token": "<|im_end|>"}},
            "</s>",
        ),
        ({"tokenizer_class": "LlamaTokenizerFast"}, {}, "</s>"),  # which its class names
        ({}, {"config": {"model_type": "llama"}}, "</s>"),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"config": {"eos_token_id": [260, 259]}}, "<|im_end|>"),
        ({"tokenizer_class": []}, {"config": {"eos_token_id": [260, 259]}}, "<|im_end|>"),
        ({}, {"generation_config": {"eos_token_id": 259}}, "</s>"),
        ({"eos_token": "<|not there|>"}, {"generation_config": {"eos_token_id": 260}}, "<|im_end|>"),
        ({}, {}, None),
        ({"eos_token": 7}, {"config": {"model_type": ["llama"], "eos_token_id": 10**9}}, None),
    ],
)
def test_eos_is_named_by_the_first_place_that_knows_it(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any], expected: str | None
) -> None:
    tokenizer = load_tokenizer(write(tmp_path, byte_level(), config, **files))
    assert tokenizer.eos_token == expected
    assert len(tokenizer) == byte_level().get_vocab_size()  # nothing is added to the vocabulary


@pytest.mark.parametrize("added", [[], ["<unk>", "<s>", "</s>"]])
@pytest.mark.parametrize(
    "config", [{}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}]
)
def test_a_special_token_in_a_text_is_what_transformers_makes_of_it(
    tmp_path: Path, config: dict[str, Any], added: list[str]
) -> None:
    """A Llama's pieces, whose tokenizer.json lists `<s>` as an added token or not; the model's type alone names no class."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abs<>/", "▁a", "▁b", "as"]
    merges = [("▁", "a"), ("▁", "b"), ("a", "s")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # pyright: ignore
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in added])
    folder = write(tmp_path, backend, config, config={"model_type": "llama"})
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a <s> b", "<s>a</s>", "a<s>", "b</s> a", "<unk>a"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Qwen2", "Gemma", "T5"])
def test_tokens_that_classes_name_are_those_of_transformers(name: str) -> None:
    import inspect

    import transformers

    from qlora_jax.checkpoint.tokenizer_files import _NAMED_BY_CLASS

    signature = inspect.signature(getattr(transformers, f"{name}Tokenizer").__init__).parameters
    for key, ours in zip(("bos_token", "eos_token", "unk_token", "pad_token"), _NAMED_BY_CLASS[name], strict=True):
        theirs = signature[key].default if key in signature else None
        assert ours == (None if theirs in (None, inspect.Parameter.empty) else str(theirs)), key


def test_tokens_beside_the_vocabulary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = byte_level().get_vocab_size()
    added = {"<|tool|>": size, "</s>": 3, "<|far|>": size + 9}
    tokenizer = load_tokenizer(write(tmp_path, byte_level(), added_tokens=added))
    assert tokenizer("<|tool|>")["input_ids"] == [size]
    assert len(tokenizer) == size + 1
    assert "does not have 1 tokens that are listed beside it: <|far|>" in caplog.text


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": "a"}, {}, "a"),
        ({"chat_template": "a"}, {"chat_template.jinja": "b"}, "b"),
        (
            {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "r"}]},
            {},
            {"default": "a", "rag": "r"},
        ),
        (
            {"chat_template": "a"},
            {"chat_template.jinja": "b", "additional_chat_templates/rag.jinja": "r"},
            {"default": "b", "rag": "r"},
        ),
        ({}, {"chat_template.json": '{"chat_template": "c"}'}, "c"),
        ({}, {}, None),
    ],
)
def test_chat_templates(tmp_path: Path, config: dict[str, Any], files: dict[str, str], expected: Any) -> None:
    folder = write(tmp_path, byte_level(), config)
    (folder / "additional_chat_templates").mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    assert load_tokenizer(folder).chat_template == expected


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", b"{", "its tokenizer cannot be read"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "its tokenizer cannot be read"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Magic"}}', "its tokenizer cannot be read"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json: is malformed: expected a JSON object, found a list"),
        (
            "tokenizer_config.json",
            b"[" * 100_000,
            "tokenizer_config.json: is malformed: expected a JSON object, found JSON that is nested too deeply",
        ),
        ("tokenizer_config.json", b"\xff\xfe{}", "tokenizer_config.json: expected UTF-8, found byte 0xff at 0"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template: expected a text, found a int"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": 5}]}', "chat_template: expected a text"),
        ("tokenizer_config.json", b'{"padding_side": "up"}', "expected left or right"),
        (
            "special_tokens_map.json",
            b"null",
            "special_tokens_map.json: is malformed: expected a JSON object, found a NoneType",
        ),
        ("added_tokens.json", b"7", "added_tokens.json: is malformed: expected a JSON object, found a int"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: expected UTF-8"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    folder = write(tmp_path, byte_level())
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_a_regular_expression_that_does_not_end(tmp_path: Path) -> None:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")  # pyright: ignore
    with pytest.raises(CheckpointError, match=r"its tokenizer cannot be read: PanicException: .*retry-limit"):
        load_tokenizer(write(tmp_path, backend))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_no_code_of_a_folder_runs(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on stdin whether it may run it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether code may run"))
    ran = tmp_path / "ran"
    code = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}}
    folder = write(tmp_path / "model", byte_level(), {"eos_token": "</s>", "tokenizer_class": "Evil"} | code, config=code)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    if form == "vocab.json":
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\na b\n")
        (folder / "config.json").write_text(json.dumps(code | {"model_type": "gpt2"}))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer("ab", add_special_tokens=False)["input_ids"] == [256]
    assert not ran.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "x.jinja"])
def test_pipes_and_devices_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", byte_level())
    (folder / "notes.log").symlink_to("/dev/null")  # which nobody reads
    assert resolve(folder).path == folder
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file, found a pipe"):
        resolve(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file, found a device"):
        resolve(folder)


def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    for path in (tmp_path / "model.gguf", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="expected a regular file, found a"):
            resolve(path)


def test_links_are_what_they_stand_for(tmp_path: Path) -> None:
    """The hub's cache is made of them."""
    blobs = write(tmp_path / "blobs", byte_level())
    (tmp_path / "snapshot").mkdir()
    for path in blobs.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    assert load_tokenizer(tmp_path / "snapshot").eos_token == "</s>"


def test_tokens_without_a_row(tmp_path: Path) -> None:
    """Gemma 3 1B has a token for pictures after its last row, and many adapters a padding token."""
    backend = byte_level((*SPECIALS, "<image>", "[PAD]"))
    tokenizer = load_tokenizer(write(tmp_path, backend, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}))
    size = backend.token_to_id("<image>")
    check_tokenizer(tokenizer, {"vocab_size": size})
    assert tokenizer.pad_token == "<unk>"
    for ids in (tokenizer("a picture")["input_ids"], []):
        assert check_ids(ids, tokenizer, size, "prompt: ")
    ids = tokenizer("a <image>")["input_ids"]
    assert check_ids(ids, tokenizer, None)
    with pytest.raises(DataError, match=rf"prompt: expected tokens .*\(ids below {size}\), found '<image>' \({size}\)"):
        check_ids(ids, tokenizer, size, "prompt: ")


def test_an_end_without_a_row_is_refused(tmp_path: Path) -> None:
    backend = byte_level((*SPECIALS, "<eos>"))
    tokenizer = load_tokenizer(write(tmp_path, backend, {"eos_token": "<eos>"}))
    with pytest.raises(CheckpointError, match=r"'<eos>': every text has this token, and the model has no embedding for it"):
        check_tokenizer(tokenizer, {"vocab_size": backend.token_to_id("<eos>")})


@pytest.mark.parametrize("value", [-1, 2.0, "2", [[2]], {"a": 2}, True])
def test_stop_ids_are_ids(tmp_path: Path, value: Any) -> None:
    folder = write(tmp_path, byte_level(), generation_config={"eos_token_id": value})
    with pytest.raises(
        CheckpointError,
        match=r"generation_config.json: eos_token_id: expected ids of tokens, whole numbers from 0 to 2147483647, found",
    ):
        stop_ids(folder, load_tokenizer(folder))


def test_forms_of_tokenizers(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    for name in ("tokenizer.model", "vocab.json", "spiece.model"):
        (tmp_path / name).write_bytes(b"")
        assert has_tokenizer(tmp_path)
        (tmp_path / name).unlink()


def words(count: int, *, digits: bool) -> tuple[tuple[str, str], ...]:
    """Merges of so many pairs of letters beyond ASCII, and of a digit with a space if the vocabulary was trained so."""
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if not letter.isascii()]
    pairs = tuple((first, second) for first in letters for second in letters)[:count]
    return (*pairs, ("\u0120", "1")) if digits else pairs


@pytest.mark.parametrize(
    ("count", "digits", "split", "warned"),
    [
        (5000, False, False, True),  # as transformers writes SmolLM2's from its GGUF
        (5000, False, True, False),  # as it is on the hub
        (5000, True, False, False),  # as GPT-2's
        (500, False, False, False),  # too few to tell
    ],
)
def test_a_splitter_that_the_vocabulary_was_not_trained_with_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, digits: bool, split: bool, warned: bool
) -> None:
    backend = byte_level(merges=words(count, digits=digits))
    folder = write(tmp_path, single_digits(backend) if split else backend)
    with caplog.at_level("WARNING"):
        tokenizer = load_tokenizer(folder)
    assert ("its vocabulary was trained on single digits" in caplog.text) == warned
    same(tokenizer, Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.mark.parametrize(("ends", "expected"), [((), "<stop>"), (("<stop>",), "<spare>"), (("<end>", "<spare>"), "<stop>")])
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_no_end_of_a_text_becomes_the_padding_token(tmp_path: Path, file: str, ends: tuple[str, ...], expected: str) -> None:
    """The vocabulary has no token that was made for padding: the first special one that nothing else uses is taken."""
    backend = byte_level(("<end>", "<|im_end|>", "<stop>", "<spare>"))
    ids = [backend.token_to_id(text) for text in ends]
    folder = write(tmp_path, backend, {"eos_token": "<end>", "bos_token": "<end>"}, **{file: {"eos_token_id": ids}})
    assert load_tokenizer(folder).pad_token == expected


def test_a_padding_token_that_the_files_name_stays(tmp_path: Path) -> None:
    """Qwen pads with a token that ends a text too; that is the choice of who made the model."""
    backend = byte_level(("<|im_end|>", "<|endoftext|>", "<spare>"))
    ids = [backend.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    folder = write(tmp_path, backend, names, generation_config={"eos_token_id": ids})
    assert load_tokenizer(folder).pad_token == "<|endoftext|>"


@pytest.mark.parametrize("stated", [False, True])
def test_eos_is_saved_as_the_padding_token_only_where_the_files_say_so(tmp_path: Path, stated: bool) -> None:
    backend = byte_level(("<end>",))
    names = {"eos_token": "<end>", "bos_token": "<end>", "unk_token": "<end>"} | ({"pad_token": "<end>"} if stated else {})
    tokenizer = load_tokenizer(write(tmp_path / "base", backend, names))
    assert tokenizer.pad_token == "<end>"  # batches need one
    (tmp_path / "saved").mkdir()
    save_tokenizer(tokenizer, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config.get("pad_token") == ("<end>" if stated else None)
    assert load_tokenizer(tmp_path / "saved").pad_token == "<end>"


def test_ids_that_no_token_has_end_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, byte_level(), {}, generation_config={"eos_token_id": [1, 10**9]})
    tokenizer = load_tokenizer(folder)
    warn_of_unknown_ends(resolve(folder), tokenizer)
    assert 10**9 not in stop_ids(folder, tokenizer) >= {1}
    assert "names as the end of a text 1000000000, which is no token of this model" in caplog.text


@pytest.mark.parametrize("place", ["vocabulary", "added"])
def test_an_id_takes_no_memory(tmp_path: Path, place: str) -> None:
    """The library makes a list as long as the largest id."""
    folder = write(tmp_path, byte_level(), {})
    values = json.loads((folder / "tokenizer.json").read_text())
    if place == "vocabulary":
        values["model"]["vocab"]["-"] = 2**31 - 1
    else:
        values["added_tokens"][0]["id"] = 2**31 - 1
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="expected ids of tokens below 16,777,216, found 2147483647"):
        load_tokenizer(folder)


def test_padding_of_a_file_is_that_of_no_call(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_padding(length=10**9)
    backend.enable_truncation(2)
    assert len(load_tokenizer(write(tmp_path, backend, {}))("abcdef")["input_ids"]) > 2  # type: ignore[arg-type]
