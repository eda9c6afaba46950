"""Folders that appear whole: what is there after errors, after kills at every operation, and beside other writers."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.checkpoint.whole_folder import temporary_folder, whole_folder, writing_errors
from qlora_jax.errors import CheckpointError


def write(folder: Path, text: str = "new", names: tuple[str, ...] = ("a", "b", "marker")) -> None:
    with whole_folder(folder, marker="marker", own=("old",)) as new:
        for name in names:
            (new / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


WHOLE = {"a": "new", "b": "new", "marker": "new"}


def test_a_new_folder(tmp_path: Path) -> None:
    """It has the permissions of any folder, and nothing else is left beside it."""
    write(tmp_path / "more" / "x")
    assert contents(tmp_path / "more" / "x") == WHOLE
    assert os.listdir(tmp_path / "more") == ["x"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "more" / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kept", [(), ("notes.txt",)])
def test_an_older_folder_is_replaced(tmp_path: Path, kept: tuple[str, ...]) -> None:
    """Files of other origin stay, those that belonged to the old one do not."""
    folder = tmp_path / "x"
    write(folder, "before", ("a", "old", "marker", *kept))
    write(folder)
    assert contents(folder) == WHOLE | dict.fromkeys(kept, "before")
    assert os.listdir(tmp_path) == ["x"]


def test_an_empty_folder_and_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == WHOLE


@pytest.mark.parametrize("kept", [(), ("notes.txt",)])
def test_an_error_leaves_what_was_there(tmp_path: Path, kept: tuple[str, ...]) -> None:
    write(tmp_path / "x", "before", ("a", "marker", *kept))
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "x", names=("a", "a/b"))
    assert set(contents(tmp_path / "x").values()) == {"before"}
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="x: not saved: expected a folder, found a file"),
        writing_errors(tmp_path / "x"),
    ):
        write(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), r"x: not saved: No space left on device \(it needs 1,234 bytes\)"),
        (Exception("No space left on device (os error 28)"), r"x: not saved: No space left"),  # as tokenizers raises it
        (CheckpointError("x: has no tokenizer"), "^x: has no tokenizer$"),
    ],
)
def test_errors_of_the_system_are_one_line(error: Exception, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected), writing_errors(Path("x"), 1234):
        raise error
    with pytest.raises(ZeroDivisionError), writing_errors(Path("x")):
        raise ZeroDivisionError


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    with temporary_folder(tmp_path, ".x.writing-") as first:
        (tmp_path / ".x.writing-killed").mkdir()
        (tmp_path / ".x.writing-file").write_text("mine")
        (tmp_path / ".y.writing-other").mkdir()
        with temporary_folder(tmp_path, ".x.writing-") as second:
            assert first.is_dir()
            assert first != second
            assert not (tmp_path / ".x.writing-killed").exists()
        assert first.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".x.writing-file", ".y.writing-other"]


# Kills itself at the operation on files whose number is given.
PROGRAM = """
import os, signal, sys
from qlora_jax.checkpoint.whole_folder import whole_folder
count, last = 0, int(sys.argv[2])
def operation(event, arguments):
    global count
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "os.listdir"):
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(operation)
with whole_folder(sys.argv[1], marker="marker", own=("old",)) as new:
    for name in ("a", "b", "marker"):
        (new / name).write_text("new")
"""


@pytest.mark.parametrize("before", ["nothing", "older", "with others"])
def test_a_kill_at_any_operation(tmp_path: Path, before: str) -> None:
    """What has the marker is whole, old or new; the next one that writes leaves nothing behind. (About 4 s of CPU.)"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for number in range(1, 60, 2 if before == "nothing" else 3):
        folder = tmp_path / str(number) / "x"
        names = {"nothing": (), "older": ("a", "old", "marker"), "with others": ("a", "marker", "notes.txt")}[before]
        if names:
            write(folder, "before", names)
        command = [sys.executable, "-c", PROGRAM, str(folder), str(number)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if (folder / "marker").exists():
            found = contents(folder)
            found.pop("notes.txt", None)
            assert found in (WHOLE, dict.fromkeys(set(names) - {"notes.txt"}, "before"))
        if done.returncode == 0:
            assert number > 10
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        write(folder)
        assert contents(folder) == WHOLE | ({"notes.txt": "before"} if before == "with others" else {})
        assert os.listdir(folder.parent) == ["x"]
    else:
        pytest.fail("more operations than expected")
