"""scripts/benchmarks/measure_packing.py in small: its shares and ratios, against a count over the rows themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks import measure_packing as script

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmarks" / "measure_packing.py"


@pytest.mark.integration
def test_the_report(tiny_llama: Path, tmp_path: Path) -> None:
    """Of twelve rows of 25 learned bytes, padded ones hold 25 of 64 places, packed ones two of them."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{number:025}"}) + "\n" for number in range(12)))
    command = [sys.executable, str(SCRIPT), str(data), "--model", str(tiny_llama), "--length", "64"]
    done = subprocess.run([*command, "--steps", "2", "--rank", "2"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # so small a step may cost anything
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["padding_share"] == pytest.approx({"padded": 1 - 25 / 64, "packed": 1 - 50 / 64})
    assert report["predicted_ratio"] == pytest.approx(2.0)
    assert {name: len(times) for name, times in report["seconds"].items()} == {"padded": 2, "packed": 2}
    rates = {
        run: (1 - report["padding_share"][run]) * 2 * 64 / report["seconds_a_step"][run] for run in ("padded", "packed")
    }
    assert report["tokens_per_second"] == pytest.approx(rates)
    assert report["measured_ratio"] == pytest.approx(rates["packed"] / rates["padded"])
    assert done.returncode == (0 if abs(report["measured_ratio"] / 2 - 1) <= 0.1 else 1)
    assert done.stderr.count("Traceback") == 0


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(tmp_path / "none.jsonl"), "--steps", "0"]) == 1
    assert capsys.readouterr().err == "error: --steps: expected at least 1, found 0\n"
