"""scripts/measure_plan.py: its recipes, its fit on rows whose factors are known, and bad input. Nothing is compiled here."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from script_module import import_script

from qlora_jax.models.llama import llama_config
from qlora_jax.plan import SIZES, quick_plan

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "measure_plan.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return import_script(SCRIPT)


def test_recipes_are_plans(script: Any) -> None:
    config = llama_config(SIZES["smollm2-135m"])
    peaks = {name: quick_plan(make(config), "tpu").peak for name, make in script.RECIPES.items()}
    assert set(peaks) == {"paper", "packed", "offload", "dots"}
    assert peaks["dots"] > peaks["offload"]


def test_the_fit_finds_factors_and_leaves_those_of_what_is_nowhere(script: Any) -> None:
    known = {"loss": {"logits": 2.0, "table": 7.0}, "layer": {"stream": 3.0, "table": 5.0}}
    rows = []
    for logits, stream in ((9, 1), (8, 2), (1, 9), (2, 8), (7, 1), (1, 6)):
        row = {"settled": 5, "features": {"logits": 10**6 * logits, "stream": 10**6 * stream, "table": 0, "adapter": 0}}
        rows.append(row | {"compiled": script.peak_with(row, known)})
    start = {"loss": {"logits": 1.0, "table": 7.0}, "layer": {"stream": 1.0, "table": 5.0}}
    found = script.fit(rows, start)
    assert found["loss"] == pytest.approx({"logits": 2.0, "table": 7.0}, abs=0.01)
    assert found["layer"] == pytest.approx({"stream": 3.0, "table": 5.0}, abs=0.01)


def test_bad_input_is_one_line() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--models", "llama-8b"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: models: expected some of ")
    assert done.stderr.strip().endswith("found llama-8b")
