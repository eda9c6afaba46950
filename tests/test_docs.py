"""What README.md and docs/ say can be typed, can be typed: commands, flags, config files, names of the library."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import qlora_jax as qj
from qlora_jax.cli import parse
from qlora_jax.commands import COMMANDS as PROGRAM_NAMES
from qlora_jax.commands.evaluate import EVALUATIONS
from qlora_jax.config_file import from_toml
from qlora_jax.finetune import Options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = ROOT / "scripts"
PROGRAMS = [
    str(path.relative_to(SCRIPTS))
    for folder in (SCRIPTS, SCRIPTS / "benchmarks", SCRIPTS / "studies")
    for path in sorted(folder.glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "evaluate"
] + [f"evaluate.py {name}" for name in EVALUATIONS]
# The dataclasses of qlora.py, and what its scripts set beside them.
QLORA_ARGUMENTS = """
    model_name_or_path trust_remote_code use_auth_token eval_dataset_size max_train_samples max_eval_samples
    source_max_len target_max_len dataset dataset_format cache_dir train_on_source mmlu_split mmlu_dataset
    do_mmlu_eval max_mmlu_samples mmlu_source_max_len full_finetune adam8bit double_quant quant_type bits lora_r
    lora_alpha lora_dropout max_memory_MB report_to output_dir optim per_device_train_batch_size
    gradient_accumulation_steps max_steps weight_decay learning_rate remove_unused_columns max_grad_norm
    gradient_checkpointing do_train lr_scheduler_type warmup_ratio logging_steps group_by_length save_strategy
    save_steps save_total_limit max_new_tokens min_new_tokens do_sample num_beams num_beam_groups penalty_alpha
    use_cache temperature top_k top_p typical_p diversity_penalty repetition_penalty length_penalty
    no_repeat_ngram_size lora_modules adam_beta2 bf16 data_seed seed eval_steps evaluation_strategy logging_strategy
    do_eval per_device_eval_batch_size dataloader_num_workers
"""


@cache
def options_of(script: str) -> type[Any]:
    """Return the options of a program by its path below scripts/, and the name of its sub-command if it has any."""
    script, _, name = script.partition(" ")
    parts = ("evaluations", name) if name else Path(script).with_suffix("").parts
    module = importlib.import_module(
        ".".join(("qlora_jax.commands" if name or parts[0] in PROGRAM_NAMES else "scripts", *parts))
    )
    return next(getattr(module, name) for name in ("PlanCommandOptions", "Arguments", "Options") if hasattr(module, name))


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python scripts/[^`]*)`", page.read_text(encoding="utf-8"))
    found = [re.sub(r"^.*&& ", "", line) for line in (*lines, *inline)]
    return [line for line in found if line.startswith("python scripts/") and "…" not in line and "--help" not in line]


COMMANDS = [(page.name, command) for page in PAGES for command in commands(page)]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 12


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:60])
def test_commands_parse(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, script, *arguments = shlex.split(command, comments=True)
    monkeypatch.chdir(ROOT)
    if "run.toml" in arguments:  # the file that the pages show
        monkeypatch.chdir(tmp_path)
        Path("run.toml").touch()
    program = str(Path(script).relative_to("scripts"))
    if program == "evaluate.py":
        program += f" {arguments.pop(0) if arguments[0] in EVALUATIONS else 'mmlu'}"
    parse(options_of(program), description=None, arguments=arguments)


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
def test_config_files_are_valid(page: Path, tmp_path: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        (tmp_path / "run.toml").write_text(block, encoding="utf-8")
        from_toml(Options, tmp_path / "run.toml")


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
    assert set(QLORA_ARGUMENTS.split()) - rows == set()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "library.md"], ids=lambda page: page.name)
def test_names_of_the_library_exist(page: Path) -> None:
    """Names after `qj.`, their keyword arguments, and names that the code imports from the package."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    assert {name for name in re.findall(r"\bqj\.(\w+)", page.read_text(encoding="utf-8")) if not hasattr(qj, name)} == set()
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qlora_jax"):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "qj":
            arguments = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
            inspect.signature(getattr(qj, node.func.attr)).bind(*node.args, **arguments)
