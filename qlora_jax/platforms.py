"""Environment variables that libraries read when they are imported or when JAX creates a backend.

With the extra `plan` the plugins of GPUs and TPUs are installed as compilers, on machines that may have neither. JAX then
searches for a device in vain: its CUDA plugin prints a traceback about a missing driver, and libtpu asks a metadata server
that does not answer, and logs five lines about it. `quiet_start` avoids both, and transformers' advice to install PyTorch,
which nothing here needs. Importing `qlora_jax` calls it, so that commands, scripts, tests and programs that use the package
as a library start alike.

Where a device is attached, nothing is changed, and JAX chooses as it always does. Variables that the user has set are never
overwritten.
"""

import importlib.util
import os
import sys
from pathlib import Path

__all__ = ["device_is_attached", "quiet_start", "use_compilers_only"]

# In /dev: GPUs of NVIDIA and of AMD; TPUs by either driver.
_DEVICE_FILES = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*")

# libtpu asks a metadata server which machine this is, and logs that it cannot find out. As a compiler it does not need to
# know, so that any answer will do, and several processes can use it at once.
_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def device_is_attached() -> bool:
    """Return whether this machine may have a GPU or a TPU, by the device files of their drivers.

    Windows Subsystem for Linux has another file for its GPU, /dev/dxg; systems other than Linux have no such files, so that
    nothing is known about them and the answer is True.
    """
    if sys.platform != "linux":
        return True
    devices = Path("/dev")
    return (devices / "dxg").exists() or any(any(devices.glob(pattern)) for pattern in _DEVICE_FILES)


def quiet_start() -> None:
    """Restrict JAX to the CPU where no GPU or TPU is attached, and silence transformers where PyTorch is absent."""
    if not device_is_attached():
        use_compilers_only()
    if importlib.util.find_spec("torch") is None:  # transformers advises, on import, to install it
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def use_compilers_only() -> None:
    """Restrict JAX to the CPU and leave attached devices free; programs can still be compiled for GPUs and TPUs."""
    if "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # it read the variable when it was imported
            import jax

            jax.config.update("jax_platforms", "cpu")
    for name, value in _COMPILER_ALONE.items():
        os.environ.setdefault(name, value)
