"""scripts/benchmarks/measure_memory.py: its table, and bad input. The compilations are those of tests/plan."""

import pytest

from scripts.benchmarks import measure_memory as script


def test_the_table() -> None:
    run = {"device": "h100", "model": "llama-7b", "rank": 64, "batch": 1, "length": 512, "offloaded": "most"}
    sizes = {"peak": 5 * 2**30, "weights": 2**30, "adapter": 2**29, "temporaries": 2**28, "host": 3 * 2**30}
    rows = [run | sizes | {"compile_seconds": 7.4, "versions": {"jax": "1.2"}}, run | {"peak": None, "why": "too large"}]
    lines = script.markdown([*rows, rows[0] | {"device": "v5e:2x2"}]).splitlines()
    header, rule, *table = [line for line in lines if line.startswith("|")][:4]
    assert {line.count("|") for line in (header, rule, *table)} == {11}
    assert table[0] == "| llama-7b | 64 | 1 × 512 | most | 5.00 | 1.00 | 0.50 | 0.25 | 3.00 | 7 |"
    assert "does not fit" in table[1]
    assert [line for line in lines if line.startswith("## ")] == ["## h100", "## v5e:2x2", "## What remains on the device"]
    assert lines[lines.index("## h100") + 2] == "jax 1.2."
    assert lines[-1].endswith("20% for llama-7b on h100, 20% for llama-7b on v5e:2x2.")


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--models", "llama-8b"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: models: expected some of llama-7b, ")
    assert error.endswith("found llama-8b\n")
    assert error.count("\n") == 1
