"""The import direction, read from the sources: quant ← nn ← peft ← models ← checkpoint ← scripts."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qlora_jax"
LAYERS = ("quant", "nn", "peft", "models", "checkpoint")
# What each part may import of the package, beside itself.
ALLOWED: dict[str, frozenset[str]] = {
    **{name: frozenset(LAYERS[:index]) for index, name in enumerate(LAYERS)},
    "data": frozenset(),
    "train": frozenset(LAYERS) - {"models", "checkpoint"} | {"data"},
    "evaluate": frozenset(LAYERS) - {"models", "checkpoint"} | {"data"},
    "serve": frozenset(LAYERS) - {"models", "checkpoint"} | {"data"},
    "plan": frozenset(LAYERS) - {"checkpoint"} | {"train", "serve"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports anywhere in it, relative imports resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(PACKAGE).parts[0] for path in SOURCES} >= {
        "quant",
        "nn",
        "models",
        "checkpoint",
        "data",
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0]
    if part not in ALLOWED:
        pytest.skip(f"the design sets no direction for {part}")
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("qlora_jax.")}
    wrong = (inside & ALLOWED.keys()) - ALLOWED[part] - {part}
    assert not wrong, f"{path.relative_to(ROOT)} ({part}) must not import {', '.join(sorted(wrong))}"
    assert "scripts" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_never_imported(path: Path) -> None:
    peers = {"torch", "peft", "bitsandbytes", "accelerate"}
    found = peers & {name.split(".")[0] for name in imported(path)}
    assert not found, f"{path.relative_to(ROOT)} imports {', '.join(sorted(found))}, which only tests may"
