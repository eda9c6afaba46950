"""The folder that is kept between runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.cache_folder import cache_folder

# A user that the system does not list: `docker run --user 12345`. The process may not become another user, so it forgets.
WITHOUT_HOME = """
import pwd
def getpwuid(number):
    raise KeyError(number)
pwd.getpwuid = getpwuid
"""


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("QLORA_JAX_CACHE")
    assert cache_folder() == Path("/two/qlora_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "qlora_jax"


def test_a_user_without_a_home_folder_gets_one_line() -> None:
    code = """
from pathlib import Path
from qlora_jax.cache_folder import cache_folder
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.hub import resolve
from qlora_jax.data.records import load_records
from qlora_jax.errors import QLoRAError
try:
    Path.home()
except RuntimeError:
    print("no home")
for call in (cache_folder, fetch_default_model, lambda: resolve("~/model"), lambda: load_records("~/data.jsonl")):
    try:
        call()
    except (QLoRAError, OSError) as error:
        print(error)
"""
    needed = {name: value for name, value in os.environ.items() if name in ("PATH", "PYTHONPATH", "JAX_PLATFORMS")}
    environment = {**needed, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), needed.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", WITHOUT_HOME + code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = "cache folder: expected QLORA_JAX_CACHE to name a folder, because this user has no home folder"
    lines = run.stdout.splitlines()
    assert lines[:3] == [
        "no home",
        f"{expected} (HOME is not set)",
        f"default model: {expected} (HOME is not set); or name another model",
    ]
    assert lines[3].startswith("~/model: no such file or folder")
    assert "~/data.jsonl" in lines[4]
    assert len(lines) == 5
