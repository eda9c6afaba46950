"""Compilers of devices that are not attached, and meshes of such devices to compile programs for.

A description (`plan.devices`) gives a topology, and the topology a mesh of devices that cannot run anything. Shardings over
that mesh make JAX compile a program for these devices. Both compilers are in pip packages, and run on a machine without an
accelerator.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from qlora_jax.errors import UnsupportedError
from qlora_jax.nn.mesh import AXES, MeshShape, shape_on
from qlora_jax.plan.devices import Machine, Platform
from qlora_jax.quant import tracing_for

# The modules of each platform's compiler, one of which must be importable, and the command that installs it.
_COMPILERS: dict[Platform, tuple[tuple[str, ...], str]] = {
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), 'pip install "qlora-jax[cuda]"'),
    "tpu": (("libtpu",), 'pip install "qlora-jax[tpu]"'),
}


class CompilerMissing(UnsupportedError):
    """The compiler of a device is not installed; the message says how to install it."""


class CompilerRefuses(UnsupportedError):
    """The installed compiler does not know the device, or cannot compile the program for it."""


def check_compiler(machine: Machine) -> None:
    """Raise `CompilerMissing` if the compiler of a machine's devices is not installed."""
    modules, install = _COMPILERS[machine.device.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise CompilerMissing(
            f"compiling for {machine.device.description} needs JAX's {machine.device.platform.upper()} plugin, which is not "
            f"installed: {install}"
        )


def machine_mesh(machine: Machine, shape: MeshShape | None = None) -> Mesh:
    """Return a mesh of the machine's devices, which need not be attached.

    If no device of that kind is attached, the process must run with `JAX_PLATFORMS=cpu`. Otherwise JAX looks for a driver
    when it loads the compiler's plugin, finds none, and does not register the plugin.

    Args:
        machine: the devices.
        shape: the number of devices along each axis of the mesh; None: all of them along `fsdp`.

    Raises:
        OptionError: the shape has another number of devices.
        CompilerMissing: the device's compiler is not installed, or JAX did not register it.
        CompilerRefuses: the compiler does not know the device or the topology.
    """
    check_compiler(machine)
    device, sizes = machine.device, shape_on(shape, machine.count).sizes
    options: dict[str, Any] = {}
    if device.target_config is not None:
        options = {"target_config": device.target_config, "topology": f"1x1x{machine.count}"}
    else:
        if device.name == "v4":  # the two cores of a chip as one device; on v5p that is the default
            options["chip_config_name"] = "megacore"
        if machine.count < 4 or any(
            side % 2 for side in machine.shape[:2]
        ):  # the default hosts, of four chips each, do not divide it
            options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        topology = topologies.get_topology_desc(machine.topology, device.platform, **options)
    except NotImplementedError as error:
        raise CompilerMissing(
            f"JAX did not load the {device.platform.upper()} plugin in this process ({error}); without a "
            "device it does so only where the environment variable JAX_PLATFORMS is cpu from the start"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise CompilerRefuses(f"{machine.name}: the compiler does not know this topology: {_first_line(error)}") from error
    devices = np.asarray(topology.devices[: machine.count]).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@contextlib.contextmanager
def context(mesh: Mesh) -> Iterator[None]:
    """Run the block in the context of training: a mesh of several devices, or the description of one GPU, for kernels."""
    device = mesh.devices.flat[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing_for("tpu" if device.platform == "tpu" else "cuda"))
        if mesh.size > 1:
            stack.enter_context(jax.set_mesh(mesh))
        elif device.platform != "tpu":  # the same description as that of the arguments' shardings
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh.abstract_mesh))
        if device.platform != "tpu":
            stack.enter_context(_cudnn_for(device))
        yield


@contextlib.contextmanager
def _cudnn_for(device: Any) -> Iterator[None]:
    """Let JAX's checks of cuDNN's attention see the described GPU while the block runs.

    They ask the attached devices, which are none or others, and would refuse head sizes above 128 on Hopper.
    """
    try:
        from jax._src.cudnn import fused_attention_stablehlo
    except ImportError:  # it is no public module: without it the checks are those of the attached devices
        yield
        return
    capability = tuple(map(int, str(device.compute_capability).split(".")))

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    checks = {
        "check_compute_capability": lambda least: capability >= numbers(least),
        "is_cuda_compute_capability_equal": lambda exact: capability == numbers(exact),
    }
    with contextlib.ExitStack() as stack:
        for name, check in checks.items():
            if hasattr(fused_attention_stablehlo, name):
                stack.callback(setattr, fused_attention_stablehlo, name, getattr(fused_attention_stablehlo, name))
                setattr(fused_attention_stablehlo, name, check)
        yield


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
