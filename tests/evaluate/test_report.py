"""The page of `evaluate.py report`: what it shows, that it loads nothing, and that no text becomes markup. (Two seconds.)"""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from judged import score, tournament, verdict, write

from qlora_jax.commands.evaluate import main
from qlora_jax.errors import DataError
from qlora_jax.evaluate import Interval
from qlora_jax.evaluate.report import read_sources
from qlora_jax.evaluate.report.pictures import intervals, shares
from qlora_jax.evaluate.report.results import of_result

HOSTILE = '</td><script>alert("1")</script><img src=x onerror=alert(1)> & \x00\x1b \ud800 ünïcode'


class Page(HTMLParser):
    """What a page consists of: its elements with their attributes, and its text."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(data.decode("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_comparison_is_shown_as_its_command_prints_it() -> None:
    change = {"kind": "gain", "unit": "%", "value": -80.0, "low": -85.0, "high": -75.0, "verdict": "better"}
    base = {"metric": "perplexity", "model": "base", "value": 50.0, "low": 40.0, "high": 60.0}
    mine = base | {"model": "<mine>", "value": 10.0, "low": 9.0, "high": 11.0, "against": "base", "change": change}
    found = Page("\n".join(of_result({"compare": [base, mine], "data": "34 texts", "resamples": 9})).encode())
    assert "Measured on 34 texts." in found.words
    assert "<mine> against base: gain" in found.words
    assert "-80.00 %-85.00 to -75.00basegainbetter" in found.words
    assert sum(tag == "circle" for tag, _ in found.elements) == 3
    for other in ([], [base | {"value": "x"}], [mine | {"change": change | {"low": None}}], [mine | {"against": 3}], ["x"]):
        assert "Measured on" not in "".join(of_result({"compare": other, "data": "34 texts"}))


def test_a_page_of_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row | {"model_a": HOSTILE if row["model_a"] == "a" else row["model_a"]} for row in tournament()]
    rows = [row | {"model_b": HOSTILE if row["model_b"] == "a" else row["model_b"], "judge": "me"} for row in rows]
    scores = [score(q, *order, 8, 6) for q in range(3) for order in (("b", "gpt-3.5"), ("gpt-3.5", "b"))]
    answers = [
        {"question_id": q, "model": model, "prompt": f"Why {q}?", "answer": f"{model}, because {HOSTILE}" + "x" * 3000}
        for q in range(3)
        for model in ("b", HOSTILE)
    ]
    files = [
        write(tmp_path / "verdicts.jsonl", rows),
        write(tmp_path / "scores.jsonl", scores),
        write(tmp_path / "answers.jsonl", answers),
        write(tmp_path / "mmlu.txt", ["law   0.25 of 4", {"accuracy": 0.25, "questions": 4, "note": HOSTILE}]),
        write(
            tmp_path / "compare.json", [{"compare": [{"model": m, "value": 2.0, "low": 1.0, "high": None} for m in "pq"]}]
        ),
    ]
    output = tmp_path / "report.html"
    assert main(["report", *map(str, files), "--output", str(output), "--orders", "50", "--samples", "2"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    data = output.read_bytes()
    assert printed["bytes"] == len(data)
    page = Page(data)
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on")} | (attributes.keys() & {"src", "srcset", "data"})
        assert attributes.get("href", "#").startswith("#"), tag  # type: ignore[union-attr]
    style = data.decode().split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert (
        "meta",
        {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"},
    ) in (page.elements)
    shown = HOSTILE.replace("\x00", "�").replace("\x1b", "�").replace("\ud800", "�")
    assert page.words.count(shown) > 4
    for words in ("Bradley-Terry", "% of gpt-3.5", "133.3", "accuracy", "0.2500", "Question 0", "Question 2", "[cut]", "me"):
        assert words in page.words
    assert "Question 1" not in page.words  # two of three, evenly spread
    assert printed["sections"][0] == "Verdicts: verdicts"


def test_what_cannot_be_calculated_is_a_note(tmp_path: Path) -> None:
    apart = write(tmp_path / "apart.jsonl", [verdict(1, "a", "b", 1), verdict(1, "c", "d", -1)])
    none = write(tmp_path / "none.jsonl", [score(1, "a", "b", -1, -1)])
    assert main(["report", str(apart), str(none), "--output", str(tmp_path / "report.html"), "--orders", "9"]) == 0
    words = Page((tmp_path / "report.html").read_bytes()).words
    assert "expected verdicts that connect all models" in words
    assert "expected judgements, found rows without one only" in words
    assert "nan" not in words.lower()


def test_wrong_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="expected judgements, answers or results, found an empty file"):
        read_sources([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(DataError, match="or the output of a sub-command, whose last line is JSON; found 'nonsense'"):
        read_sources([write(tmp_path / "nonsense.txt", ["nonsense"])])
    with pytest.raises(DataError, match=r"expected a JSON object, found list \[1\]"):
        read_sources([write(tmp_path / "list.json", ["[1]"])])
    good = write(tmp_path / "good.json", [{"accuracy": 1}])
    with pytest.raises(DataError, match="expected each file once"):
        read_sources([good, good])
    assert main(["report", str(good), "--output", str(good)]) == 1
    assert "expected another file than those that are read" in capsys.readouterr().err
    assert json.loads(good.read_text()) == {"accuracy": 1}


def test_points_and_bounds_are_where_they_belong() -> None:
    """The places in a picture are a linear map of the values, the same one for the points, the bounds and the axis."""
    rows = {
        "x": Interval(980.0, 950.0, 1040.0),
        "y": Interval(1013.0, 1000.0, 1021.0),
        "z": Interval(1000.0, math.nan, math.nan),
    }
    drawn = intervals(rows, "ratings")
    points = [float(x) for x in re.findall(r'circle cx="([\d.]+)%"', drawn)]
    bounds = [tuple(map(float, pair)) for pair in re.findall(r'x1="([\d.]+)%" x2="([\d.]+)%" y1="50%"', drawn)]
    ticks = [(float(value), float(x)) for x, value in re.findall(r'<text x="([\d.]+)%"[^>]*>(-?[\d.]+)<', drawn)]
    slope, start = np.polyfit(*zip(*ticks, strict=True), 1)
    np.testing.assert_allclose(points, slope * np.array([980.0, 1013.0, 1000.0]) + start, atol=0.01)
    np.testing.assert_allclose(bounds, slope * np.array([[950.0, 1040.0], [1000.0, 1021.0]]) + start, atol=0.01)
    assert min(x for _, x in ticks) == 0 <= min(map(min, bounds))
    assert max(x for _, x in ticks) == 100 >= max(map(max, bounds))
    widths = [
        float(x) for x in re.findall(r'width="([\d.]+)%" height="70%"', shares({"j": (0.5, 0.2, 0.3)}, ("1", "=", "2")))
    ]
    assert widths == [50, 20, 30]


def test_numbers_that_cannot_be_drawn_are_numbers_of_a_table() -> None:
    for value, low, high in (
        (10**400, 0, 1),
        (1e308, -1e308, 1e308),
        (5e-324, 0.0, 5e-324),
        (math.nan, math.inf, 1),
        (1e16, 1e16, 1e16 + 2),
    ):
        rows = {"a": {"value": value, "low": low, "high": high}, "b": {"value": 1, "low": 0, "high": 1}}
        assert "<table" in "".join(of_result({"x": rows}))
        assert "<table" in "".join(of_result({"x": {"a": rows["a"], "c": rows["a"]}}))
    one: dict[str, object] = {"value": 1, "low": 0, "high": 2}
    assert "<table" in "".join(of_result({"x": [one | {"metric": ["m"]}, one | {"metric": {"m": 1}}]}))
