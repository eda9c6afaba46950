r"""The pre-tokenizers of byte-level BPE, by the names that GGUF files have for them (`tokenizer.ggml.pre`).

A pre-tokenizer is a list of regular expressions. Each cuts its matches out of the pieces that those before it left; what is
between two matches is a piece as well. Where llama.cpp has a custom function or an approximation, this is the expression of
the model's own tokenizer.json, in the syntax of the tokenizers library (Oniguruma).

llama.cpp knows a few more names, which are of other kinds of tokenizers (`OTHER_KINDS`): BPE without bytes (Gemma 4), and
embedding models, whose texts end in a separator.

Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json files of the models.
"""

from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

__all__ = ["OTHER_KINDS", "SPLITS", "Split", "named_pre_tokenizer", "pre_tokenizer"]


class Split(NamedTuple):
    """A value of `tokenizer.ggml.pre`."""

    patterns: tuple[str, ...] = ()
    then_gpt2: bool = False  # at last GPT-2's expression is applied, which the library has built in
    whole_words: bool = False  # a word that is in the vocabulary becomes one token, without the merges
    add_bos: bool = False  # where the file has no flag of its own


OTHER_KINDS = frozenset(
    {"gemma4", "granite-embed-multi-311m", "jina-v1-en", "jina-v2-code", "roberta-bpe", "sarvam-moe", "whitespace"}
)
DIGIT, UP_TO_3_DIGITS = r"\p{N}", r"\p{N}{1,3}"
# Groups of three digits, of which the first may be shorter: 1 234 567.
DIGITS_FROM_THE_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Contractions, words; numbers, whose length varies; punctuation, line ends, spaces.
CONTRACTION, WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
WORDS = rf"{CONTRACTION}|{WORD}"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
# Words in which a capital begins a new one; contractions belong to the word before them, or stand alone.
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
SLASHED = REST.replace(r"[\r\n]*|", r"[\r\n/]*|", 1)


def cased(numbers: str, rest: str, contraction: str = f"{CONTRACTION}?", but: str = "") -> str:
    """Return the expression of GPT-4o's kind; `but` is subtracted from the letters."""
    before, upper, lower = r"[^\r\n\p{L}\p{N}]?", f"[{UPPER}{but}]", f"[{LOWER}{but}]"
    return "|".join((f"{before}{upper}*{lower}+{contraction}", f"{before}{upper}+{lower}*{contraction}", numbers, rest))


# DeepSeek's letters: those with a case of most scripts, by their code points.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5 "
    "3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 "
    "1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC "
    "1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D "
    "212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B "
    "A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB "
    "10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
CASED_LETTERS = "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED.split())
EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CHINESE_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
ASIAN_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
ASCII_THEN_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
DEEPSEEK_V3 = rf"{ASCII_THEN_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}"
KOREAN_TO_CHINESE = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+|"
    f"[\u3105-\u312f]+|{CHINESE_AND_KANA}"
)
CLAUSE = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
RUNS_OF_SPACES = "|".join(rf"\s{{{2**power}}}(?!\S)" for power in range(9, 1, -1)) + r"|\s{1,2}(?!\S)|\s{1}"

SINGLE_DIGITS = Split((DIGIT,), then_gpt2=True)
LLAMA3 = Split((f"{WORDS}|{UP_TO_3_DIGITS}|{REST}",), whole_words=True, add_bos=True)
LLAMA3_MERGED = Split(LLAMA3.patterns)
QWEN2 = Split((f"{WORDS}|{DIGIT}|{REST}",))
GPT_4O = Split((cased(UP_TO_3_DIGITS, SLASHED),))
V3 = Split((UP_TO_3_DIGITS, CHINESE_AND_KANA, DEEPSEEK_V3))
BLOOM = Split((CLAUSE,))
BAILING = Split(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)

_NAMES: dict[str, Split] = {
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert exaone4": Split(then_gpt2=True),
    "mpt olmo jais trillion granite-docling": Split(then_gpt2=True),
    # As llama.cpp splits, and as SmolLM2 was trained. transformers reads such files with GPT-2's split instead:
    # its ids differ where digits follow two or more spaces or line ends (147 of 10,110 real texts).
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": SINGLE_DIGITS,
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": LLAMA3,
    "smaug-bpe dbrx glm4 chatglm-bpe": LLAMA3_MERGED,
    "minicpm5": Split((UP_TO_3_DIGITS, rf"{WORDS}|\p{{N}}+|{REST}"), whole_words=True),
    "jais-2": Split((f"{WORDS}|{UP_TO_3_DIGITS}|{REST.partition('|')[0]}|\\s*[\\r\\n]+|{RUNS_OF_SPACES}",)),
    "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2": QWEN2,
    "qwen35": Split(
        (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}",)
    ),
    "ufakzeka": Split((f"{WORD}|{DIGIT}|{REST}",)),
    "laguna": Split((r"[^\n]+|[\n]+", *QWEN2.patterns)),
    "seed-coder": Split((rf"{WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{SPACES}",)),
    "bailingmoe bailingmoe2 llada-moe": BAILING,
    "exaone-moe": Split(
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "tekken": Split((cased(DIGIT, SLASHED, contraction=""),), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": GPT_4O,
    "granite-embed-multi-97m": GPT_4O._replace(whole_words=True),
    "tiny_aya cohere2moe": Split((r"\d{1,3}(?=(?:\d{3})*\b)", *GPT_4O.patterns)),
    "kimi-k2": Split((r"[\p{Han}]+|" + cased(UP_TO_3_DIGITS, REST, but=r"&&[^\p{Han}]"),)),
    "youtu": Split((KOREAN_TO_CHINESE, cased(DIGIT, SLASHED)), whole_words=True),
    "deepseek-llm": Split(
        (
            r"[\r\n]",
            rf"\s?[{CASED_LETTERS}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            EAST_ASIAN,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": Split((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", EAST_ASIAN, DIGIT)),
    "deepseek-v3 hunyuan-dense joyai-llm hy_v4": V3,
    "spark2_5": Split(
        (UP_TO_3_DIGITS, CHINESE_AND_KANA, rf"{ASCII_THEN_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+", DIGIT)
    ),
    "afmoe": Split((DIGITS_FROM_THE_RIGHT, ASIAN_SCRIPTS, DEEPSEEK_V3)),
    "falcon": Split((r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9][0-9][0-9]")),
    "bloom poro-chat gpt3-finnish": BLOOM,
    "viking": Split((*BLOOM.patterns, DIGIT)),
    "superbpe": Split((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "chameleon": Split(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            DIGIT,
            r"[\p{P}!-/:-@\[-`{-~]",
        ),
        then_gpt2=True,
        add_bos=True,
    ),
}
SPLITS: dict[str, Split] = {name: split for names, split in _NAMES.items() for name in names.split()}


def named_pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer that a value of `tokenizer.ggml.pre` names."""
    return pre_tokenizer(SPLITS[pre])


def pre_tokenizer(split: Split) -> pre_tokenizers.PreTokenizer:
    """Return the pre-tokenizer of the tokenizers library for a split; it writes the bytes of the pieces, too."""
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in split.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.then_gpt2))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
