"""Floating-point operations of a program, counted in the program as JAX traces it.

XLA's own count takes the body of a loop once, however often it runs, and does not know the work of custom calls. Here the
matrix products of a jaxpr are counted, 2 m n k each, times the length of every scan around them; the products that the
backward pass recomputes are in the jaxpr, so they are counted too. Kernels are opaque. The products of flash attention are
counted by a formula (2 forward; 5 backward, of which one is recomputed), half of each if the mask is causal; a product
with a 4-bit matrix is counted by its shapes, and any other kernel by the estimate that it declares. Elementwise operations
are not counted: they do not run on the matrix units, whose peak the count is compared with.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

_PALLAS = ("pallas_call", "mpmd_map")  # of kernels with one program for all cores or threads, and with several of them


def count_flops(jaxpr: Any, *, platform: str | None = None, causal: bool = True) -> float:
    """Return the operations of all matrix products of a (closed) jaxpr, on all devices together.

    Args:
        jaxpr: the jaxpr.
        platform: the platform whose branch counts where the program has one for each; None: the branch with the most.
        causal: whether attention is causal.
    """
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_equation_flops(equation, platform, causal) for equation in inner.eqns)


def _equation_flops(equation: Any, platform: str | None, causal: bool) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_flops(equation)
    if name.startswith("dot_product_attention"):
        return _cudnn_flops(equation, "bwd" in name, causal)
    if name == "ffi_call" and "cudnn$fmha" in (target := equation.params["target_name"]):
        return _cudnn_flops(equation, target.endswith("Backward"), "CAUSAL" in equation.params["legacy_backend_config"])
    if name in _PALLAS:
        return _pallas_flops(equation, causal)
    repeats = equation.params.get("length", 1) if name == "scan" else 1
    if name == "shard_map":  # its body runs on each device
        repeats = equation.params["mesh"].size
    bodies = [count_flops(body, platform=platform, causal=causal) for body in _bodies(equation)]
    if platform is not None and (platforms := equation.params.get("branches_platforms")):
        own = [body for body, names in zip(bodies, platforms, strict=True) if names is not None and platform in names]
        return own[0] if own else bodies[platforms.index(None)]
    if name in ("cond", "platform_index"):  # one branch runs
        return max(bodies, default=0.0)
    return repeats * sum(bodies)


def _bodies(equation: Any) -> Iterator[Any]:
    custom = ("call", "call_jaxpr", "fun_jaxpr")  # not the rules of differentiation and batching
    names = custom if equation.primitive.name.startswith("custom_") else equation.params
    for name in names:
        value = equation.params.get(name)
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                yield item


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _cudnn_flops(equation: Any, backward: bool, causal: bool) -> float:
    q, k = (equation.invars[index].aval.shape for index in (0, 1))  # [b, t, heads, d], [b, s, kv heads, d]
    return _attention_flops(q[0] * q[2], q[1], k[1], q[3], backward=backward, causal=causal)


def _pallas_flops(equation: Any, causal: bool) -> float:
    """Return the operations of splash attention, whose queries are `[.., heads, t, d]`, or of another kernel.

    The kernels of 4-bit matrices multiply by a matrix of a stack, whose codes `[layers, K/2, N]` are their first uint8
    operand, to y `[.., M, N]`; its first axis may be that of partial sums over K. Of other kernels the declared estimate
    counts.
    """
    name = str(equation.params.get("name_and_src_info") or equation.params.get("name") or "")
    estimate = equation.params.get("cost_estimate")
    if estimate is not None and "splash" not in name:
        return float(estimate.flops)
    if "matmul_4bit" in name:
        codes = next(v.aval for v in equation.invars if v.aval.ndim == 3 and v.aval.dtype == jnp.uint8)
        return 2.0 * equation.outvars[0].aval.shape[-2] * 2 * math.prod(codes.shape[1:])
    if "splash" not in name:
        return 0.0
    arrays = [value.aval for value in equation.invars if jnp.issubdtype(value.aval.dtype, jnp.floating)]
    shapes = [array.shape for array in arrays if len(array.shape) >= 3]  # queries and keys come first
    *stack, t, d = shapes[0]
    s = shapes[1][-2]
    flops = _attention_flops(math.prod(stack), t, s, d, backward=False, causal=causal)
    if "dkv" in name:  # scores again, dP, dV, dK
        return 2 * flops
    return 1.5 * flops if "dq" in name else flops  # scores again, dP, dQ


def _attention_flops(heads: int, t: int, s: int, d: int, *, backward: bool, causal: bool) -> float:
    return (5 if backward else 2) * 2.0 * heads * t * s * d * (0.5 if causal else 1.0)
