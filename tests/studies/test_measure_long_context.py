"""scripts/studies/measure_long_context.py in small: its texts, its use of the cache against one dense pass, its page."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.checkpoint.load import load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.checkpoint.tokenizer import load_tokenizer
from qlora_jax.models import CausalLM
from qlora_jax.train import split
from scripts.studies import measure_long_context as script
from scripts.studies.long_context.page import MODELS, table, verdict
from scripts.studies.long_context.texts import DIGITS, Prompt, Writer, answers

SCRIPT = Path(__file__).parents[2] / "scripts" / "studies" / "measure_long_context.py"


@pytest.fixture
def writer(tiny_llama: Path) -> Writer:
    return Writer(load_tokenizer(tiny_llama), answers()[:50], seed=0)


def text_of(tokens: np.ndarray, folder: Path) -> str:
    return str(load_tokenizer(folder).decode(tokens.tolist()))


def test_a_prompt_holds_its_key_once_and_ends_where_it_is_to(writer: Writer, tiny_llama: Path) -> None:
    for number in range(20):
        prompt = writer.prompt("beyond", 300, 5000)
        text = text_of(prompt.tokens, tiny_llama)
        assert text.count(f"The pass key is {text[-DIGITS:]}. Remember it.") == 1, number
        assert len(prompt.tokens) == len(prompt.positions) == 300
        assert prompt.positions[-1] == 5000
        assert prompt.positions[0] >= 0
        assert (np.diff(prompt.positions) >= 1).all()
        told = text.index(" The pass key")  # a token a byte, and a character
        assert prompt.depth == prompt.positions[len(text[:told].encode())] / 5000
        answer = prompt.positions[-len(" What is the pass key? The pass key is 01234") :]
        assert (np.diff(answer) == 1).all()


def test_a_prompt_without_room_for_gaps_has_none(writer: Writer) -> None:
    assert (writer.prompt("real", 300, 299, 0.5).positions == np.arange(300)).all()


def test_a_row_of_training_is_documents_that_ask_for_their_keys_within_reach(writer: Writer, tiny_llama: Path) -> None:
    reach, spans = 128, []
    for _ in range(20):
        row = writer.row(1024, 8000, reach)
        assert {values.shape for values in row.values()} == {(1024,)}
        assert row["positions"].min() >= 0
        assert row["positions"].max() < 8000
        segments = row["segment_ids"]
        for number in range(1, segments[-1]):  # the last one is cut
            inputs, targets, weights, positions = (
                row[name][segments == number] for name in ("inputs", "targets", "loss_mask", "positions")
            )
            assert (inputs[1:] == targets[:-1]).all()
            assert (np.diff(positions) >= 1).all()
            assert (weights[-DIGITS:] == 1).all()
            assert (weights[:-DIGITS] < 1).all()
            seen = text_of(np.append(inputs, targets[-1])[-reach:], tiny_llama)
            assert f"The pass key is {seen[-DIGITS:]}. Remember it." in seen
            spans.append(positions[-1] - positions[0])
    assert min(spans) < 2000 < 6000 < max(spans)


def test_the_cache_in_chunks_answers_as_one_dense_pass(
    tiny_llama: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a random model says, it is asked to say it; something else counts as wrong."""
    monkeypatch.setattr(script, "CHUNK", 32)
    monkeypatch.setattr(script, "GROWTH", 128)
    model = load_model(open_checkpoint(str(tiny_llama)), dtype=jnp.float32, progress=False)
    assert isinstance(model, CausalLM)
    prompt = writer.prompt("real", 200, 199)
    tokens, forward = prompt.tokens.copy(), nnx.jit(CausalLM.__call__)
    for place in range(len(tokens) - DIGITS, len(tokens)):  # what comes later, no token sees
        tokens[place] = int(forward(model, jnp.asarray(tokens[None]))[0, place - 1].argmax())
    prompts = [
        Prompt(kind, said, prompt.positions, prompt.depth) for kind in ("real", "beyond") for said in (tokens, prompt.tokens)
    ]
    assert script.ask(split(model), prompts) == [True, False, True, False]


def test_the_table_and_what_it_says() -> None:
    depths = (0.1, 0.4, 0.5, 0.9)
    prompts = [Prompt("beyond", np.zeros(1), np.zeros(1), depth) for depth in depths]
    right = {MODELS[0]: [False, False, False, True], MODELS[1]: [False] * 4, MODELS[2]: [True] * 4}
    rows = table(prompts, right)
    assert [(row["depth"], row["prompts"]) for row in rows] == [
        ("all", 4),
        ("first third", 1),
        ("middle", 2),
        ("last third", 1),
    ]
    assert [rows[0][name]["value"] for name in MODELS] == [0.25, 0.0, 1.0]
    gained, scaled = (rows[0]["gains"][name] for name in MODELS[:2])
    assert (gained["value"], gained["wins"], gained["losses"], gained["p"]) == (0.75, 3, 0, 0.25)  # 2 · ½³
    assert gained["interval"]["value"] == 0.75
    assert (scaled["value"], scaled["interval"], scaled["p"]) == (1.0, None, 0.125)
    assert verdict(rows[0]).startswith(
        "beyond: of 4 keys the tuned model finds 4, the untuned model 1 with its own positions and 0 with"
    )
    assert verdict(rows[0]).endswith("too few keys for a verdict")
    more = {name: hits * 5 for name, hits in right.items()}
    assert "significantly more than both (p up to 6.1e-05)" in verdict(table(prompts * 5, more)[0])
    less = dict(zip(MODELS, reversed([*more.values()]), strict=True))
    assert "significantly fewer" in verdict(table(prompts * 5, less)[0])


@pytest.mark.integration
def test_the_report(
    make_tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, page = make_tiny_llama(max_position_embeddings=1024), tmp_path / "page.md"
    sizes = ["--extended", "2048", "--length", "1024", "--steps", "2", "--prompts", "2", "--real", "1", "--rank", "2"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model", str(model), *sizes, "--output", str(page)])
    assert script.main() == 0
    printed = capsys.readouterr().out
    report = json.loads(printed.splitlines()[-1])
    assert page.read_text(encoding="utf-8") in printed
    assert len(report["losses"]) == 2
    assert [prompt["kind"] for prompt in report["prompts"]] == ["within"] * 2 + ["beyond"] * 2 + ["real"]
    assert report["prompts"][-1]["last"] == 2047
    assert {name: len(hits) for name, hits in report["right"].items()} == dict.fromkeys(MODELS, 5)
    assert [row["prompts"] for row in report["rows"] if row["depth"] == "all"] == [2, 2, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 1", "--steps: expected at least 2, found 1"),
        ("--length 512 --extended 512", "--length, --extended: expected at most and above the model's context of 512"),
        ("--length 256", "--length: expected at least"),
    ],
)
def test_bad_input_is_one_line(
    tiny_llama: Path, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--model", str(tiny_llama), *options.split()])
    assert script.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert len(said.splitlines()) == 1
