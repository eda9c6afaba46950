"""The pre-tokenizers that GGUF files name: pieces of texts by hand, all expressions by another engine. About 2 seconds."""

from pathlib import Path

import pytest

from qlora_jax.checkpoint.gguf.splits import GPT2, OTHER_KINDS, SPLITS, named_pre_tokenizer
from qlora_jax.data import PLAIN_ANSWERS

TEXT = (
    "I'LL pay 1234567 €!!\n\nOK  two  spaces; self.getElementById('x1') /* 3 */\r\n    return\t"
    "東京タワー x² 한국어 ñandú don't… (foo) "
)


def pieces_of(name: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in named_pre_tokenizer(name).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("deepseek-llm", "if (x1 == 23)\n\ty…", ["if", " (", "x", "1", " ==", " ", "23", ")", "\n", "\ty", "…"]),
        ("deepseek-llm", "in 東京 2024年。 ", ["in", " ", "東京", " ", "2024", "年", "。", " "]),
        ("deepseek-coder", "if (x1 == 23)\n\ty", ["if", " (", "x", "1", " == ", "2", "3", ")", "\n", "\ty"]),
        ("deepseek-coder", "ñandú 東京!\r\n", ["ñandú", " ", "東京", "!", "\r", "\n"]),
        ("deepseek-v3", "foo.bar (12345)\n\n東京タワー!", ["foo", ".bar", " (", "123", "45", ")\n\n", "東京タワー", "!"]),
        ("deepseek-v3", "It's  _x", ["It", "'s", " ", " _", "x"]),
        ("hunyuan-dense", "1234", ["123", "4"]),
        ("spark2_5", "x)\n\n12", ["x", ")", "\n", "\n", "1", "2"]),
        ("falcon", "a $5, 12345!?", ["a", " ", "$", "5", ",", " ", "123", "45", "!?"]),
        ("bloom", "Hi there, you 12.", ["Hi", " there", ",", " you", " 12", "."]),
        ("viking", "Hi there, you 12.", ["Hi", " there", ",", " you", " ", "1", "2", "."]),
        ("superbpe", "in all 1234567 of 12", ["in all ", "1", "234", "567", " of ", "12"]),
        ("tiny_aya", "a 1234567 b", ["a", " ", "1", "234", "567", " b"]),
        ("afmoe", "x1234 東京한국", ["x", "1", "234", " ", "東京한국"]),
        ("kimi-k2", "getX東京タワー's 1234", ["get", "X", "東京", "タワー's", " ", "123", "4"]),
        ("youtu", "a東京、b한국 12", ["a", "東京", "、", "b", "한국", " ", "1", "2"]),
        ("qwen35", "e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
        ("seed-coder", "f()\n\n12", ["f", "()", "\n\n", "1", "2"]),
        ("bailingmoe", "f()\n\n12", ["f", "()\n\n", "1", "2"]),
        ("laguna", "f()\n\n12", ["f", "()", "\n\n", "1", "2"]),
        ("ufakzeka", "Ankara'da 12", ["Ankara", "'da", " ", "1", "2"]),
        ("exaone-moe", "two words, 12", ["two words", ",", " ", "1", "2"]),
        ("minicpm5", "a 12345", ["a", " ", "123", "45"]),
        ("jais-2", "a     b", ["a", "    ", " b"]),
        ("chameleon", "a, b  1\n", ["a", ",", " b", "  ", "1", "\n"]),
        ("megrez", "don't 12", ["don", "'t", " ", "1", "2"]),
        ("pixtral", "don't 1234", ["don", "'t", " ", "123", "4"]),
        ("llama4", "don't getX", ["don't", " get", "X"]),
        ("glm4", "don't 1234", ["don", "'t", " ", "123", "4"]),
        ("exaone4", "don't 1234", ["don", "'t", " 1234"]),
    ],
)
def test_pieces(name: str, text: str, expected: list[str]) -> None:
    assert pieces_of(name, text) == expected


def test_every_expression_by_another_engine() -> None:
    """The expressions as the package regex reads them, whose matches are cut out one expression after the other."""
    regex = pytest.importorskip("regex", reason="the package regex, which transformers brings, is not installed")
    texts = [TEXT, *Path(PLAIN_ANSWERS).read_text(encoding="utf-8").splitlines()[:12]]

    def cut(text: str, patterns: tuple[str, ...]) -> list[str]:
        for pattern in patterns[:1]:
            pieces, end = [], 0
            for found in regex.finditer(pattern, text, regex.V1):
                pieces += [text[end : found.start()], found[0]]
                end = found.end()
            return [word for piece in (*pieces, text[end:]) if piece for word in cut(piece, patterns[1:])]
        return [text]

    by_split = {split: name for name, split in SPLITS.items()}
    for split, name in by_split.items():
        patterns = (*split.patterns, GPT2) if split.then_gpt2 else split.patterns
        for text in texts:
            assert pieces_of(name, text) == cut(text, patterns), name


def test_no_name_is_of_two_kinds() -> None:
    assert not OTHER_KINDS & SPLITS.keys()
