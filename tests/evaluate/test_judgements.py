"""Files of judgements: what is read, and one line for each thing that can be wrong with them. (Well under a second.)"""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judged import score, tournament, verdict, write

from qlora_jax.errors import DataError, OptionError
from qlora_jax.evaluate import notes_on_pairs, read_judgements


def test_both_kinds_are_read(tmp_path: Path) -> None:
    rows = [score(2, "b", "a", 9, 6.5), score(1, "a", "b", -1, -1), score("x", "a", "b", 0, 10)]
    found = read_judgements(write(tmp_path / "scores.jsonl", [rows[0], "", *rows[1:]]))
    assert (found.kind, found.models, found.questions, found.left_out) == ("scores", ("a", "b"), ("1", "2", "x"), 1)
    assert [found.models[i] for i in found.first] == ["b", "a", "a"]
    np.testing.assert_array_equal(found.values, [[9, 6.5], [np.nan, np.nan], [0, 10]])
    np.testing.assert_array_equal(found.points(), [1, np.nan, 0])
    found = read_judgements(write(tmp_path / "verdicts.jsonl", [verdict(1, "a", "b", v) for v in (1, 2, 3, -1)]))
    assert (found.kind, found.left_out) == ("verdicts", 1)
    np.testing.assert_array_equal(found.points(), [1, 0, 0.5, np.nan])
    assert len(found.valid()) == 3


GOOD = verdict(1, "a", "b", 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "f.jsonl: expected judgements, one JSON object a line, found an empty file"),
        (["", "  "], "f.jsonl: expected judgements, one JSON object a line, found an empty file"),
        ([GOOD, '{"question_id": 1, '], "f.jsonl, line 2: expected one JSON object, found '{\"question_id\": 1,'"),
        ([GOOD, "", "[1, 2]", "nothing"], "line 3: expected one JSON object, found list .*the first of 2 malformed lines"),
        ([{"text": "hello"}], r"line 1: expected scores \(question_id, model_a, .* found the columns text"),
        ([GOOD, score(1, "a", "b", 1, 2)], "line 2: verdict: expected a value, found none; the columns are question_id"),
        ([score(1, "a", "b", 1, 2), {**score(1, "a", "b", 1, 2), "score_b": None}], "line 2: score_b: expected a number"),
        (
            [{k: v for k, v in score(1, "a", "b", 1, 2).items() if k != "score_b"}],
            "line 1: score_b: expected a value, found none",
        ),
        ([{**GOOD, "model_b": None}], "line 1: model_b: expected the name of a model, found null"),
        ([{**GOOD, "model_b": " "}], "line 1: model_b: expected the name of a model, found str ' '"),
        ([verdict(1, "a", "a", 1)], "line 1: expected two models, found a judged against itself"),
        ([verdict(1, "a", "b", 4)], "line 1: verdict: expected 1 .* found int 4"),
        ([{**GOOD, "verdict": "A"}], "line 1: verdict: expected 1 .* found str 'A'"),
        ([{**GOOD, "verdict": True}], "line 1: verdict: expected 1 .* found bool True"),
        ([{**GOOD, "verdict": [1]}], "line 1: verdict: expected 1 .* found list"),
        ([{**GOOD, "question_id": None}], "line 1: question_id: expected a whole number or a text, found null"),
        ([{**GOOD, "question_id": 1.5}], "line 1: question_id: expected a whole number or a text, found float 1.5"),
        ([{**GOOD, "question_id": float("inf")}], "line 1: question_id: expected a whole number or a text"),
        ([{**GOOD, "judge": 3}], "line 1: judge: expected a name, found int 3"),
        ([score(1, "a", "b", -2, 1)], "line 1: score_a: expected a number from 0"),
        ([score(1, "a", "b", float("nan"), 1)], "line 1: score_a: expected a number from 0"),
        ([score(1, "a", "b", 10**400, 1)], "line 1: score_a: expected a number from 0"),
        ([{**score(1, "a", "b", 1, 1), "score_b": "9"}], "line 1: score_b: expected a number from 0 .* found str '9'"),
        (["[" * 100_000], "line 1: expected one JSON object, found"),
    ],
)
def test_one_line_for_what_is_wrong(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_judgements(write(tmp_path / "f.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match=r"f\.jsonl, line 1: expected UTF-8"):
        read_judgements(tmp_path / "f.jsonl")
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"f\.jsonl\.gz: expected text, .* found a compressed file; decompress it first"):
        read_judgements(tmp_path / "f.jsonl.gz")
    with pytest.raises(DataError, match="expected a file of judgements, found a folder"):
        read_judgements(tmp_path)
    with pytest.raises(OSError, match=r"no.jsonl"):
        read_judgements(tmp_path / "no.jsonl")


def test_the_wrong_kind_names_the_right_command(tmp_path: Path) -> None:
    scores = write(tmp_path / "scores.jsonl", [score(1, "a", "b", 1, 2)])
    verdicts = write(tmp_path / "verdicts.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"expected verdicts .* found scores, which the command score reads"):
        read_judgements(scores, "verdicts")
    with pytest.raises(DataError, match=r"expected scores .* found verdicts, which the command elo reads"):
        read_judgements(verdicts, "scores")


def test_the_columns_of_both_kinds(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [score(1, "a", "b", 4, 2) | {"verdict": 2}])
    assert read_judgements(path, "scores").values.tolist() == [[4, 2]]
    assert read_judgements(path, "verdicts").points().tolist() == [0]
    assert read_judgements(path).kind == "scores"
    write(path, [verdict(1, "a", "b", 2) | {"score_a": 4}])  # scores are not complete
    assert read_judgements(path).kind == "verdicts"
    with pytest.raises(DataError, match="line 1: score_b: expected a value, found none"):
        read_judgements(path, "scores")


def test_whole_floats_are_numbers_of_questions(tmp_path: Path) -> None:
    found = read_judgements(write(tmp_path / "f.jsonl", [verdict(1, "a", "b", 1), GOOD | {"question_id": 1.0}]))
    assert found.questions == ("1",)


def test_models_are_chosen(tmp_path: Path) -> None:
    found = read_judgements(write(tmp_path / "f.jsonl", tournament()))
    chosen = found.between(["d", "b"])
    assert chosen.models == ("b", "d")
    assert len(chosen) == 12
    with pytest.raises(
        OptionError, match=r"models: expected models of .*f\.jsonl \(a, b, c, d\), found 'bb'; did you mean b"
    ):
        found.between(["a", "bb"])


def test_orders_that_are_missing_or_repeated_are_said(tmp_path: Path) -> None:
    both = [verdict(1, "a", "b", 1), verdict(1, "b", "a", 2)]
    path = tmp_path / "f.jsonl"
    assert notes_on_pairs(read_judgements(write(path, both))) == []
    missing, repeated = notes_on_pairs(read_judgements(write(path, [*both, both[0], verdict(2, "b", "a", 1)])))
    assert "judgements without a counterpart in the other order: 1, the first of them with b before a" in missing
    assert "that repeat a question, a pair and an order: 1;" in repeated
