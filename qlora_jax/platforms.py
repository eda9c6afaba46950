"""Environment variables that decide which devices JAX looks for. They must be set before JAX creates a backend.

With the extra `plan` the plugins of GPUs and TPUs are installed as compilers, on machines that may have neither. JAX then
searches for a device in vain: its CUDA plugin prints a traceback about a missing driver, and libtpu asks a metadata server
that does not answer. `silence_absent_devices` avoids both. Where a device is attached, nothing is changed, and JAX chooses
as it always does. Variables that the user has set are never overwritten.
"""

import os
import sys
from pathlib import Path

__all__ = ["device_is_attached", "silence_absent_devices", "use_compilers_only"]

_DEVICE_FILES = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")  # in /dev: GPUs of NVIDIA; TPUs by either driver


def device_is_attached() -> bool:
    """Return whether this machine may have a GPU or a TPU, by the device files of their drivers.

    Windows Subsystem for Linux has another file for its GPU, /dev/dxg; systems other than Linux have no such files, so that
    nothing is known about them and the answer is True.
    """
    if sys.platform != "linux":
        return True
    devices = Path("/dev")
    return (devices / "dxg").exists() or any(any(devices.glob(pattern)) for pattern in _DEVICE_FILES)


def silence_absent_devices() -> None:
    """Restrict JAX to the CPU where neither a GPU nor a TPU is attached."""
    if not device_is_attached():
        use_compilers_only()


def use_compilers_only() -> None:
    """Restrict JAX to the CPU and leave attached devices free; programs can still be compiled for GPUs and TPUs."""
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # it read the variable when it was imported
            import jax

            jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would ask a metadata server which machine this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # as a compiler, several processes can use it at once
