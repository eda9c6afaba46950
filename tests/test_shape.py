"""The size of files and functions, read from the sources: a function that needs more is a dataclass without a name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "qlora_jax").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 350, 80, 8


def public_names() -> frozenset[str]:
    """Return the names that `qlora_jax` and its packages export: what users call, with more options that have defaults."""
    names: set[str] = set()
    for path in (ROOT / "qlora_jax").rglob("__init__.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
                names |= set(ast.literal_eval(node.value))
    return frozenset(names)


PUBLIC = public_names()


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef, *, public: bool) -> int:
    """Count the parameters but `self` and `cls`; of a public call, those without a default."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    count = len(positional) + len(arguments.kwonlyargs)
    count -= bool(positional) and positional[0].arg in ("self", "cls")
    with_default = len(arguments.defaults) + sum(default is not None for default in arguments.kw_defaults)
    return count - with_default if public else count


def functions(tree: ast.AST, owner: str = "") -> "list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]":
    """Return every function with the name by which users reach it: its own, or that of its class for a constructor."""
    found: list[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.append((owner or node.name, node))
            found += functions(node)
        else:
            found += functions(node, node.name if isinstance(node, ast.ClassDef) else owner)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MOST_LINES_OF_A_FILE
    for reached_by, function in functions(ast.parse(text)):
        where = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
        lines = (function.end_lineno or function.lineno) - function.lineno + 1
        assert lines <= MOST_LINES_OF_A_FUNCTION, f"{where}: {lines} lines"
        if "kernels" not in path.parts:
            count = parameters(function, public=reached_by in PUBLIC and not function.name.startswith("__call"))
            assert count <= MOST_PARAMETERS, f"{where}: {count} parameters"
