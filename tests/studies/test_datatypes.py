"""scripts/studies/datatypes.py on a tiny random model: losses, errors and tests against NumPy, scipy and bitsandbytes."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from qlora_jax.checkpoint.load import find, load_model
from qlora_jax.checkpoint.open import open_checkpoint
from qlora_jax.models import linear_mappings
from qlora_jax.models.llama import llama_config
from qlora_jax.quant import Quantization, codebook
from scripts.studies import datatypes as script
from scripts.studies.datatype_study import normality, summary
from scripts.studies.datatype_study.journal import Journal
from scripts.studies.datatype_study.texts import Texts, text_losses
from scripts.studies.datatype_study.weights import bits_per_parameter, quantize_in_place

TINY = ("--texts", "4", "--length", "32", "--sample", "50", "--units", "3", "--batch-size", "2")


def test_losses_and_errors(tiny_llama: Path) -> None:
    """Losses of texts of several lengths against the logits of the same model in 4 bits; errors against NumPy's."""
    checkpoint, how = open_checkpoint(str(tiny_llama)), Quantization("fp4-e2m1", 32, False)
    keys = tuple(linear_mappings(llama_config(checkpoint.config).parameter_mappings))
    graphdef, state = nnx.split(load_model(checkpoint, quantization=None, dtype=jnp.float32, progress=False))
    errors = quantize_in_place(state, checkpoint, keys, how)
    assert list(errors) == [name for key in keys for name in key.names()]

    table = codebook("fp4-e2m1").astype(np.float64)
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        w = checkpoint.read(name).astype(np.float64)
        blocks = w.reshape(-1, 32)
        largest = np.abs(blocks).max(1, keepdims=True)
        nearest = table[np.abs((blocks / largest)[..., None] - table).argmin(-1)] * largest
        error = nearest.reshape(w.shape) - w
        assert errors[name]["rms"] == pytest.approx(np.sqrt((error**2).sum() / (w**2).sum()), rel=1e-5)
        assert errors[name]["mean"] == pytest.approx(np.abs(error).sum() / np.abs(w).sum(), rel=1e-5)
        assert errors[name]["largest"] == pytest.approx(np.abs(error).max() / np.sqrt((w**2).mean()), rel=1e-5)
        key = next(key for key in keys if name in key.names())
        found = find(state, key.path).get_value()[key.names().index(name)]
        np.testing.assert_allclose(found, nearest.reshape(w.shape).T, rtol=1e-5, atol=1e-6)

    packed_graph, packed = nnx.split(load_model(checkpoint, quantization=how, dtype=jnp.float32, progress=False))
    generator = np.random.default_rng(0)
    texts = Texts(tuple(generator.integers(3, 200, length).astype(np.int32) for length in (5, 40, 17)), {"": 3})
    losses = text_losses(graphdef, state, texts, batch_size=2)
    logits_of = jax.jit(lambda tokens: nnx.merge(packed_graph, packed)(tokens))
    for tokens, loss in zip(texts.tokens, losses, strict=True):
        padded = np.zeros((1, 40), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(logits_of(padded), np.float64)[0, : len(tokens) - 1]
        of_each = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), tokens[1:]]
        assert loss == pytest.approx(of_each.sum(), rel=1e-4)


def test_bits_that_are_needed_and_stored() -> None:
    shapes = [(4096, 4096), (1024, 4096)]
    assert bits_per_parameter(shapes, Quantization("nf4", 64, False)) == (4.5, 4.5)
    needed, stored = bits_per_parameter(shapes, Quantization("nf3", 64, True))
    assert (needed, stored) == pytest.approx((3.127, 4.127), abs=1e-3)
    assert bits_per_parameter(shapes, Quantization("nf2", 1024, False)) == (2 + 1 / 32, 4 + 1 / 32)


def test_shapiro_and_wilks_test_is_scipys() -> None:
    w = np.random.default_rng(0).standard_normal((40, 96), np.float32)
    w[7] = np.random.default_rng(1).uniform(-1, 1, 96)
    w[9] = 0.5
    found = normality.examine_matrix(w, np.random.default_rng([3, 5]), 500, 40)
    generator = np.random.default_rng([3, 5])
    expected = scipy.stats.shapiro(w.reshape(-1)[generator.choice(w.size, 500, replace=False)].astype(np.float64))
    assert (found["w"], found["p"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-6)
    rejected = [index for index, row in enumerate(w) if index == 9 or scipy.stats.shapiro(row).pvalue < 0.05]
    assert {7, 9} <= set(rejected)
    assert (found["sample"], found["units"], found["rejected_units"]) == (500, 40, len(rejected))
    assert found["distinct"] == 32
    few = normality.examine_matrix(np.round(4 * w) / 4, np.random.default_rng(0), 500, 4)
    assert few["distinct"] < 32


def test_the_order_and_its_verdicts() -> None:
    """Types that differ by more than their noise are told apart, others are not."""
    generator = np.random.default_rng(0)
    predicted, texts = np.full(30, 10), generator.normal(30, 5, 30)
    added = {"good": 0.0, "alike": 0.02, "bad": 2.0}
    rows = {name: {"losses": (texts + more + generator.normal(0, 0.2, 30)).tolist()} for name, more in added.items()}
    steps = summary.order(list(rows), rows, predicted)
    assert [(step.before, step.after) for step in steps][1][1] == "bad"
    assert [step.verdict for step in steps] == ["no clear difference", "worse"]
    assert steps[1].added.value == pytest.approx(0.2, abs=0.03)
    assert summary.order(["bad", "good"], rows, predicted, by_mean=False)[0].verdict == "better"


def test_a_journal_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    journal = Journal(path, {"model": "a", "sizes": (1, 2)})
    journal.add("one", {"losses": [1.5]})
    path.write_text(path.read_text() + '{"key": "two", "row": {"los')
    again = Journal(path, {"model": "a", "sizes": (1, 2)})
    assert (again.rows, again.found) == ({"one": {"losses": [1.5]}}, 1)
    again.add("two", 2)
    assert Journal(path, {"model": "a", "sizes": (1, 2)}).rows == {"one": {"losses": [1.5]}, "two": 2}
    with pytest.raises(ValueError, match=r"expected the study .* with model 'a', found 'b'; --output names another"):
        Journal(path, {"model": "b", "sizes": (1, 2)})
    path.write_text("no JSON\n")
    with pytest.raises(ValueError, match="expected the JSON lines of a study"):
        Journal(path, {"model": "a"})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["datatypes.py", *arguments])
    return script.main()


@pytest.mark.integration
def test_the_report(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A grid beside bitsandbytes, whose losses are ours; run again it measures nothing, and more types go on from there."""
    for package in ("torch", "bitsandbytes", "accelerate"):
        pytest.importorskip(package, reason=f"{package}, to compare with, is not installed")
    questions = [
        {"subject": "s", "input": f"What is {n}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:", "output": "ABCD"[n % 4]}
        for n in range(6)
    ]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    output = tmp_path / "study"
    common = ("--model", str(tiny_llama), "--questions", str(tmp_path / "mmlu.jsonl"), "--output", str(output), *TINY)
    wanted = (*common, "--quick", "--data-types", "nf4", "fp4", "--peer")
    assert run(monkeypatch, *wanted) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [storage["key"] for storage in report["storages"]] == [
        "dense", "nf4-64-double", "fp4-64-double", "nf4-64", "fp4-64"
    ]  # fmt: skip
    kinds = report["peer"]["kinds"]
    assert set(kinds) == {"dense", "nf4", "nf4-double", "fp4", "fp4-double"}
    assert all(kind["equal"] and kind["largest_of_a_text"] < 1e-3 for kind in kinds.values())
    assert len({round(kind["theirs"], 5) for kind in kinds.values()}) == 5
    assert report["storages"][1]["loss"] == kinds["nf4-double"]["ours"]
    cells = [json.loads(line) for line in (output / "cells.jsonl").read_text().splitlines()]
    assert all(len(cell["row"]["right"]) == 6 for cell in cells if "losses" in cell.get("row", {}) and cell["key"] != "peer")
    page = (output / "report.md").read_text()
    assert f"{report['storages'][1]['added']['value']:+.4f}" in page
    for name in ("perplexity", "layers"):
        assert f"report-{name}.png" in page
        assert (output / f"report-{name}.png").read_bytes().startswith(b"\x89PNG")
    details = json.loads((output / "report.json").read_text())
    assert len(details["errors"]["fp4-64"]) == len(details["normality"]) == 14

    before = (output / "cells.jsonl").read_bytes()
    assert run(monkeypatch, *wanted) == 0
    assert (output / "cells.jsonl").read_bytes() == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["storages"] == report["storages"]
    more = (*common, "--data-types", "nf4", "nf2", "--block-sizes", "64", "128", "--double-quantization", "yes")
    assert run(monkeypatch, *more, "--minutes", "0", "--page", str(tmp_path / "types.md")) == 0
    stopped = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [storage["key"] for storage in stopped["storages"]] == ["dense", "nf4-64-double", "nf2-64-double"]
    assert stopped["cells_left"] == 2
    assert "2 cells of the grid have not been measured yet" in (tmp_path / "types.md").read_text()
    assert (tmp_path / "types-blocks.png").exists()
    assert (output / "cells.jsonl").read_bytes().startswith(before)
    assert run(monkeypatch, *common, "--quick", "--seed", "1") == 1
    assert "expected the study that was begun there, with seed 0, found 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--block-sizes", "48"],
            "--block-sizes: expected one or more of 32, 64, 128, 256, 512",
        ),
        (["--question-block-sizes", "7"], "--block-sizes: expected one or more of"),
        (["--texts", "1"], "--texts: expected at least 2, found 1"),
        (["--sample", "5001"], "--sample: expected 3 to 5000, found 5001"),
        (["--page", "nowhere/page.md"], "--page: expected a folder that exists, found"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is looked for."""
    assert run(monkeypatch, *arguments, "--model", "nowhere") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1


def test_unknown_types_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--data-types", "nf5", "--model", "nowhere")
    assert "nf5" in capsys.readouterr().err
