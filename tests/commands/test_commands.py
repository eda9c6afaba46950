"""The console command and the programs of scripts/ run the same commands, which do not mention absent devices."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qlora_jax.commands import COMMANDS, main
from qlora_jax.platforms import device_is_attached

ROOT = Path(__file__).parents[2]
DEVICE_VARIABLES = (
    "JAX_PLATFORMS",
    "TPU_SKIP_MDS_QUERY",
    "TPU_ACCELERATOR_TYPE",
    "TPU_WORKER_HOSTNAMES",
    "ALLOW_MULTIPLE_LIBTPU_LOAD",
    "TF_CPP_MIN_LOG_LEVEL",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS",
)


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        shown = capsys.readouterr().out
        assert all(f"  {name} " in shown and text in shown for name, text in COMMANDS.items())


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"error: unknown command 'tune': expected one of {', '.join(COMMANDS)}\n"


def test_every_command_is_a_module_and_a_script() -> None:
    modules = {path.stem for path in (ROOT / "qlora_jax" / "commands").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(COMMANDS) == {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"verify_device"}
    for name in COMMANDS:
        assert f'run_script("{name}")' in (ROOT / "scripts" / f"{name}.py").read_text("utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_dispatched_under_its_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([name, "--help"])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    shown = capsys.readouterr().out
    assert f"qlora-jax {name}" in shown
    assert "--config FILE.toml" in shown


def test_the_console_command_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module, _, function = scripts["qlora-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is main


@pytest.mark.integration
@pytest.mark.skipif(device_is_attached(), reason="a GPU or a TPU is attached")
def test_nothing_is_printed_about_absent_devices(tiny_llama: Path) -> None:
    """With the compilers of GPUs and TPUs installed, JAX would print a traceback, and libtpu would ask a metadata server."""
    silent("scripts/generate.py", "--model", str(tiny_llama), "--prompt", "hi", "--max-new-tokens", "1")


def silent(*arguments: str) -> str:
    """Return the output of a Python process that is started as a user starts it, and prints nothing on stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in DEVICE_VARIABLES}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Each script of the command line, with --help. In one process: each begins with the same import, which makes devices silent.
_HELP = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, path
"""


@pytest.mark.integration
@pytest.mark.skipif(device_is_attached(), reason="a GPU or a TPU is attached")
def test_help_is_silent_about_absent_devices() -> None:
    """About 8 CPU seconds: the process imports JAX, and what each command does."""
    shown = silent("-c", _HELP, *(f"scripts/{name}.py" for name in COMMANDS))
    assert shown.count("--config FILE.toml") == len(COMMANDS)


@pytest.mark.integration
@pytest.mark.skipif(device_is_attached(), reason="a GPU or a TPU is attached")
def test_a_program_and_a_plan_are_silent_about_absent_devices() -> None:
    """The package as a library, and libtpu as a compiler, if it is installed; about 5 CPU seconds each."""
    program = "import qlora_jax, jax, transformers; qlora_jax.from_pretrained; print(jax.devices()[0].platform)"
    assert silent("-c", program) == "cpu\n"
    pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed")
    machine = "from qlora_jax.plan import machine_mesh, machine_named; print(machine_mesh(machine_named('v5e')).size)"
    assert silent("-c", machine) == "1\n"
