"""Whether the fused product is right on the attached GPU: small products, tried in a process of its own, once per machine.

The kernel was written and tested without a GPU: in interpret mode, and through NVIDIA's compiler. Before a program uses it,
a new process (`run`) multiplies with it on the device and compares with NumPy in float64, for each number of rows of a tile,
both directions, and every data type. A kernel that crashed or waited for ever would end that process and not the run, which
then lets XLA multiply and warns.

A result is kept, unless the process ended with an error in Python, in `cache_folder` as `fused-<key>.json`. The key is a
hash of the device's kind, the versions of JAX and the CUDA plugin, and the kernel's source, so that a change of any of them
is tried again.

The process that waits has already reserved most of the device's memory, by default three quarters. The trial takes what it
needs of the rest: a CUDA context and a few megabytes. A GPU in exclusive-process mode takes one process only: there the
trial ends with JAX's error, and XLA multiplies, unless `QLORA_JAX_FUSED=1` uses the kernel without a trial.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.cache_folder import cache_folder
from qlora_jax.quant.codebooks import DATA_TYPES, DataType, codebook
from qlora_jax.quant.kernels import hopper, hopper_lookup, lookup_ptx
from qlora_jax.quant.tensor import QuantizedTensor

LARGEST_ERROR = 4e-3  # relative, of a product in bfloat16
_SECONDS = 300  # the compilation of seven small kernels is most of a trial: an estimated minute, never measured on a GPU
_CODE = "from qlora_jax.quant.kernels import trial; trial.run()"  # python -m would warn of a module that is imported already


@functools.cache
def is_right(device_kind: str) -> bool:
    """Return whether the fused product is right on the attached GPU, by the kept result or a trial; warn if it is not."""
    path = cache_folder() / f"fused-{_key(device_kind)}.json"
    reason = _kept(path)
    if reason is None:
        print(
            f"Trying the fused product with 4-bit matrices on this {device_kind}, for at most {_SECONDS} s. "
            f"The result is kept in {path}",
            file=sys.stderr,
            flush=True,
        )
        reason, final = attempt([sys.executable, "-c", _CODE])
        try:
            if final:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"device": device_kind, "reason": reason}))
        except OSError:  # then the next process tries again
            pass
    if reason:
        warnings.warn(
            f"the fused product with 4-bit matrices is not used on this GPU, XLA multiplies: {reason} "
            f"(QLORA_JAX_FUSED=0 does without it and without this trial; remove {path} to try again; "
            f"python -c '{_CODE}' shows the whole error)",
            stacklevel=2,
        )
    return not reason


def attempt(command: Sequence[str], seconds: float = _SECONDS) -> tuple[str, bool]:
    """Run a trial as a process and return why it failed, or "" if it did not, and whether that is the kernel's doing.

    An error in Python may have other reasons than the kernel, such as a device without free memory.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda",  # else JAX may go on with the CPU where it cannot use the GPU
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_TRACEBACK_FILTERING": "off",
    }
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"the trial did not end within {seconds:g} s", True
    except OSError as error:
        return f"the trial could not be started: {error}", False
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the trial ended with code {run.returncode}: {last}", run.returncode < 0
    try:
        error = float(run.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return f"the trial printed {run.stdout[-80:]!r}: expected its error", False
    return "" if error <= LARGEST_ERROR else f"its relative error is {error:.1e}, more than {LARGEST_ERROR:.1e}", True


def run() -> None:
    """Print the largest error, as the process of a trial; a kernel that waits for ever ends it without a parent too."""
    signal.alarm(_SECONDS + 10)
    print(largest_error())


def largest_error() -> float:
    """Return the largest relative error of the products of a trial, computed on the default device."""
    errors = [error_of("nf4", rows, transposed) for rows in hopper.TILES_OF_ROWS for transposed in (False, True)]
    errors += [error_of(cast(DataType, name), hopper.TILES_OF_ROWS[0], False) for name in DATA_TYPES if name != "nf4"]
    return float(np.max(errors))  # NaN if one of them is, which Python's max may not return


def error_of(data_type: DataType, rows: int, transposed: bool) -> float:
    """Return the relative error of a product with the second matrix of a stack, with two tiles of rows, one not full."""
    random = np.random.default_rng(0)
    inputs, outputs = 1152, 896  # 9 and 7 steps, so that each place of a tile in shared memory is used several times
    codes = random.integers(0, 256, (2, inputs // 2, outputs), np.uint8)
    scales = random.uniform(0.5, 1.5, (2, inputs // 64, outputs)).astype(np.float32)
    values = codebook(data_type).astype(np.float64)[np.concatenate([codes[1] >> 4, codes[1] & 15])]
    values *= np.repeat(scales[1].astype(np.float64), 64, axis=0)
    x = random.standard_normal((2 * rows - 3, outputs if transposed else inputs)).astype(jnp.bfloat16)
    expected = x.astype(np.float64) @ (values.T if transposed else values)
    w = QuantizedTensor(jnp.asarray(codes), jnp.asarray(scales), None, None, data_type, 64, jnp.dtype(jnp.bfloat16), None)
    kernel = hopper.matmul_transposed if transposed else hopper.matmul
    found = np.asarray(jax.jit(functools.partial(kernel, rows=rows))(x, w, np.int32(1)), np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _kept(path: Path) -> str | None:
    """Return the reason that is kept in a file, "" for a trial that was right, or None without a readable file."""
    try:
        reason = json.loads(path.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reason if isinstance(reason, str) else None


def _key(device_kind: str) -> str:
    plugins = [name for name in ("jax-cuda13-plugin", "jax-cuda12-plugin") if _version(name)]
    parts = [device_kind, *(f"{name} {_version(name)}" for name in ("jax", "jaxlib", *plugins))]
    modules = (hopper, hopper_lookup, lookup_ptx)
    sources = [Path(module.__file__ or "").read_text() for module in modules]
    return hashlib.sha256("\n".join([*parts, *sources]).encode()).hexdigest()[:16]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
