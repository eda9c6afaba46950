"""The environment of a process that a test starts to have several devices."""

import os


def virtual_devices(count: int) -> dict[str, str]:
    """Return the variables of a process with `count` virtual CPU devices, which compiles as lightly as this one does."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
