"""Folders that are complete before they have their names.

    parent/.NAME.writing-XXXXXXXX/    made by mkdtemp, and locked (`flock`) by the process that writes: no other removes it
        NAME/                         all files are written here, and flushed to the disk
    parent/NAME                       appears by one rename

A process that is killed leaves the temporary folder. The system releases its lock, and the next one that writes the same
folder removes it.

A folder that exists is replaced by two renames: the old one into the temporary folder, the new one into its place. In
between there is none. If the old one holds files of other origin, these stay; the others are then replaced one by one, and
the file that makes the folder what it is (the marker, e.g. adapter_config.json) is removed first and comes last.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_jax.errors import CheckpointError, OptionError
from qlora_jax.interrupts import cleaning_up

__all__ = [
    "TOKENIZER_FILES",
    "check_local",
    "remove_abandoned",
    "remove_remains",
    "temporary_folder",
    "whole_folder",
    "writing_errors",
]

# What `save_tokenizer` may write, now and in earlier versions of transformers.
TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
        *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    }
)
ABANDONED_SECONDS = 24 * 3600  # where the file system has no locks
_ATTEMPTS = 100


@contextmanager
def whole_folder(folder: str | Path, *, marker: str, own: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write in, which becomes `folder` if the block ends without an error.

    Args:
        folder: the folder to make or to replace.
        marker: the file that makes the folder what it is.
        own: names of files that belong to what is replaced; other files in an existing folder stay.

    Raises:
        OptionError: the folder is an address of an object store.
        OSError: the folder cannot be written; whatever was there before is still there.
    """
    check_local("folder", folder)
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder, found a file", str(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(target.parent, f".{target.name}.writing-") as temporary:
        new = temporary / target.name
        new.mkdir()  # with the permissions of any folder; those of `temporary` are for its owner alone
        yield new
        for path in (*new.rglob("*"), new):
            _flush(path)
        _put_in_place(new, target, temporary / "before", marker, own)
        _flush(target.parent)


def check_local(option: str, folder: str | Path) -> None:
    """Raise OptionError if a folder to write is an address such as gs://bucket/run, which `Path` makes gs:/bucket/run."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(folder)):
        raise OptionError(
            f"{option} {folder}: expected a folder of this machine, found an address; mount the bucket (for example with "
            "gcsfuse or mount-s3) and name the folder, or write to a local folder and copy it"
        )


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder of a unique name in `parent`, and remove it afterwards.

    Folders with the same prefix that killed processes left are removed first.
    """
    remove_abandoned(parent, prefix)
    for _ in range(_ATTEMPTS):
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        if (handle := _lock(path)) is not None:
            break
    else:
        raise OSError(errno.EAGAIN, "temporary folders are removed by another process", str(parent))
    try:
        with cleaning_up():
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


@contextmanager
def writing_errors(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the system into one CheckpointError that names the folder, and the bytes that are needed where known.

    The libraries in Rust that write tokenizers and tensors raise a plain Exception with "(os error 28)" in its text.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        size = "" if needed is None else f" (it needs {needed:,} bytes)"
        raise CheckpointError(f"{folder}: not saved: {reason}{size}.") from error


def _put_in_place(new: Path, target: Path, before: Path, marker: str, own: Collection[str]) -> None:
    found = set(os.listdir(target)) if target.exists() else set()
    if not found:
        os.rename(new, target)
        return
    if found <= {*own, *os.listdir(new)}:
        try:
            os.rename(target, before)
        except OSError:  # a mount point, say
            pass
        else:
            try:
                os.rename(new, target)
            except OSError:
                os.rename(before, target)
                raise
            return
    (target / marker).unlink(missing_ok=True)
    for name in found & {*own, *os.listdir(new)}:
        path = target / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for name in sorted(os.listdir(new), key=lambda name: name == marker):
        os.rename(new / name, target / name)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the folders with this prefix whose process has ended."""
    for entry in list(os.scandir(parent)):
        if not entry.name.startswith(prefix) or not entry.is_dir(follow_symlinks=False):
            continue
        try:
            handle = os.open(entry.path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ended = True
        except BlockingIOError:
            ended = False
        except OSError:  # no locks on this file system
            ended = time.time() - entry.stat().st_mtime > ABANDONED_SECONDS
        if ended:
            shutil.rmtree(entry.path, ignore_errors=True)
        os.close(handle)


def remove_remains(folder: str | Path) -> None:
    """Remove what a process left that was killed when `folder` was whole already."""
    target = Path(os.path.realpath(folder))
    remove_abandoned(target.parent, f".{target.name}.writing-")


def _lock(folder: Path) -> int | None:
    """Return a file descriptor that locks the folder; None if another process has removed or is about to remove it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # no locks on this file system: others remove the folder only when it is old
        return handle
    if os.path.exists(folder) and os.path.samestat(os.stat(folder), os.fstat(handle)):
        return handle
    os.close(handle)
    return None


def _flush(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk: a power failure must not leave empty files under final names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot
            raise
    finally:
        os.close(handle)
