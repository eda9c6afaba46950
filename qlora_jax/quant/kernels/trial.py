"""Whether the fused product is right on the attached GPU: small products, tried in a process of its own, once per machine.

The kernel was written and tested without a GPU: in interpret mode, and through NVIDIA's compiler. Before a program uses it,
a new process (`run`) multiplies with it on the device and compares with NumPy in float64, for each number of rows of a tile,
both directions, and every data type. A kernel that crashed or waited for ever would end that process and not the run, which
then lets XLA multiply and warns.

The process prints a `Verdict`. A wrong result, an error of CUDA, a crash and a trial that does not end are final, and kept
in `cache_folder` as `fused-<key>.json`; any other error is tried again by the next process. The key is a hash of the
device's kind, the versions of JAX and the CUDA plugin, and the kernel's source, so that a change of any of them is tried
again.

The process that waits has already reserved most of the device's memory, by default three quarters. The trial takes what it
needs of the rest: a CUDA context and a few megabytes. A GPU in exclusive-process mode takes one process only: there the
trial ends with JAX's error, and XLA multiplies, unless `QLORA_JAX_FUSED=1` uses the kernel without a trial.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
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
_ONE_AT_A_TIME = threading.Lock()  # two threads may compile at once, and functools.cache does not let one wait for the other


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of a trial.

    Attributes:
        reason: why the kernel is not used, "" if it is right.
        final: whether that is the kernel's doing. It is then kept; another error, such as a device without free memory, is
            tried again by the next process.
    """

    reason: str
    final: bool


def is_right(device_kind: str) -> bool:
    """Return whether the fused product is right on the attached GPU, by the kept result or a trial; warn if it is not.

    A process has one verdict for a kind of device, whichever of its threads asks first and whatever ended the trial.
    """
    with _ONE_AT_A_TIME:
        return _is_right(device_kind)


@functools.cache
def _is_right(device_kind: str) -> bool:
    try:
        path = cache_folder() / f"fused-{_key(device_kind)}.json"
    except FileNotFoundError:  # a user without a home folder: each process tries again
        path = None
    verdict = None if path is None else _kept(path)
    if verdict is None:
        print(
            f"Trying the fused product with 4-bit matrices on this {device_kind}, for at most {_SECONDS} s. "
            + (
                "QLORA_JAX_CACHE would name a folder to keep the result in"
                if path is None
                else f"The result is kept in {path}"
            ),
            file=sys.stderr,
            flush=True,
        )
        verdict = attempt([sys.executable, "-c", _CODE])
        try:
            if verdict.final and path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"device": device_kind, "reason": verdict.reason}))
        except OSError:  # then the next process tries again
            pass
    if verdict.reason:
        again = "" if path is None else f"remove {path} to try again; "
        warnings.warn(
            f"the fused product with 4-bit matrices is not used on this GPU, XLA multiplies: {verdict.reason} "
            f"(QLORA_JAX_FUSED=0 does without it and without this trial; {again}"
            f"python -c '{_CODE}' shows the whole error)",
            stacklevel=2,
        )
    return not verdict.reason


def attempt(command: Sequence[str], seconds: float = _SECONDS) -> Verdict:
    """Run a trial as a process and return its verdict, or that of how it ended if it printed none."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda",  # else JAX may go on with the CPU where it cannot use the GPU
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_TRACEBACK_FILTERING": "off",
    }
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Verdict(f"the trial did not end within {seconds:g} s", True)
    except OSError as error:
        return Verdict(f"the trial could not be started: {error}", False)
    try:
        printed = Verdict(**json.loads(run.stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        printed = None
    if run.returncode and (printed is None or not printed.reason):  # after an error of CUDA the end may be another one
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        return Verdict(f"the trial ended with code {run.returncode}: {last}", run.returncode < 0)
    return printed or Verdict(f"the trial printed {run.stdout[-80:]!r}: expected its verdict", False)


def run() -> None:
    """Print the verdict, as the process of a trial; a kernel that waits for ever ends it without a parent too."""
    signal.alarm(_SECONDS + 10)
    jax.block_until_ready(jnp.ones(8) + 1)  # a device that does not even add is not the kernel's doing
    print(json.dumps(dataclasses.asdict(verdict())), flush=True)


def verdict() -> Verdict:
    """Return the verdict of the products of a trial, computed on the default device.

    An error of CUDA, such as an address that the kernel may not read, is the kernel's doing; want of memory is not.

    Raises:
        Exception: any error that is neither of CUDA nor of the results.
    """
    try:
        error = largest_error()
    except jax.errors.JaxRuntimeError as failure:
        message = str(failure)
        if "CUDA" not in message or any(want in message for want in ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")):
            raise
        traceback.print_exc()
        return Verdict(f"it ends with an error of CUDA: {message.strip().splitlines()[0]}", True)
    if error <= LARGEST_ERROR:
        return Verdict("", True)
    return Verdict(f"its relative error is {error:.1e}, more than {LARGEST_ERROR:.1e}", True)


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


def _kept(path: Path) -> Verdict | None:
    """Return the verdict that is kept in a file, or None without a readable file."""
    try:
        reason = json.loads(path.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Verdict(reason, True) if isinstance(reason, str) else None


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
