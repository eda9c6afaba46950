"""What README.md and docs/ name exists: flags, linked pages, names of the library (test_docs_blocks.py has the blocks)."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from pages import PAGES, QLORA_ARGUMENTS, ROOT, options_of, python_of

import qlora_jax as qj
from qlora_jax.commands.evaluate import EVALUATIONS

SCRIPTS = ROOT / "scripts"
PROGRAMS = [
    str(path.relative_to(SCRIPTS))
    for folder in (SCRIPTS, SCRIPTS / "benchmarks", SCRIPTS / "studies")
    for path in sorted(folder.glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "evaluate"
] + [f"evaluate.py {name}" for name in EVALUATIONS]


def test_flags_exist() -> None:
    known = set().union(*(flags(options_of(program)) for program in PROGRAMS)) | {"help", "config"}
    named = {page: flags_in(page) for page in PAGES}
    assert sum(map(len, named.values())) > 100
    unknown = {
        f"{page.name}: --{name}"
        for page, names in named.items()
        for name in names
        if name not in known and name.removeprefix("no-") not in known
    }
    assert unknown == set()


def flags_in(page: Path) -> set[str]:
    """Return the flags that a page names, without those of other programs and of options that the page itself declares."""
    commands_of_others = (
        r"python qlora\.py .*?```|trl sft .*?```|`python tests/[^`]*`|`--lora_modules[^`]*`|`tensorboard [^`]*`|"
        r"XLA_FLAGS=\S+|LIBTPU_INIT_ARGS=\"[^\"]*\""
    )
    text = re.sub(commands_of_others, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    declared = {name.replace("_", "-") for name in re.findall(r"Option\(\s*\"(\w+)\"", text)}
    return set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text)) - declared


def flags(options: type[Any]) -> set[str]:
    found = set()
    for field in dataclasses.fields(options):
        kind: Any = field.default_factory if field.default_factory is not dataclasses.MISSING else None
        found |= flags(kind) if dataclasses.is_dataclass(kind) else {field.name.replace("_", "-")}  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_pages_pictures_and_headings_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text(encoding="utf-8"))
    missing = [name for name, _ in links if name and not (page.parent / name).exists()]
    for name, heading in links:
        target = page.parent / name if name else page
        if heading and target.exists() and heading not in headings(target):
            missing.append(f"{name}#{heading}")
    assert not missing


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def test_every_page_is_linked_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)\)", index.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if page not in (index, ROOT / "README.md")} - linked == set()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_argument_of_qlora_has_a_row() -> None:
    text = (ROOT / "docs" / "qlora.md").read_text(encoding="utf-8")
    rows = {
        name for line in text.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert QLORA_ARGUMENTS - rows == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "library.md"], ids=lambda page: page.name)
def test_names_of_the_library_exist(page: Path) -> None:
    """Names after `qj.`, their keyword arguments, and names that the code imports from the package."""
    code = python_of(str(page.relative_to(ROOT)))
    assert code
    assert {name for name in re.findall(r"\bqj\.(\w+)", page.read_text(encoding="utf-8")) if not hasattr(qj, name)} == set()
    for node in (node for block in code for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_jax"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "qj":
            arguments = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(getattr(qj, node.func.attr)).bind(*node.args, **arguments)
