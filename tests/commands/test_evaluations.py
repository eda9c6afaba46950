"""The sub-commands of evaluate: what they print, and one line for what is wrong. (Two seconds, most of it imports.)"""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from qlora_jax.commands.evaluate import EVALUATIONS, main
from qlora_jax.commands.evaluations import agreement, elo, score
from qlora_jax.errors import OptionError

ROOT = Path(__file__).parents[2]
SCORES = [(1, "gpt-3.5", "m", 6, 5), (2, "gpt-3.5", "m", 4, 3), (1, "m", "gpt-3.5", 2, 4), (2, "m", "gpt-3.5", -1, -1)]
VERDICTS = [(1, "a", "b", 1), (2, "b", "a", 2), (1, "b", "c", 3), (2, "c", "b", 1), (3, "a", "c", 2), (4, "a", "c", -1)]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    names = ("question_id", "model_a", "model_b", "score_a", "score_b")
    return written(tmp_path / "scores.jsonl", [dict(zip(names, row, strict=True)) for row in SCORES])


@pytest.fixture
def verdicts(tmp_path: Path) -> Path:
    names = ("question_id", "model_a", "model_b", "verdict")
    return written(tmp_path / "verdicts.jsonl", [dict(zip(names, row, strict=True)) for row in VERDICTS])


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_sub_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and text in shown for name, text in EVALUATIONS.items())
    assert main(["rank"]) == 2
    assert capsys.readouterr().err == f"error: unknown command 'rank': expected one of {', '.join(EVALUATIONS)}\n"
    modules = {path.stem for path in (ROOT / "qlora_jax" / "commands" / "evaluations").glob("*.py")}
    assert modules - {"__init__", "output"} == set(EVALUATIONS)


def test_score(scores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(scores), "--plot", str(tmp_path / "scores.png")]) == 0
    captured = capsys.readouterr()
    *table, last = captured.out.splitlines()
    assert table[-1].split()[:4] == ["|", "m", "|", "65.0"]  # (8 / 10 + 2 / 4) / 2
    found = json.loads(last)
    row = found["scores"]["m"]
    assert (row["relative"], row["shown_second"], row["shown_first"]) == pytest.approx((65, 80, 50))
    assert row["low"] <= row["relative"] <= row["high"]
    assert (row["rows"], row["left_out"]) == (3, 1)
    assert (found["reference"], found["left_out"]) == ("gpt-3.5", 1)
    assert "scores: 4, left out without a judgement: 1; models: 2, questions: 2" in captured.err
    assert imread(tmp_path / "scores.png").std() > 0


def test_score_leaves_models_out(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question_id": 1, "model_a": "m", "model_b": "n", "score_a": 3, "score_b": 4}
    scores.write_text(scores.read_text() + json.dumps(row))
    assert main(["score", str(scores), "--reference", "gpt-3.5"]) == 0
    captured = capsys.readouterr()
    assert list(json.loads(captured.out.splitlines()[-1])["scores"]) == ["m"]
    assert "models left out (no rows with gpt-3.5): 1 (n)" in captured.err


def test_elo(verdicts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "elo.png"
    assert main(["elo", str(verdicts), "--orders", "100", "--resamples", "50", "--plot", str(plot)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert list(found["elo"]) == ["c", "a", "b"]  # by rating
    for ratings in (found["elo"], found["bradley_terry"]):
        assert all(row["low"] <= row["rating"] <= row["high"] for row in ratings.values())
        assert sum(row["rating"] for row in ratings.values()) == pytest.approx(3000)
    assert (found["comparisons"], found["orders"], found["verdicts"], found["left_out"]) == (5, 100, 5, 1)
    assert list(found["by_comparisons"]) == ["1", "2", "5"]
    assert "of the resamples have no finite ratings" in captured.err
    assert imread(plot).std() > 0
    assert main(["elo", str(verdicts), "--models", "a", "b", "--orders", "9"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["bradley_terry"] is None
    assert "Bradley-Terry: no finite ratings" in captured.err


def test_agreement(scores: Path, verdicts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(verdicts.read_text().replace('"verdict": 3', '"verdict": 1'))
    assert main(["agreement", str(verdicts), str(other)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])["agreement"]
    assert {name: judge["rows"] for name, judge in found["judges"].items()} == {"verdicts": 5, "other": 5}
    (pair,) = found["pairs"]
    assert (pair["judges"], pair["items"], pair["same"]) == (["verdicts", "other"], 5, 0.8)
    assert found["fleiss_kappa"]["value"] == pytest.approx(pair["kappa"]["value"])
    assert main(["agreement", str(scores)]) == 0  # one judge
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["agreement"]
    assert (found["pairs"], found["fleiss_kappa"], found["judges"]["scores"]["both_orders"]) == ([], None, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score"], "error: score: expected a file of scores, found none"),
        (["elo"], "error: elo: expected a file of verdicts, found none"),
        (["agreement"], "error: agreement: expected a file of scores or verdicts, found none"),
        (
            ["elo", "scores.jsonl"],
            "error: scores.jsonl: expected verdicts (question_id, model_a, model_b, verdict), found scores",
        ),
        (["score", "verdicts.jsonl"], "found verdicts, which the command elo reads"),
        (["elo", "none.jsonl"], "none.jsonl"),
        (
            ["elo", "verdicts.jsonl", "--models", "a", "d"],
            "error: models: expected models of verdicts.jsonl (a, b, c), found 'd'",
        ),
        (["elo", "verdicts.jsonl", "--models", "a"], "expected verdicts on common questions of a, found no rows"),
        (["elo", "verdicts.jsonl", "--comparisons", "9"], "error: comparisons: expected at most the 5 verdicts"),
        (["score", "scores.jsonl", "--reference", "gpt-4"], "error: reference: expected models of scores.jsonl"),
        (["score", "scores.jsonl", "--models", "n"], "error: models: expected models of scores.jsonl"),
        (["score", "scores.jsonl", "--plot", "scores.txt"], "error: plot: expected a file that ends in one of"),
        (
            ["agreement", "scores.jsonl", "verdicts.jsonl"],
            "error: scores and verdicts: expected judgements of the same models",
        ),
        (
            ["agreement", "scores.jsonl", "scores.jsonl"],
            "error: agreement: expected each file once, found scores.jsonl twice",
        ),
        (
            ["agreement", "verdicts.jsonl", "named.jsonl"],
            "error: named.jsonl: expected each judge in one file, found verdicts, which verdicts.jsonl has too; rename the",
        ),
        (["agreement", "verdicts.jsonl", "--models", "a"], "expected judgements between the models a, found no rows"),
    ],
)
def test_one_line_for_what_is_wrong(
    scores: Path,
    verdicts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(scores.parent)
    written(Path("named.jsonl"), [json.loads(verdicts.read_text().splitlines()[0]) | {"judge": "verdicts"}])
    assert main(arguments) == 1
    captured = capsys.readouterr()
    *_, last = captured.err.splitlines()
    assert message in last
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (agreement.Options, {"resamples": 0}, "resamples: expected at least 1, found 0"),
        (agreement.Options, {"seed": -1}, "seed: expected at least 0, found -1"),
        (score.Options, {"seed": -1, "resamples": 0}, "resamples: .* found 0; seed: expected at least 0, found -1"),
        (elo.Options, {"seed": -1}, "seed: expected at least 0, found -1"),
        (elo.Options, {"resamples": 0}, "resamples: expected at least 1, found 0"),
        (elo.Options, {"comparisons": -1}, "comparisons: expected at least 0, found -1"),
        (elo.Options, {"orders": 0}, "orders: expected a positive number, found 0"),
        (elo.Options, {"k_factor": float("nan")}, "k_factor: expected a positive number, found nan"),
        (elo.Options, {"start": float("inf")}, "start: expected a finite number, found inf"),
    ],
)
def test_numbers_are_checked_before_files_are_read(command: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        command(**options)


def test_a_number_out_of_range_names_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "none.jsonl", "--seed", "-1"])
    assert "seed: expected at least 0, found -1" in capsys.readouterr().err


def test_options_first_are_those_of_mmlu(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", str(tiny_llama)], ["mmlu", "--model", str(tiny_llama)]):
        assert main(arguments) == 1
        assert capsys.readouterr().err == "error: --mmlu: expected a file of questions or cais/mmlu, found none\n"
