"""scripts/benchmarks/measure_plan.py: its recipes, its fit on rows with known factors, bad input. Nothing is compiled."""

import pytest

from qlora_jax.models.llama import llama_config
from qlora_jax.plan import SIZES, quick_plan
from scripts.benchmarks import measure_plan as script


def test_recipes_are_plans() -> None:
    config = llama_config(SIZES["smollm2-135m"])
    peaks = {name: quick_plan(make(config), "tpu").peak for name, make in script.RECIPES.items()}
    assert peaks["dots"] > peaks["offload"]


def test_the_fit_finds_factors_and_leaves_those_of_what_is_nowhere() -> None:
    known = {"loss": {"logits": 2.0, "table": 7.0}, "layer": {"stream": 3.0, "table": 5.0}}
    rows = []
    for logits, stream in ((9, 1), (8, 2), (1, 9), (2, 8), (7, 1), (1, 6)):
        row = {"settled": 5, "features": {"logits": 10**6 * logits, "stream": 10**6 * stream, "table": 0, "adapter": 0}}
        rows.append(row | {"compiled": script.peak_with(row, known)})
    start = {"loss": {"logits": 1.0, "table": 7.0}, "layer": {"stream": 1.0, "table": 5.0}}
    found = script.fit(rows, start)
    assert found["loss"] == pytest.approx({"logits": 2.0, "table": 7.0}, abs=0.01)
    assert found["layer"] == pytest.approx({"stream": 3.0, "table": 5.0}, abs=0.01)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--models", "llama-8b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: models: expected some of ")
    assert error.endswith("found llama-8b\n")
    assert error.count("\n") == 1


def test_about_a_third_is_held_out_of_each_device() -> None:
    for device in ("h100", "v5e"):
        keys = [(model, device, recipe) for model in SIZES for recipe in script.RECIPES]
        assert 0.25 < sum(map(script.is_held_out, keys)) / len(keys) < 0.42
