"""What the machine is: versions, devices and their memory, and the device of the plans that is nearest to it."""

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import jax

from qlora_jax.plan import DEVICES, Device, Machine, machine_named
from scripts.verification.checks import Check, Row, measured, skipped

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "libtpu",
    "flax",
    "optax",
    "numpy",
)
_SLOWER = {"h100": {"pcie", "nvl"}}  # forms of a GPU with another peak and bandwidth than the plans'
_SAME = 0.1  # a device of the plans is meant if its memory differs by at most this share
# What JAX calls a TPU, by the name in the plans.
_TPU_KINDS = {
    "v4": ("TPU v4",),
    "v5e": ("TPU v5 lite", "TPU v5e"),
    "v5p": ("TPU v5", "TPU v5p"),
    "v6e": ("TPU v6 lite", "TPU v6e"),
}


def checks(small: bool) -> list[Check]:
    """Return the one check of this section."""
    return [Check(("versions", "devices", "memory", "driver", "device of the plans"), _rows)]


def _rows() -> Iterator[Row]:
    versions = {"python": platform.python_version(), **installed(_PACKAGES)}
    yield measured("versions", ", ".join(f"{name} {version}" for name, version in versions.items()), **versions)
    devices = jax.devices()
    first = devices[0]
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    only = "; the checks use the first" if len(devices) > 1 else ""
    yield measured(
        "devices",
        f"{len(devices)} x {first.device_kind} ({jax.default_backend()}){hosts}{only}",
        platform=jax.default_backend(),
        kind=first.device_kind,
        count=len(devices),
        coordinates=[list(getattr(device, "coords", None) or ()) for device in devices],
    )
    limit = memory_limit()
    if limit is None:
        yield skipped("memory", f"a device of the platform {jax.default_backend()!r} reports none")
    else:
        kinds = sorted(memory.kind for memory in first.addressable_memories())
        text = f"{limit / 2**30:.2f} GiB for JAX on each device; kinds of memory: {', '.join(kinds)}"
        yield measured("memory", text, bytes_limit=limit, kinds=kinds)
    yield _driver(first)
    machine = attached_machine()
    if machine is None:
        yield skipped("device of the plans", f"none of {', '.join(DEVICES)} is a {first.device_kind!r} with this memory")
    else:
        kind = machine.device
        text = f"{kind.name}: {kind.flops / 1e12:.0f} TFLOP/s in bfloat16, {kind.bandwidth / 1e9:.0f} GB/s"
        yield measured("device of the plans", text, name=kind.name, flops=kind.flops, bandwidth=kind.bandwidth)


def installed(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def memory_limit() -> int | None:
    """Return the bytes that JAX may use on the first device; None if the device does not report them."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def peak_memory() -> int | None:
    """Return the most bytes of the first device's memory that this process has used; None if the device reports none."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def attached_machine() -> Machine | None:
    """Return the machine of one attached device as the plans describe it; None for a device that they do not know."""
    if jax.default_backend() == "cpu":
        return None
    device = nearest_device(jax.devices()[0].device_kind, total_memory())
    return None if device is None else machine_named(device.name)


def total_memory() -> int | None:
    """Return the bytes of the first GPU's memory by its driver; None if unknown, and for other devices."""
    lines = _nvidia_smi("memory.total") if jax.default_backend() == "gpu" else None
    return None if not lines else int(lines[0].split()[0]) * 2**20


def nearest_device(kind: str, memory: int | None) -> Device | None:
    """Return the device of the plans that JAX calls `kind`, by its name and its memory in bytes."""
    for name, kinds in _TPU_KINDS.items():
        if kind in kinds:
            return DEVICES[name]
    words = re.findall(r"[a-z0-9]+", kind.lower().replace("rtx ", "rtx"))
    gpus = [device for device in DEVICES.values() if device.platform == "cuda"]
    near = [gpu for gpu in gpus if gpu.name.split("-")[0] in words and not _SLOWER.get(gpu.name, set()) & {*words}]
    if memory is None:  # a name such as A100-SXM4-40GB says which of several it is
        named = [device for device in near if f"{device.name.partition('-')[2]}gb" in words]
        return (named or near)[0] if named or len(near) == 1 else None
    same = [device for device in near if abs(device.memory_bytes / memory - 1) <= _SAME]
    return same[0] if same else None


def _driver(device: Any) -> Row:
    lines = _nvidia_smi("driver_version") if device.platform == "gpu" else None
    version = str(device.client.platform_version).strip().splitlines()
    if lines:
        capability = getattr(device, "compute_capability", None)
        text = f"NVIDIA {lines[0]}, compute capability {capability}"
        return measured("driver", text, driver=lines[0], compute_capability=capability, platform_version=version)
    if device.platform == "cpu":
        return skipped("driver", "a CPU has none")
    return measured("driver", "; ".join(version), platform_version=version)


def _nvidia_smi(field: str) -> list[str] | None:
    """Return a field of each GPU as NVIDIA's tool prints it; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines() or None
