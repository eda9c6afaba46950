"""scripts/studies/compare.py: its grid, its intervals against scipy's own tests, and a small comparison end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qlora_jax.cli import parse
from qlora_jax.finetune import Options
from scripts.studies import compare as script
from scripts.studies.comparison import cell, grid, page
from scripts.studies.comparison.intervals import difference, interval, verdict
from scripts.studies.comparison.power import detectable, finding, power_of, seeds_needed


@pytest.mark.parametrize("name", [*script.STUDY, *script.QUICK, "dora/fp4/r4", "lora/r8/int4+dq/q_proj"])
def test_a_variant_becomes_flags_of_the_job(name: str) -> None:
    variant = grid.parse_variant(name)
    options = parse(Options, description=None, arguments=variant.flags())
    quantization = options.model.quantization()
    stored = "none" if quantization is None else quantization.data_type + "+dq" * quantization.double_quantization
    assert stored == variant.storage
    if variant.rank is not None:
        assert options.lora.rank == variant.rank
        assert options.lora.target_modules == variant.targets
    assert grid.parse_variant(variant.name) == variant


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lorra", "unknown method 'lorra'; expected one of lora"),
        ("full/nf4", "full takes no storage, found nf4"),
        ("full/r4", "full takes no rank, found 4"),
        ("lora/nf4/fp4", "expected one storage, found 'fp4' too"),
        ("lora/nf44/all-linear", "expected one targets, found 'all-linear' too; storages are none, nf4"),
    ],
)
def test_variants_that_make_no_sense(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        grid.parse_variant(name)


def test_axes_make_a_product_without_repetitions() -> None:
    found = grid.product(["lora", "full"], ["none", "nf4"], [4, 8], ["all-linear", "q_proj,v_proj"])
    assert len(found) == 2 * 2 * 2 + 1
    assert len(set(found)) == len(found)


def test_intervals_agree_with_the_paired_test() -> None:
    draws = np.random.default_rng(0)
    for shift in (0.0, 0.3, 1.0, -1.0):
        base = {seed: float(draws.normal()) for seed in range(5)}
        other = {seed: base[seed] + shift + 0.2 * float(draws.normal()) for seed in range(5)}
        test: Any = stats.ttest_rel(list(other.values()), list(base.values()))
        low, high = test.confidence_interval(0.95)
        change = difference(other, base)
        assert change is not None
        assert change.half is not None
        np.testing.assert_allclose((change.mean - change.half, change.mean + change.half), (low, high), rtol=1e-9)
        said = verdict(change, lower_is_better=True)
        assert said == ("equal within the interval" if test.pvalue > 0.05 else "better" if shift < 0 else "worse")
    assert verdict(interval([1.0]), lower_is_better=True) == "one seed: no verdict"
    assert verdict(difference({0: 1.0}, {1: 1.0}), lower_is_better=True) == "no seed in common"


def test_the_power_is_that_of_a_simulation() -> None:
    """Of many simulated studies with the smallest detectable difference, four of five find it."""
    draws = np.random.default_rng(0)
    for seeds in (2, 3, 5, 10):
        size = detectable(0.7, seeds)
        assert power_of(size, 0.7, seeds) == pytest.approx(0.8, abs=1e-6)
        samples = draws.normal(size, 0.7, (20_000, seeds))
        found = np.asarray(stats.ttest_1samp(samples, 0.0, axis=1).pvalue) < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.01)
        assert seeds_needed(0.7, size * 1.0001) == seeds
    assert detectable(1.0, 1) == float("inf")
    assert detectable(0.0, 3) == 0.0
    assert seeds_needed(1.0, 1e-3) is None
    # For many seeds, the normal approximation of textbooks.
    assert detectable(1.0, 400) == pytest.approx((1.96 + 0.8416) / 20, rel=0.01)


def test_equal_is_said_only_where_the_interval_is_within_the_margin() -> None:
    baseline = {0: 1.0, 1: 1.1, 2: 1.2}
    cases = {
        "equal": {0: 1.001, 1: 1.099, 2: 1.2005},
        "not settled": {0: 1.2, 1: 1.0, 2: 1.2},
        "worse": {0: 1.3, 1: 1.4, 2: 1.51},
        "better": {0: 0.8, 1: 0.9, 2: 1.01},
    }
    for said, found in cases.items():
        one = finding(found, baseline, margin=0.01, lower_is_better=True)
        assert one is not None
        assert one.said == said
        assert one.margin == pytest.approx(0.011)
        spread = np.std([found[seed] - baseline[seed] for seed in range(3)], ddof=1)
        assert one.detectable == pytest.approx(detectable(float(spread), 3), rel=1e-6)
    alone = finding({0: 1.0}, {0: 1.0}, margin=0.01, lower_is_better=True)
    assert alone is not None
    assert (alone.said, alone.text()) == ("not settled", "not settled")
    assert finding({0: 1.0}, {1: 1.0}, margin=0.01, lower_is_better=True) is None


def test_answers_are_compared_by_their_ends() -> None:
    assert cell.final_answer("5 + 5 = 10\n#### 1,010\n") == cell.final_answer("so it is\n#### 1010.") == "1010"
    assert cell.final_answer("  four \n") == "four"


@pytest.mark.integration
def test_a_comparison_end_to_end(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both runs finish, the report holds them, and the same command reads what is there."""
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"question": f"{n} + {n}?", "answer": f"#### {2 * n}"}) for n in range(24)]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = script.Arguments(
        data=(str(data),),
        output=tmp_path / "out",
        model=str(tiny_llama),
        variants=("lora/none/r2", "lora/nf4+dq/r2/q_proj"),
        seeds=(0,),
        held_out=8,
        steps=2,
        batch_size=2,
        max_length=64,
        answers=2,
    )
    script.compare(arguments)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    dense, packed = report["results"]["lora/none/r2/all-linear"]["0"], report["results"]["lora/nf4+dq/r2/q_proj"]["0"]
    assert packed["trainable_parameters"] == 2 * 2 * (64 + 64)  # layers × rank × (in + out)
    assert dense["trainable_parameters"] > packed["trainable_parameters"]
    for run in (dense, packed):
        assert 0 <= run["figures"]["eval_mean_token_accuracy"] <= 1
        assert 0 <= run["figures"]["eval_exact_match"] <= 1
        assert run["steps"] == 2
    assert dense["figures"]["eval_loss"] != packed["figures"]["eval_loss"]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert "one seed: no verdict" in html
    assert "lora/nf4+dq/r2/q_proj" in (tmp_path / "out" / "report.md").read_text()
    result = next((tmp_path / "out" / "cells").glob("*none*/result.json"))
    result.write_text(json.dumps({**dense, "steps": 99}))  # read, not made again
    script.compare(arguments)
    assert '"steps": 99' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a comparison with steps 2; choose another --output"):
        script.compare(script.dataclasses.replace(arguments, steps=3))


def test_the_report_of_several_seeds(tmp_path: Path) -> None:
    def run(loss: float) -> dict[str, Any]:
        sizes = {"trainable_parameters": 10, "checkpoint_bytes": 1, "peak_memory_bytes": 1, "tokens_per_second": 1.0}
        return {"figures": {"eval_loss": loss}, **sizes}

    results = {
        "a": {seed: run(1.0 + 0.01 * seed) for seed in range(3)},
        "b": {seed: run(2.0 + 0.01 * seed + 1e-3 * seed**2) for seed in range(3)},
    }
    page.write(results, "a", tmp_path, "title", "intro", "{}")
    text = (tmp_path / "report.md").read_text()
    assert "Every pair of variants" not in text
    assert "| b | 1.002 ± 0.0052 | worse |" in text
    assert "By held-out loss: b: worse than a. What this run could have seen: it would have seen a difference of" in text
    assert "## What the seeds could have shown" in text


def test_each_against_each(tmp_path: Path) -> None:
    losses = {"a": (1.0, 1.1, 1.2), "b": (2.0, 2.101, 2.2), "c": (1.0, 1.3, 1.0)}
    sizes = {"trainable_parameters": 10, "checkpoint_bytes": 1, "peak_memory_bytes": 1, "tokens_per_second": 1.0}
    results = {
        name: {seed: {"figures": {"eval_loss": loss}, **sizes} for seed, loss in enumerate(found)}
        for name, found in losses.items()
    }
    header, rows = page.pair_table(results)
    assert header[1:] == list(losses)
    by_name = {row[0]: dict(zip(losses, row[1:], strict=True)) for row in rows}
    assert by_name["a"] == {"a": "", "b": "", "c": ""}
    assert by_name["b"]["a"].endswith(": worse")
    assert by_name["c"]["a"].endswith(": equal within the interval")
    assert by_name["c"]["b"].endswith(": better")
    page.write(results, "a", tmp_path, "title", "intro", "{}")
    assert "## Every pair of variants: held-out loss" in (tmp_path / "report.md").read_text()
