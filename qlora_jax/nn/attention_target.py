"""Which kernel computes causal attention: the one place that chooses, by the target device and by what is computed.

    splash   TPU: JAX's Pallas kernel, with causal, window and segment masks and with capped scores
    cudnn    NVIDIA GPUs from compute capability 8.0 on: cuDNN's flash attention, in bfloat16 and float16; of packed rows in
             several calls (`attention_packed`)
    blocks   every platform and everything else, by XLA: blocks of queries (`attention`), or tiles where the rows are long
             (`attention_tiles`); memory is linear in the length

What a kernel takes (head sizes, multiples of lengths) is met with zeros where that costs less than doing without the kernel:
zero features change neither a score nor the other features of the result, and no token attends to the later ones that are
added.

The limits of cuDNN are those of the backward pass in NVIDIA's cudnn-frontend (`CompositeSDPABackwardNode`), which are
narrower than those that JAX checks: a head size of at most 256 on Hopper and of at most 128 on all others, Blackwell too.
Lengths are padded to multiples of 64, because not all versions of cuDNN take every length, and on Hopper to multiples of
128: the backward pass there can return NaN for dQ where 64 keys are left for the last tile of 128, since some versions do
not mask the rest of that tile (cudnn-frontend, pull request 628). A causal mask hides the rest, and no NaN is known with
one, so this is a precaution.

The target is a device that a program is compiled for. It need not be attached, so that a plan chooses as the run does.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Platform = Literal["cpu", "gpu", "tpu"]
KernelName = Literal["blocks", "cudnn", "splash"]

_FLASH = (8, 0)  # the first compute capability with flash attention in cuDNN
_SHORT = 128  # tokens; the scores of shorter rows are small, and splash attention has tiles of 128 x 128
_WIDEST = 2048  # bytes of a head; more of them do not fit into the memory of a TPU core
LEAF = 128  # tokens; the most of a part of a packed row whose scores XLA computes
SPLASH_TILES = (512, 384, 256, 128)  # the fastest first


@dataclasses.dataclass(frozen=True)
class AttentionTarget:
    """The device that a program is compiled for, as far as attention depends on it.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        capability: the compute capability of an NVIDIA GPU; None for other devices.
    """

    platform: Platform = "cpu"
    capability: tuple[int, int] | None = None


CPU = AttentionTarget()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and what it is given.

    Attributes:
        name: the kernel.
        length: the tokens of a row, padded at the end.
        head_dim: the features of a head, padded at the end.
    """

    name: KernelName
    length: int
    head_dim: int


def attention_target(device: "str | AttentionTarget | None" = None) -> AttentionTarget:
    """Return the target for a platform or for the attached device.

    Args:
        device: "cpu", "gpu" (or "cuda") or "tpu"; a target, which is returned; None: the first device of JAX's default
            backend. A GPU that is not described has the oldest compute capability with flash attention.
    """
    if isinstance(device, AttentionTarget):
        return device
    match device or jax.default_backend():
        case "gpu" | "cuda":
            return AttentionTarget("gpu", _FLASH if device else _capability(jax.devices()[0]))
        case "tpu":
            return AttentionTarget("tpu")
        case _:
            return AttentionTarget()


def _capability(device: Any) -> tuple[int, int] | None:
    """Return the compute capability of an attached GPU, None for those of other vendors."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def choose_kernel(
    target: AttentionTarget,
    *,
    head_dim: int,
    length: int,
    dtype: DTypeLike,
    cap: float | None = None,
    segmented: bool = False,
    window: int | None = None,
    shared: int = 0,
) -> Kernel:
    """Return the kernel for causal attention on a target.

    Args:
        target: the device.
        head_dim: the features of a head.
        length: the tokens of a row.
        dtype: the dtype of queries, keys and values.
        cap: the cap of the scores, or None.
        segmented: whether tokens attend to those of their own segment only.
        window: number of tokens that a token attends to, less than the length; None: all earlier ones.
        shared: number of first tokens that tokens of all segments attend to.
    """
    if (
        target.platform == "tpu"
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)
        and not (shared and segmented)  # splash attention has no mask for both
        and length >= _SHORT
        and head_dim * jnp.dtype(dtype).itemsize <= _WIDEST
    ):
        return Kernel("splash", _splash_length(length), _multiple(head_dim, 64))
    if target.platform == "gpu" and cap is None and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16):
        padded = _multiple(head_dim, 8)
        if target.capability is not None and target.capability >= _FLASH and padded <= largest_head(target.capability):
            if not segmented:
                return Kernel("cudnn", _multiple(length, 128 if target.capability[0] == 9 else 64), padded)
            # The parts of packed rows are those of their windows; small ones are not worth calls of a kernel.
            if (length if window is None else window) > LEAF and not (window is not None and shared):
                return Kernel("cudnn", length, padded)
    return Kernel("blocks", length, head_dim)


def largest_head(capability: tuple[int, int]) -> int:
    """Return the largest head size that cuDNN can train with on a GPU."""
    return 256 if capability[0] == 9 else 128


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def _splash_length(length: int) -> int:
    """Return the length to which rows are padded, such that they have tiles of at least 256 or are one tile."""
    return min(_multiple(length, tile) for tile in SPLASH_TILES if length <= SPLASH_TILES[0] or tile >= 256)
