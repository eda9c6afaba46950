"""Every block of code in README.md and docs/ runs or is checked by what it is; the few others are named here with a reason.

    Python                 a test of the page runs it (RUN)
    python scripts/…       parsed by the program's own options, with config files that exist
    other command lines    pip's extras exist, qlora.py's flags are in the table of its arguments; SHELL has the rest
    TOML                   read as a config or as a file of tenants
    JSON                   read by what reads such a line
    the tree               each name exists

`score`, `elo`, `agreement` and `report` need no model: they run, on small files. About 5 CPU-seconds.
"""

import json
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from judged import score, tournament, write
from pages import PAGES, QLORA_ARGUMENTS, ROOT, Block, blocks, options_of, program_of

from qlora_jax.cli import parse
from qlora_jax.commands.evaluate import main as evaluate
from qlora_jax.config_file import from_toml
from qlora_jax.evaluate import read_judgements
from qlora_jax.evaluate.judge import read_answers
from qlora_jax.finetune import Options
from qlora_jax.finetune.tenants.options import read_tenants

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# The blocks of Python on each page, and the test that runs them.
RUN = {
    "README.md": (1, "test_library_page.py"),
    "docs/extending.md": (4, "test_extending_page.py"),
    "docs/library.md": (7, "test_library_page.py"),
    "docs/methods.md": (1, "peft/test_methods_page.py"),
    "docs/serving.md": (1, "test_library_page.py"),
    "docs/tenants.md": (1, "test_library_page.py"),
    "docs/tutorial.md": (1, "test_tutorial.py"),
}
# Blocks that nothing runs, by their page and the start of their first line.
NOT_RUN = {
    (
        "docs/checkpoints.md",
        "runs/mine/checkpoints/40/state/",
    ): "files that test_state_store.py damages",
    ("docs/data.md", "chats.jsonl: 1,180 of 1,200"): "what a run prints about its data",
    ("docs/extending.md", '    "seed_oss": Family('): "a line of FAMILIES, which test_extending_page.py adds",
    ("docs/extending.md", '    "seed_oss": ("seed_oss"'): "a line of the table of peers of a test",
    ("docs/extending.md", "    QUERY_REPLY.name"): "lines of SCHEMAS, which test_extending_page.py adds",
    ("docs/extending.md", "    FOCAL,"): "a line of OBJECTIVES, whose value test_extending_page.py uses",
    ("docs/training.md", "Goodput 91.3%"): "what a run prints at its end",
    ("docs/migration.md", "trl sft "): "TRL's command, whose counterpart is the next block",
    ("docs/migration.md", "base_model: "): "Axolotl's config, whose counterpart is the next block",
    ("docs/migration.md", "model, tokenizer = FastLanguageModel"): "Unsloth's code, whose counterpart is the next block",
}
SHELL = {
    "python -m venv .venv": ".ci/run makes such environments",
    "source .venv/bin/activate": "the shell's own",
    "python -m pytest": ".ci/run runs it",
}


def exempt(block: Block) -> tuple[str, str] | None:
    return next((key for key in NOT_RUN if key[0] == block.page and block.text.startswith(key[1])), None)


def test_every_exception_is_of_a_block() -> None:
    found = [exempt(block) for name in NAMES for block in blocks(name)]
    assert sorted(key for key in found if key is not None) == sorted(NOT_RUN)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_runs_or_is_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = [block for block in blocks(name) if exempt(block) is None]
    for block in checked:
        if block.language != "python":
            check_of(block)(block, tmp_path)
    count, test = RUN.get(name, (0, ""))
    assert sum(block.language == "python" for block in checked) == count, "blocks of Python that RUN does not have"
    assert not test or Path(name).name in (ROOT / "tests" / test).read_text(encoding="utf-8")


def check_of(block: Block) -> Callable[[Block, Path], None]:
    """Return what checks a block that is not Python; all that is not recognised is taken for command lines."""
    if block.language == "json":
        return check_json
    if block.language == "toml" or re.match(r"(\w+ = .*\n|\[\w+\]\n)", block.text):
        return check_toml
    if block.first_line == "qlora_jax/":
        return check_tree
    assert block.language == "", f"{block.page}: no check of {block.language}"
    return check_commands


def check_json(block: Block, folder: Path) -> None:
    for line in block.text.splitlines():
        (folder / "line.jsonl").write_text(line + "\n", encoding="utf-8")
        if "answer" in json.loads(line):
            assert read_answers([folder / "line.jsonl"])
        else:
            assert len(read_judgements(folder / "line.jsonl").question) == 1


def check_toml(block: Block, folder: Path) -> None:
    path = folder / "options.toml"
    path.write_text(block.text, encoding="utf-8")
    if "tenants" in tomllib.loads(block.text):
        assert set(read_tenants(path).tenants) == {"alice", "bob"}
    else:
        from_toml(Options, path)


def check_tree(block: Block, folder: Path) -> None:
    assert folder.is_dir()
    root = Path()
    for line in block.text.splitlines():
        indent, name = re.fullmatch(r"( *)(\S+).*", line).groups()  # type: ignore[union-attr]
        root = root if indent else ROOT / name
        assert (root / name if indent else root).exists(), line


def check_commands(block: Block, folder: Path) -> None:
    for command in block.commands():
        check_command(command, folder)


def check_command(command: str, folder: Path) -> None:
    """Check one command line.

    Raises:
        AssertionError: it is not known, or names an extra, a flag, a file or an address that does not exist.
    """
    arguments = shlex.split(command, comments=True)
    if command.startswith("python scripts/"):
        arguments = arguments[: arguments.index(">>")] if ">>" in arguments else arguments
        assert (ROOT / arguments[1]).is_file()
        if arguments[2:] == ["--help"]:
            return
        if "run.toml" in arguments:  # the file that the page shows, which `check_toml` reads
            (folder / "run.toml").touch()
            arguments = [str(folder / "run.toml") if one == "run.toml" else one for one in arguments]
        program, rest = program_of(arguments)
        parse(options_of(program), description=None, arguments=rest)
    elif command.startswith("python qlora.py "):
        assert {one.removeprefix("--") for one in arguments if one.startswith("--")} <= QLORA_ARGUMENTS
    elif command.startswith("pip install -e "):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[-1]).group(1)  # type: ignore[union-attr]
        assert set(extras.split(",") if extras else ()) <= set(project["optional-dependencies"])
    elif arguments[0] == "curl":  # test_tutorial.py sends it to a server
        assert arguments[1].startswith("http://127.0.0.1:8000/v1/")
        assert json.loads(arguments[arguments.index("-d") + 1])
    else:
        assert shlex.join(arguments) in SHELL, f"{command}: no check of such a command"


INLINE = [
    (name, command)
    for name in NAMES
    for command in re.findall(r"`(python scripts/[^`]*)`", (ROOT / name).read_text(encoding="utf-8"))
    if "…" not in command
]


@pytest.mark.parametrize(("name", "command"), INLINE, ids=lambda value: value[:60])
def test_commands_in_sentences(name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(command, tmp_path)


def test_what_the_checks_find(tmp_path: Path) -> None:
    for wrong in ("python scripts/none.py", "rm -rf x", 'pip install -e ".[none]"', "python qlora.py --lora_rr 3"):
        with pytest.raises(AssertionError):
            check_command(wrong, tmp_path)
    with pytest.raises(SystemExit):
        check_command("python scripts/merge.py --none 3", tmp_path)
    with pytest.raises(ValueError, match="expected one of"):
        check_command("python scripts/plan.py --step none", tmp_path)


def test_commands_on_judgements_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command of docs/evaluation.md that needs no model, on files of the names that it gives."""
    monkeypatch.chdir(tmp_path)
    rated = ["7b-guanaco", "13b-guanaco", "30b-guanaco", "vicuna-13b", "bard", "gpt-4"]
    pairs = [(question, name) for question in range(3) for name in rated]
    rows = [row for question, name in pairs for row in both_orders(question, name)]
    write(Path("scores.jsonl"), rows)
    for name in ("verdicts.jsonl", "other.jsonl"):
        write(Path(name), tournament(len(name), 2, ["gpt-3.5", *rated]))
    for name in ("base", "adapter"):
        write(Path(f"{name}.jsonl"), [{"question_id": 0, "model": name, "prompt": "Why?", "answer": name}])
    Path("mmlu.txt").write_text('{"mmlu": {"accuracy": 0.5, "questions": 4}}\n', encoding="utf-8")
    lines = [command for block in blocks("docs/evaluation.md") if not block.language for command in block.commands()]
    found = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python scripts/evaluate.py")]
    run = {tuple(one) for one in found if one[0] in ("score", "elo", "agreement", "report")}
    assert len(run) >= 7
    for arguments in sorted(run):
        few = {"elo": ["--orders", "50", "--resamples", "20"], "report": ["--orders", "50"]}
        assert evaluate([*arguments, *few.get(arguments[0], [])]) == 0, arguments
    assert Path("elo.png").exists()
    assert Path("report.html").exists()


def both_orders(question: int, name: str) -> list[dict[str, object]]:
    return [score(question, "gpt-3.5", name, 8, 7), score(question, name, "gpt-3.5", 6, 8)]
