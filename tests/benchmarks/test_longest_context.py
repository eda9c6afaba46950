"""scripts/benchmarks/longest_context.py: its cards, its search, its page, and bad input. Nothing is compiled."""

import pytest

from qlora_jax.plan import quick_plan
from qlora_jax.train import build_step
from scripts.benchmarks import longest_context as script

MODEL = "llama-3.1-8b"


def test_cards_have_what_cuda_reports() -> None:
    assert script.card(24).device.memory_bytes == 24_217 * 2**20
    assert script.card(12).device.memory_bytes == 24_217 * 2**19
    assert script.card(80).device.name == "a100-80"


def test_the_length_found_is_the_longest_that_leaves_a_gib_free() -> None:
    machine, way = script.card(16), script.FIRST
    step = build_step(script.spec_of(MODEL, way, script.STEP), platform="cuda")
    row = script._search(MODEL, "16 GB", way, machine, step)
    limit = machine.device.memory_bytes - 2**30
    longer = script.spec_of(MODEL, way, row["length"] + script.STEP)
    assert row["peak"] <= limit < quick_plan(longer, "cuda", step=step).peak
    exact = quick_plan(script.spec_of(MODEL, way, row["length"]), "cuda")  # the step of another length changes nothing
    assert (exact.peak, exact.host_peak) == (row["peak"], row["host"])


def test_the_page() -> None:
    rows = [
        {"model": MODEL, "place": place, "way": way, "length": 1024, "peak": 2**30, "host": 2**31, "limit": 2**32}
        for place in (*(f"{size} GB" for size in script.PUBLISHED[MODEL]), *script.CHIPS)
        for way in script.WAYS
    ]
    rows[0] |= {"length": None, "peak": None, "host": None}
    lines = script.markdown(
        rows, [rows[5] | {"compiled": 2**31, "workspace": 2**29, "versions": {"jax": "1.2"}}]
    ).splitlines()
    assert "| 8 GB | 2,972 | does not fit | does not fit | 1,024 | 1,024 | 1,024 | – | – |" in lines
    assert "| 12 GB | 21,848 | 932 | 1,024 | 1,024 | 1,024 | 1,024 | 0.05 | 2.00 |" in lines  # a cell that is lost
    assert "| v5e | 1,024 | 1,024 | 1,024 | 1,024 | 2.00 |" in lines
    assert f"| {MODEL} | 12 GB | dense, 8-bit | 1,024 | 1.00 | 2.00 | 4.00 | 0.50 |" in lines
    assert lines[-1] == "Compiled with jax 1.2."


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--models", "llama-8b"]) == 1
    error = capsys.readouterr().err
    assert error == "error: models: expected some of llama-3.1-8b, llama-3.3-70b, found llama-8b\n"
