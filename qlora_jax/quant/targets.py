"""The platform that a program is compiled for, known while it is traced.

`jax.lax.platform_dependent` traces the form of every platform, and of each its derivatives: half of the time that tracing a
training step takes. In a process in which JAX has the CPU alone, only the CPU's form can be meant, so `by_platform` traces
that one. Where there are other devices, it leaves the choice to JAX.

A program that is traced on a machine without an accelerator and compiled for one, e.g. with `jax.export`, must be traced
within `tracing_for("every")` or that platform: else it holds the CPU's forms, which are as right on the other device, and
slower.
"""

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax import Array
from jax.extend.backend import backends

Target = Literal["cpu", "tpu", "cuda", "rocm", "every"]

_HOPPER = re.compile(r"\bGH?200\b|\bH(100|200|20|800)\b")  # in the names of NVIDIA's GPUs of compute capability 9.0

_target: Any = jax.make_user_context(default_value=None)  # part of what jitted functions are cached by


def tracing_for(target: Target) -> AbstractContextManager[None]:
    """Return a context in which programs are traced for one platform, or such that they can be lowered for every one."""
    context: AbstractContextManager[None] = _target(target)
    return context


def by_platform(*operands: Any, default: Callable[..., Array], **forms: Callable[..., Array]) -> Array:
    """Return the result of the form of the computation for the platform that the program is compiled for.

    Args:
        operands: pytrees of arrays, the arguments of every form.
        default: the form for platforms that `forms` does not name.
        forms: functions by the names "cpu", "tpu", "cuda" and "rocm"; all give results of one shape and dtype.
    """
    target: Target = _target.value or _target_of_this_process()
    if target != "every":
        return forms.get(target, default)(*operands)
    result: Array = jax.lax.platform_dependent(*operands, default=default, **forms)
    return result


def is_for_hopper() -> bool:
    """Return whether the program is compiled for one of NVIDIA's Hopper GPUs (compute capability 9.0).

    That is the GPU that the mesh of the context describes, or else the first attached device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return bool(_HOPPER.search(described.device_kind))
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


@functools.cache
def _target_of_this_process() -> Target:
    return "cpu" if list(backends()) == ["cpu"] else "every"
