"""The checks of the attached device, which here is the CPU: they pass, find what is wrong, and name what they leave out."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.plan import machine_named
from qlora_jax.quant import quantize, tiles
from scripts import verify_device
from scripts.verification import kernels, machine, processes, training
from scripts.verification.checks import Check, Row, Skipped, checked, measured, rows_of
from scripts.verification.kernels import Matrix
from scripts.verification.machine import nearest_device
from scripts.verification.references import attention, causal_mask, dense_matrix
from scripts.verification.sections import SECTIONS, checks_of
from scripts.verification.worker import rows_in_time

GIB = 2**30


def verify(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = verify_device.main(["--small", "--output", str(tmp_path / "device.json"), *arguments])
    report = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    assert report["passes"] == (code == 0)
    return code, report["rows"]


@pytest.mark.integration
def test_every_section_passes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = verify(
        tmp_path, "--minutes", "20", "--sections", *[name for name in SECTIONS if name not in ("65b", "smollm2")]
    )
    assert code == 0
    passed = {row["section"] for row in rows if row["status"] == "pass"}
    assert passed == {"kernels", "attention", "packing", "8b"}
    assert [row for row in rows if row["name"] == "1 rows, XLA" and row["status"] == "measured"]
    assert all(row["text"].startswith("skipped: ") for row in rows if row["status"] == "skipped")
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in rows)


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of few rows errs by a thousandth in one of 96 columns."""
    product, case = tiles.matmul, (Matrix((128, 96)), "float32", "auto")
    only = [Check((kernels.product_name(*case),), lambda: kernels.product_rows(*case))]  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "checks", lambda small: only)
    monkeypatch.setattr(kernels, "ROWS", (1,))
    assert verify(tmp_path, "--sections", "kernels")[0] == 0
    monkeypatch.setattr(tiles, "matmul", lambda x, w: product(x, w).at[:, 7].multiply(1.001))
    code, rows = verify(tmp_path, "--sections", "kernels")
    assert code == 1
    assert [row["status"] for row in rows if row["section"] == "kernels"] == ["fail"]


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    code, rows = verify(tmp_path, "--minutes", "1e-9", "--sections", "kernels", "attention")
    assert code == 0
    skipped = [row for row in rows if row["section"] != "machine"]
    names = [name for section in ("kernels", "attention") for check in checks_of(section, True) for name in check.names]
    assert [row["name"] for row in skipped] == names
    assert all("the time was over" in row["text"] for row in skipped)


def test_arguments_are_checked_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_device.main(["--small", "--output", "no/such/folder/device.json"]) == 1
    assert "--output: expected a file in a folder that exists" in capsys.readouterr().err
    assert verify_device.main(["--small", "--minutes", "0"]) == 1
    assert "--minutes: expected more than 0" in capsys.readouterr().err


def test_names_of_rows_are_unique() -> None:
    for section in SECTIONS:
        for small in (False, True):
            names = [name for check in checks_of(section, small) for name in check.names]
            assert names
            assert len(names) == len(set(names))


def test_errors_and_skips_become_rows() -> None:
    def breaks() -> Iterator[Row]:
        yield measured("a", "1 s")
        raise RuntimeError("no such instruction\nmore")

    def has_no_kernel() -> Iterator[Row]:
        raise Skipped("no kernel")
        yield

    found = list(rows_of(Check(("a", "b", "c"), breaks)))
    assert [(row.name, row.status) for row in found] == [("a", "measured"), ("b", "fail"), ("c", "skipped")]
    assert found[1].text == "RuntimeError: no such instruction"
    assert [row.text for row in rows_of(Check(("a",), has_no_kernel))] == ["skipped: no kernel"]
    assert checked("x", {"a": 1e-7, "b": float("nan")}, 1e-6).status == "fail"
    over = rows_in_time([Check(("a",), breaks)], "kernels", lambda: True, "the time was over")
    assert [(row.section, row.status) for row in over] == [("kernels", "skipped")]


@pytest.mark.parametrize(
    ("program", "statuses", "text"),
    [
        ("import json; print(json.dumps(ROW), flush=True)", ["measured", "fail"], "ended with status 0"),
        ("import json, os; print(json.dumps(ROW), flush=True); os.abort()", ["measured", "fail"], "ended with status -6"),
        ("import time; time.sleep(60)", ["skipped", "skipped"], "the time of this section was over"),
    ],
)
def test_a_process_that_ends_early(
    program: str, statuses: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "a", "status": "measured", "text": "1 s", "values": {}, "section": "kernels"}
    file = tmp_path / "python"  # in place of the interpreter that runs the worker
    file.write_text(f"#!{sys.executable} -S\nROW = {row!r}\n{program}\n", encoding="utf-8")
    file.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(file))
    found = list(processes.rows_in_process("kernels", ["a", "b"], 1.5, {}))
    assert [row.status for row in found] == statuses
    assert text in found[-1].text


def test_a_known_device_has_the_figures_of_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "attached_machine", lambda: machine_named("h100"))
    (check,) = machine.checks(small=True)
    found = {row.name: row for row in rows_of(check)}
    assert set(found) == set(check.names)
    assert found["device of the plans"].status == "measured"
    assert found["device of the plans"].values["name"] == "h100"
    assert found["devices"].values["platform"] == "cpu"


def test_a_peak_passes_within_the_limits_of_its_plan() -> None:
    def status(planned: float, before: float | None, peak: float | None) -> str:
        sizes = [None if size is None else int(size * GIB) for size in (before, peak)]
        return training._compared("peak", int(planned * GIB), 0.05, *sizes, program=0).status

    assert [status(10, 5, peak) for peak in (9.3, 10.7, 9.2, 10.8)] == ["pass", "pass", "fail", "fail"]
    assert status(10, None, None) == status(10, 11, 11) == "skipped"


@pytest.mark.parametrize(
    ("kind", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 140.4, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("NVIDIA A100-SXM4-40GB", None, "a100-40"),
        ("NVIDIA H100 PCIe", 79.6, None),
        ("NVIDIA L4", 22.2, "l4"),
        ("NVIDIA L40S", 44.4, None),
        ("NVIDIA H100 NVL", 93.1, None),
        ("TPU v5 lite", None, "v5e"),
        ("TPU v6 lite", 31.2, "v6e"),
        ("cpu", None, None),
    ],
)
def test_the_plans_device_of_an_attached_one(kind: str, gib: float | None, name: str | None) -> None:
    found = nearest_device(kind, None if gib is None else int(gib * GIB))
    assert (found and found.name) == name


@pytest.mark.parametrize("shape", [(128, 32), (100, 32)])
def test_the_reference_of_a_matrix_is_near_what_was_quantised(shape: tuple[int, int]) -> None:
    """In both layouts; a wrong order of nibbles, blocks or groups of scales would give unrelated values."""
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    error = np.linalg.norm(dense_matrix(quantize(jnp.asarray(w))) - w) / np.linalg.norm(w)
    assert 0.05 < error < 0.12


def test_the_gradients_of_the_reference_are_those_of_its_result() -> None:
    """By finite differences in float64, with a cap, segments and grouped heads."""
    generator = np.random.default_rng(0)
    q, k, v, gradient = (generator.standard_normal((1, 6, heads, 4)) for heads in (4, 2, 2, 4))
    mask = causal_mask(6, np.array([[1, 1, 1, 2, 2, 0]]), window=2)
    found = attention(q, k, v, mask, gradient, cap=2.0)
    assert not found["result"][:, 5].any()
    for name, place in (("gradient of q", 0), ("gradient of k", 1), ("gradient of v", 2)):
        direction = generator.standard_normal(found[name].shape)
        values = []
        for step in (1e-5, -1e-5):
            moved = [x + step * direction if index == place else x for index, x in enumerate((q, k, v))]
            values.append((attention(*moved, mask, gradient, cap=2.0)["result"] * gradient).sum())  # type: ignore[arg-type]
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, (found[name] * direction).sum(), rtol=1e-7)


def test_a_plain_softmax_is_the_reference_without_a_mask() -> None:
    q, k, v = (np.random.default_rng(0).standard_normal((1, 3, 1, 4)) for _ in range(3))
    found = attention(q, k, v, np.ones((1, 3, 3), bool), np.zeros_like(q))["result"]
    weights = np.asarray(jax.nn.softmax(q[0, :, 0] @ k[0, :, 0].T / 2, axis=-1))
    np.testing.assert_allclose(found[0, :, 0], weights @ v[0, :, 0], rtol=1e-5)
