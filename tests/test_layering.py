"""The import direction, read from the sources, for every package and module of `qlora_jax` (CONTRIBUTING.md shows it)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "qlora_jax"
# Each may import those before it, `errors` and `cache_folder`.
LAYERS = ("quant", "nn", "peft", "models", "checkpoint", "adapters", "export")
_BELOW_MODELS = frozenset(LAYERS[: LAYERS.index("models")])
# What each part of the package may import of the others.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "cache_folder": frozenset(),
    "interrupts": frozenset(),
    "cluster": frozenset(),
    **{name: frozenset(LAYERS[:index]) for index, name in enumerate(LAYERS)},
    "checkpoint": _BELOW_MODELS | {"models", "interrupts"},
    "platforms": frozenset(),
    "renamed_options": frozenset(),
    "config_file": frozenset({"renamed_options"}),
    "cli": frozenset({"config_file", "interrupts", "renamed_options"}),
    "data": frozenset(),
    "train": _BELOW_MODELS | {"data", "interrupts"},
    "evaluate": _BELOW_MODELS | {"data"},
    "serve": _BELOW_MODELS | {"data"},
    "plan": _BELOW_MODELS | {"models", "train", "serve"},
    "finetune": frozenset(LAYERS)
    | {"cli", "cluster", "config_file", "interrupts", "renamed_options", "data", "train", "evaluate", "serve", "plan"},
    "api": frozenset(LAYERS) | {"data", "train", "serve"},
    "commands": frozenset(LAYERS)
    | {"cli", "cluster", "interrupts", "platforms", "data", "train", "evaluate", "serve", "plan", "finetune"},
    "__init__": frozenset(LAYERS) | {"api", "platforms", "data", "train", "evaluate", "serve", "finetune"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, *, running: bool = False) -> Iterator[str]:
    """Yield the full names of the modules that a file imports anywhere in it, relative imports resolved.

    Args:
        running: whether to leave out what only a type checker imports.
    """
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    types_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in set(ast.walk(tree)) - (types_only if running else set()):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_of(name: str) -> Path | None:
    """Return the file that a full name of the package stands for; None for a name within a file, or of another package."""
    path = ROOT.joinpath(*name.split("."))
    if path.is_dir():
        return path / "__init__.py"
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else None


def test_every_part_has_its_place() -> None:
    assert {part_of(path) for path in SOURCES} <= ALLOWED.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    inside = {name.split(".")[1] for name in imported(path) if name.startswith("qlora_jax.")}
    wrong = (inside & ALLOWED.keys()) - ALLOWED[part] - {part, "errors", "cache_folder"}
    assert not wrong, f"{path.relative_to(ROOT)} ({part}) must not import {', '.join(sorted(wrong))}"
    assert "scripts" not in {name.split(".")[0] for name in imported(path)}


def test_no_circle_of_imports() -> None:
    """No module imports itself through others, imports within functions included; a package's __init__ re-exports."""
    graph = {
        path: {
            module
            for name in imported(path, running=True)
            if (module := module_of(name)) is not None and module.name != "__init__.py"
        }
        for path in SOURCES
        if path.name != "__init__.py"
    }
    done: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(str(p.relative_to(PACKAGE)) for p in (*above[above.index(path) :], path))
        if path not in done:
            for module in sorted(graph[path]):
                visit(module, (*above, path))
            done.add(path)

    for path in graph:
        visit(path, ())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_is_never_imported(path: Path) -> None:
    peers = {"torch", "peft", "bitsandbytes", "accelerate"}
    found = peers & {name.split(".")[0] for name in imported(path)}
    assert not found, f"{path.relative_to(ROOT)} imports {', '.join(sorted(found))}, which only tests may"
