"""The comparison of a base with its quantised form, adapters and merged models. (A second; 12 CPU-s of integration.)"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.adapters.pretrained import Pretrained
from qlora_jax.commands.evaluate import main
from qlora_jax.commands.evaluations import compare
from qlora_jax.commands.evaluations.compare import task_shares
from qlora_jax.commands.train import main as train
from qlora_jax.data import DataError
from qlora_jax.evaluate import Perplexity, Share, change_of, judged_points, read_judgements, value_of, verdict_of

DOCUMENTS = [{"metrics": ["acc"], "acc": 1.0}]
WORDS = ("red", "green", "blue", "black", "white", "grey")


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on rows that a tiny model can learn, 8 of which it held out."""
    folder = tmp_path_factory.mktemp("compared")
    texts = [(f"colour {number}?", WORDS[number % 6] * 3) for number in range(40)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in texts
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(tiny_llama), "--data", str(folder / "data.jsonl"), "--output", str(folder / "colours")]
    flags += ["--max-steps", "12", "--batch-size", "4", "--held-out", "8", "--learning-rate", "0.02", "--rank", "4"]
    flags += ["--samples", "0", "--save-every", "0", "--no-memory-check", "--max-length", "128"]
    assert train(flags) == 0
    return folder / "colours"


@pytest.mark.integration
def test_what_an_adapter_gains(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that the run held out, by the run's own loss, and beside it judged answers and a task; each model loads once.

    The task is one of a harness with a single document, because lm_eval itself takes long to import (test_harness.py).
    """
    base = json.loads((run / "options.json").read_text())["model"]["model"]
    verdicts = tmp_path / "verdicts.jsonl"
    pairs = [("colours", Path(base).name, 1), (Path(base).name, "colours", 2)]
    verdicts.write_text(
        "".join(
            json.dumps({"question_id": question, "model_a": a, "model_b": b, "verdict": verdict}) + "\n"
            for question in range(5)
            for a, b, verdict in pairs
        )
    )
    loads: list[str] = []
    load = Pretrained.load
    monkeypatch.setattr(Pretrained, "load", lambda self, **given: loads.append(self.base.name) or load(self, **given))
    monkeypatch.setattr(compare, "open_tasks", lambda asked: list(asked.names))
    monkeypatch.setattr(compare, "harness_model", lambda pretrained, model, asked: model)
    monkeypatch.setattr(compare, "run_tasks", lambda model, asked, names: {"samples": dict.fromkeys(names, DOCUMENTS)})
    capsys.readouterr()
    assert main(["compare", str(run), "--judgements", str(verdicts), "--resamples", "200", "--tasks", "one"]) == 0
    assert len(loads) == 4
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    rows = {(row["metric"], row["model"]): row for row in found["compare"]}
    assert [key for key in rows if key[0] == "perplexity"] == [
        ("perplexity", name) for name in ("base", "base, nf4+dq", "colours", "colours, merged")
    ]
    assert "8 held-out texts" in found["data"]
    recorded = json.loads((run / "eval_results.json").read_text())["eval_loss"]
    adapter = rows["perplexity", "colours"]
    assert np.log(adapter["value"]) == pytest.approx(recorded, abs=2e-3)
    assert adapter["low"] < adapter["value"] < adapter["high"]
    gain = adapter["change"]
    assert (gain["kind"], gain["verdict"], adapter["against"]) == ("gain", "better", "base, nf4+dq")
    base_value = rows["perplexity", "base, nf4+dq"]["value"]
    assert gain["value"] == pytest.approx(100 * (adapter["value"] / base_value - 1))
    assert gain["high"] < -30, "the adapter has learned"
    assert rows["perplexity", "base, nf4+dq"]["change"]["kind"] == "drift"
    assert abs(rows["perplexity", "colours, merged"]["change"]["value"]) < 30
    assert rows["one, acc in %", "colours, merged"]["change"]["value"] == 0
    judged = rows["judged, % of points", "colours"]
    assert (judged["value"], judged["change"]["value"]) == (100.0, 100.0)


@pytest.mark.integration
def test_data_that_changed_are_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = json.loads((other / "options.json").read_text())
    record["held_out_data"]["checksum"] += 1
    (other / "options.json").write_text(json.dumps(record))
    assert main(["compare", str(other)]) == 1
    assert "the held-out examples are not those of the run, because its data have changed" in capsys.readouterr().err
    record["data"]["held_out"] = 5
    (other / "options.json").write_text(json.dumps(record))
    assert main(["compare", str(run), str(other)]) == 1
    assert "held out different rows: one may have been trained on those of the other" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: compare: expected a base and adapters, or adapters of runs, found none"),
        (["MODEL"], "error: compare: expected an adapter after the base"),
        (["MODEL", "ADAPTER", "ADAPTER"], "expected each adapter once"),
        (["ADAPTER"], "error: compare: expected a base before"),
        (["MODEL", "ADAPTER"], "is not part of a run that held rows out; found none"),
        (["MODEL", "nowhere"], "nowhere"),
        (["RUN", "--data", "none.jsonl"], "none.jsonl"),
        (["RUN", "--mmlu", "none.json"], "none.json"),
        (["RUN", "--judgements", "other.jsonl"], "other.jsonl: expected judgements of base, "),
        (["RUN", "--max-length", "9999"], "max_length: expected at most the 512 positions of the model, found 9,999"),
    ],
)
def test_one_line_for_what_is_wrong(
    run: Path,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "adapter", "alone")
    Path("other.jsonl").write_text('{"question_id": 1, "model_a": "a", "model_b": "b", "verdict": 1}\n')
    named = {"MODEL": str(tiny_llama), "ADAPTER": "alone", "RUN": str(run)}
    capsys.readouterr()
    assert main(["compare", *(named.get(argument, argument) for argument in arguments)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.out == ""


def test_changes_and_verdicts() -> None:
    right, wrong = Share(np.ones(50)), Share(np.zeros(50))
    change = change_of(right, wrong, "gain")
    assert (change.interval.value, change.interval.low, verdict_of(change)) == (100.0, 100.0, "better")
    assert verdict_of(change_of(wrong, right, "gain")) == "worse"
    assert verdict_of(change_of(right, right, "drift")) == "no difference seen"
    assert verdict_of(change_of(Share(np.ones(1)), Share(np.zeros(1)), "gain")) == "too few to tell"
    mixed = Share(np.arange(50) % 2.0)
    found = value_of(mixed, resamples=2_000, seed=0)
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * 50 / np.sqrt(50), rel=0.1)  # of the normal distribution
    texts = Perplexity(np.ones(3), np.ones(3, int), np.ones(3, int), np.ones(3, int), "documents")
    with pytest.raises(DataError, match="expected two models that were measured on the same questions"):
        change_of(texts, right, "drift")


def test_metrics_of_tasks_by_document() -> None:
    samples = [{"metrics": ["acc", "ppl"], "acc": value, "ppl": (1.0, 2)} for value in (1.0, 0.0, True)]
    found = task_shares({"samples": {"one": samples, "none": []}})
    assert list(found) == ["one, acc in %"]
    assert value_of(found["one, acc in %"], resamples=10, seed=0).value == pytest.approx(200 / 3)


def test_points_of_judged_answers(tmp_path: Path) -> None:
    """The mean over a model's comparisons on a question, over the questions that all models answered."""
    rows: list[Any] = [(1, "a", "b", 1), (1, "b", "a", 3), (1, "a", "c", 2), (2, "a", "b", 2), (2, "c", "a", -1)]
    rows += [(3, "b", "c", 1)]
    path = tmp_path / "v.jsonl"
    keys = ("question_id", "model_a", "model_b", "verdict")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    found = judged_points(read_judgements(path), {"first": "a", "second": "b", "third": "not judged"})
    assert {name: share.points.tolist() for name, share in found.items()} == {"first": [0.5, 0.0], "second": [0.25, 1.0]}
    with pytest.raises(DataError, match="expected judgements of x, found a, b, c"):
        judged_points(read_judgements(path), {"x": "x"})
