"""MMLU's answers against transformers, on a tiny random model and on the real SmolLM2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.checkpoint import Checkpoint
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.data import DataError
from qlora_jax.errors import CheckpointError
from qlora_jax.evaluate import LETTERS, Question, Scores, encode_questions, evaluate_mmlu, letter_logits, read_questions
from qlora_jax.evaluate import choices as choices_module
from qlora_jax.evaluate.lengths import padded_length


def question(number: int, *, words: int = 1, examples: int = 0) -> Question:
    body = "\n".join(
        [f"Which is {number}?{' well' * words}", *[f"{letter}. {ord(letter)}" for letter in LETTERS], "Answer:"]
    )
    return Question(f"subject_{number % 3}", "Questions.", (f"{body} B",) * examples, body, number % 4)


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Any, Any, Any]:
    graphdef, state = nnx.split(load_model(open_checkpoint(str(tiny_llama)), quantization=None, dtype=jnp.float32))
    return graphdef, state, load_tokenizer(tiny_llama)


def test_logits_equal_transformers(tiny: tuple[Any, Any, Any], tiny_llama: Path) -> None:
    """Prompts of several lengths, more than a batch of them, each against a forward pass of its own."""
    torch = pytest.importorskip("torch", reason="the peers (torch, transformers' models) are not installed")
    from transformers import LlamaForCausalLM

    graphdef, state, tokenizer = tiny
    questions = [question(number, words=1 + 17 * (number % 4)) for number in range(7)]
    prompts = encode_questions(questions, tokenizer, 512)
    assert len({padded_length(len(tokens)) for tokens in prompts.tokens}) > 1
    peer = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    expected = []
    for one in questions:
        # The tokens of this tokenizer are bytes: the space before the letter is one by itself.
        tokens = tokenizer(f"{one.prompt()} ", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = peer(tokens).logits[0, -1].numpy()
        expected.append([logits[tokenizer.convert_tokens_to_ids(letter)] for letter in LETTERS])
    found = letter_logits(graphdef, state, prompts, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    scores = evaluate_mmlu(graphdef, state, prompts, batch_size=3)
    right = np.argmax(expected, 1) == [one.answer for one in questions]
    subjects = np.array([one.subject for one in questions])
    shares = {subject: right[subjects == subject].mean() for subject in sorted(set(subjects))}
    assert scores.by_subject == shares
    assert scores.accuracy == pytest.approx(np.mean(list(shares.values())))


def test_subjects_count_alike() -> None:
    """One question of a subject weighs as much as nine of another."""
    scores = Scores({"a": 9, "b": 0}, {"a": 9, "b": 1})
    assert scores.metrics() == {"mmlu_accuracy": 0.5, "mmlu_accuracy_a": 1.0, "mmlu_accuracy_b": 0.0}


def test_letters_with_their_space_in_the_token(make_tiny_llama: Callable[..., Path]) -> None:
    """Where a tokenizer joins a space with what follows it, " A" is compared and not "A"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Answer", ":", "A", "B", "C", "D", *[f"Ġ{letter}" for letter in LETTERS], "<eos>", "x", "Ġx", "Ċ", "?"]
    merges = [("Ġ", letter) for letter in LETTERS] + [("Ġ", "x")]
    spelled = [("A", "n"), ("An", "s"), ("Ans", "w"), ("Answ", "e"), ("Answe", "r")]
    vocabulary = list(dict.fromkeys([*words, *"Answer", "Ġ", *["".join(pair) for pair in spelled]]))
    model = models.BPE({word: index for index, word in enumerate(vocabulary)}, merges + spelled)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    prompts = encode_questions([Question("a", "", (), "x?\nAnswer:", 0)], tokenizer, 64)
    assert prompts.letters == tuple(vocabulary.index(f"Ġ{letter}") for letter in LETTERS)
    assert tokenizer.decode(prompts.tokens[0]) == "x?\nAnswer:"
    with pytest.raises(DataError, match=r"expected a prompt that a letter can follow, like '… Answer:', found 'Axx'"):
        encode_questions([Question("a", "", (), "Axx", 0)], _without_space(tokenizer), 64)


def _without_space(tokenizer: Any) -> Any:
    """A tokenizer that writes the end of "Axx A" otherwise than that of "Answer: A"."""

    def encode(texts: list[str], **options: Any) -> dict[str, Any]:
        rows = tokenizer(texts, **options)["input_ids"]
        return {"input_ids": [row if "Answer" in text else [*row, 0] for text, row in zip(texts, rows, strict=True)]}

    encode.eos_token_id = tokenizer.eos_token_id  # type: ignore[attr-defined]
    return encode


def test_long_prompts_lose_examples_and_no_question(tiny: tuple[Any, Any, Any]) -> None:
    _, _, tokenizer = tiny
    one = question(1, examples=5)
    whole = encode_questions([one], tokenizer, 10_000)
    assert tokenizer.decode(whole.tokens[0]) == f"{one.prompt()} "
    assert (whole.shortened, whole.left_out) == (0, 0)
    limit = len(whole.tokens[0]) - 1
    shorter = encode_questions([one, question(2, words=200)], tokenizer, limit)
    assert tokenizer.decode(shorter.tokens[0]) == f"{one.prompt(4)} "
    assert (shorter.shortened, shorter.left_out, shorter.subjects) == (1, 1, ("subject_1",))
    assert "1 questions left out, too long without examples" in str(shorter)
    assert tokenizer.decode(encode_questions([one], tokenizer, 100).tokens[0]) == f"{one.prompt(0)} "
    with pytest.raises(DataError, match="expected questions of at most 10 tokens, found none"):
        encode_questions([one], tokenizer, 10)


def test_few_programs_are_compiled(tiny: tuple[Any, Any, Any]) -> None:
    graphdef, state, tokenizer = tiny
    questions = [question(number, words=1 + 3 * number) for number in range(20)]
    prompts = encode_questions(questions, tokenizer, 512)
    assert len({len(tokens) for tokens in prompts.tokens}) > 10
    choices_module._last_logits.clear_cache()  # other tests have compiled it for equal models
    letter_logits(graphdef, state, prompts, batch_size=5)
    assert choices_module._last_logits._cache_size() == 3  # 128, 256 and 512 tokens


@pytest.mark.integration
def test_real_questions_equal_transformers() -> None:
    """SmolLM2 on real questions: the letters that transformers finds likeliest after "Answer:"."""
    torch = pytest.importorskip("torch", reason="the peers (torch, transformers' models) are not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    data = Path(__file__).parents[3] / "shared" / "data" / "mmlu_zero_shot.jsonl"
    if not data.is_file():
        pytest.skip(f"the shared data are not here: {data}")
    try:
        opened = open_checkpoint(str(fetch_default_model()))
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    checkpoint = Checkpoint(
        opened.name, opened.config, opened.shapes, lambda name: np.asarray(opened.read(name), np.float32)
    )
    tokenizer = load_tokenizer(checkpoint.name)
    questions = read_questions(str(data), limit=12, seed=1).questions
    prompts = encode_questions(questions, tokenizer, 128)
    graphdef, state = nnx.split(load_model(checkpoint, quantization=None, dtype=jnp.float32))
    found = letter_logits(graphdef, state, prompts)
    weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.shapes}
    peer = LlamaForCausalLM(LlamaConfig(**{**checkpoint.config, "dtype": "float32"})).eval()
    peer.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    kept = [one for one in questions if len(tokenizer(one.prompt())["input_ids"]) <= 128]
    texts = {json.loads(line)["input"] for line in data.read_bytes().splitlines()}
    assert len(kept) == len(prompts.tokens) > 5
    letters = [tokenizer.convert_tokens_to_ids(f"Ġ{letter}") for letter in LETTERS]
    for row, one in zip(found, kept, strict=True):
        assert one.prompt() in texts, "as in the file"
        with torch.no_grad():
            logits = peer(tokenizer(one.prompt(), return_tensors="pt")["input_ids"]).logits[0, -1].numpy()[letters]
        np.testing.assert_allclose(row, logits, atol=1e-3)
        assert row.argmax() == logits.argmax()
