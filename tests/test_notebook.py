"""docs/colab.ipynb: all cells run on a CPU, with a tiny model and few steps as settings. (Integration: 27 CPU-seconds.)"""

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "colab.ipynb"
SMALL = {
    "steps": 4,
    "batch_size": 4,
    "max_length": 256,
    "answer_tokens": 8,
    "rows": 2,
}  # a token of the tiny model is a byte


def code_cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def is_parameters(cell: dict[str, Any]) -> bool:
    return "parameters" in cell["metadata"].get("tags", ())


def test_it_has_settings_in_one_cell_and_no_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = code_cells()
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    (settings,) = filter(is_parameters, cells)
    named = {target.id for node in ast.parse("".join(settings["source"])).body for target in node.targets}  # type: ignore[attr-defined]
    assert named == {"repository", "model", "folder", "learning_rate", *SMALL}


def test_readers_find_it() -> None:
    root = NOTEBOOK.parents[1]
    for page, link in (
        ("README.md", "(docs/colab.ipynb)"),
        ("docs/README.md", "(colab.ipynb)"),
        ("mkdocs.yml", ": colab.ipynb\n"),
    ):
        assert link in (root / page).read_text(encoding="utf-8")


@pytest.mark.integration
def test_all_cells_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(name, reason=f"{name}, for the server, is not installed")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown: list[list[int]] = []
    monkeypatch.setattr(plt, "show", lambda: shown.append([len(line.get_xdata()) for line in plt.gca().lines]))
    names: dict[str, Any] = {}
    for cell in code_cells():
        exec("".join(cell["source"]), names)
        if is_parameters(cell):
            names |= SMALL | {"model": str(tiny_llama)}
    plt.close("all")
    assert shown == [[4, 2]], "the losses of four steps, and of the held-out examples before and after"
    printed = capsys.readouterr().out
    assert "of 16 orders right" in printed
    assert "orders/run, " in json.loads(next(line for line in printed.splitlines() if line.startswith('{"compare"')))["data"]
    assert Path("orders/merged/config.json").is_file()
    assert names["reply"]["model"] == "orders"
    assert names["reply"]["usage"]["completion_tokens"] > 0
