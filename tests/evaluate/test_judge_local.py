"""The local judge against whole forward passes of its own, and through the command. (Two seconds, most of it compiling.)"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from judge_kills import write_answers

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.commands.evaluate import main
from qlora_jax.errors import DataError
from qlora_jax.evaluate.judge import Comparison, encode_comparisons, verdict_log_probabilities

LONGEST = 2048


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> tuple[Any, Any, Any]:
    graphdef, state = nnx.split(load_model(open_checkpoint(str(tiny_llama)), quantization=None, dtype=jnp.float32))
    return graphdef, state, load_tokenizer(tiny_llama)


def test_probabilities_are_those_of_whole_passes(tiny: tuple[Any, Any, Any]) -> None:
    graphdef, state, tokenizer = tiny
    asked = [Comparison(q, "Why?", ("a", "b"), ("So. " * (20 * q + 1), "No.")) for q in range(3)]
    prompts = encode_comparisons(asked, tokenizer, LONGEST)
    assert prompts.shortened == 0
    found = np.full((3, 3), np.nan)
    for indices, values in verdict_log_probabilities(graphdef, state, prompts, batch_size=2):
        found[indices] = values
    np.testing.assert_allclose(np.exp(found).sum(1), 1)

    @jax.jit
    def logits(tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        return model.logits(model.hidden(tokens)[0])

    for index, (row, comparison) in enumerate(zip(prompts.tokens, asked, strict=True)):
        text = tokenizer.decode(row)
        assert text.endswith("Verdict: ")  # the tokens of this tokenizer are bytes
        assert all(part.strip() in text for part in comparison.answers)
        padded = np.pad(row, (0, LONGEST - len(row)))[None]  # one program for all
        chosen = np.asarray(logits(padded), np.float64)[
            len(row) - 1, [tokenizer.convert_tokens_to_ids(one) for one in "123"]
        ]
        expected = chosen - np.log(np.exp(chosen - chosen.max()).sum()) - chosen.max()
        np.testing.assert_allclose(found[index], expected, atol=1e-4)


def test_long_answers_are_shortened(tiny: tuple[Any, Any, Any]) -> None:
    tokenizer = tiny[2]
    asked = [Comparison(1, "Why?", ("a", "b"), ("long " * 500, "No.")), Comparison(1, "Why?", ("b", "a"), ("No.", "So."))]
    prompts = encode_comparisons(asked, tokenizer, LONGEST)
    assert (prompts.shortened, len(prompts.tokens)) == (1, 2)
    assert all(len(row) <= LONGEST for row in prompts.tokens)
    text = tokenizer.decode(prompts.tokens[0])
    assert 0 < text.count("long ") < 500
    assert "No." in text
    with pytest.raises(DataError, match="expected at most 300 tokens without the answers"):
        encode_comparisons(asked, tokenizer, 300)


def test_the_command(make_tiny_llama: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, model = tmp_path / "judgements.jsonl", make_tiny_llama(max_position_embeddings=LONGEST)
    command = [
        "judge",
        *map(str, write_answers(tmp_path, 2)),
        "--local",
        "--model",
        str(model),
        "--output",
        str(output),
    ]
    command += ["--max-length", str(LONGEST), "--judge-model", "tiny", "--batch-size", "2", "--data-type", "none"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["judge"]
    assert (found["judge"], found["judged"], found["kept"]) == ("tiny", 4, 0)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {(row["question_id"], row["model_a"]) for row in rows} == {(q, model) for q in range(2) for model in "ab"}
    assert all(row["verdict"] == 1 + int(np.argmax(row["log_probabilities"])) for row in rows)
    output.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["judge"]
    assert (found["judged"], found["kept"]) == (1, 3)
