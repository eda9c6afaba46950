"""The platform that a program is compiled for, known while it is traced.

`jax.lax.platform_dependent` traces the form of every platform, and of each its derivatives: half of the time that tracing a
training step takes. A process can run a program only on the platforms whose devices it has. `by_platform` traces the forms
of these alone: that of the CPU where JAX has the CPU alone, that of the CPU and that of the GPU or TPU where it has both,
because a program may be put on either.

A program that is traced on one machine and compiled for another, e.g. with `jax.export`, must be traced within
`tracing_for("every")` or that platform: else it holds the forms of the wrong platform, which are slower, or cannot be
compiled there.
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

_HOPPER = re.compile(r"\b(GH200|H(100|200|20|800))\b")  # in the names of NVIDIA's GPUs of compute capability 9.0

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
    if _target.value == "every":
        result: Array = jax.lax.platform_dependent(*operands, default=default, **forms)
        return result
    platforms = _platforms() if _target.value is None else (_target.value,)
    *others, last = [forms.get(platform, default) for platform in platforms]
    if all(form is last for form in others):
        return last(*operands)
    result = jax.lax.platform_dependent(*operands, default=last, **dict(zip(platforms, others, strict=False)))
    return result


def is_for_hopper() -> bool:
    """Return whether the program is compiled for one of NVIDIA's Hopper GPUs (compute capability 9.0).

    That is the GPU that the mesh of the context describes, or else the first attached device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return bool(_HOPPER.search(described.device_kind))
    return has_hopper()


def tensor_shards() -> int:
    """Return the number of devices along the axis `tensor` of the context's mesh, each of which has a part of a matrix."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def has_hopper() -> bool:
    """Return whether the first attached device is one of NVIDIA's Hopper GPUs."""
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


@functools.cache
def _platforms() -> tuple[str, ...]:
    """Return the platforms of the devices of this process, by JAX's names, the CPU first."""
    return tuple(sorted(backends(), key=lambda name: name != "cpu"))
