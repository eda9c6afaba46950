"""The roles of matrices on a mesh, and the partition specs that follow from them.

    role         matrices                               split over `tensor`
    output       q, k, v, gate, up                      along out: complete heads and blocks; also the bias and LoRA's B
    input        o, down                                along in: complete blocks, packed in parts; also LoRA's A
    vocabulary   dense embeddings and output heads      along the vocabulary
    whole        everything else                        not at all; only stored in parts, as over `fsdp`

A layer computes with the specs of `layer_specs`. It is stored with those of `frozen_specs`, which split what remains over
`fsdp` as well: along in if the devices divide it, else along out. What a layer does not have of its own matrices is gathered
while it runs, always as packed bytes. Matrices of the role "whole" are stored in parts over both axes and gathered over
both.

Of the scales with double quantisation, each 256 share a float32 number, in the order of the columns. A part of columns that
consists of complete groups has its own numbers; otherwise, and for parts of rows, every device has the numbers of the whole
matrix, which are 1/2048 of its bytes. So the values are those of one device, bit for bit.

The matrices of a fused projection (gate and up, or q, k and v one after the other) do not lie in one contiguous range of a
device's columns, so that they are whole. GPT-NeoX's fused projection has q, k and v of each head together, and is split.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from qlora_jax.nn.mesh import FSDP, TENSOR
from qlora_jax.quant import SCALE_BLOCK_SIZE, Int8Embedding, MixedStack, MixedTensor, QuantizedTensor, can_split_rows

__all__ = ["ROLES", "Role", "adapter_spec", "frozen_specs", "layer_specs", "role_of", "split_axis", "with_layout"]

Role = Literal["output", "input", "vocabulary", "whole"]

# By the names of the modules that have the matrices. Decoders of all families use Llama's names (`models.decoder`).
ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "q_proj": "output",
        "k_proj": "output",
        "v_proj": "output",
        "query_key_value": "output",
        "gate_proj": "output",
        "up_proj": "output",
        "o_proj": "input",
        "down_proj": "input",
        "qkv_proj": "whole",
        "gate_up_proj": "whole",
        # T5
        "q": "output",
        "k": "output",
        "v": "output",
        "gate": "output",
        "up": "output",
        "o": "input",
        "down": "input",
        "embed_tokens": "vocabulary",
        "shared": "vocabulary",
        "lm_head": "vocabulary",
    }
)
_Packed = QuantizedTensor | Int8Embedding | MixedStack | MixedTensor


def role_of(names: tuple[str, ...]) -> Role:
    """Return the role of the module that has a parameter, by the names on the path; "whole" for modules without a role."""
    for name in reversed(names):
        if name in ROLES:
            return ROLES[name]
    return "whole"


def with_layout(names: tuple[str, ...], value: Any, tensor: int) -> Any:
    """Return a value, or its shapes, whose matrix is marked as packed in parts if its role needs that.

    This does not move any bytes: it is for buffers that are filled afterwards and for shapes (`quant.with_parts` repacks).

    Args:
        names: the names on the path of the parameter.
        value: an array, a `QuantizedTensor` or another value of a parameter.
        tensor: the size of the tensor axis.
    """
    if isinstance(value, QuantizedTensor) and role_of(names) == "input" and can_split_rows(value, tensor):
        return dataclasses.replace(value, parts=tensor)
    return value


def layer_specs(names: tuple[str, ...], value: Any, tensor: int) -> Any:
    """Return the partition specs with which a layer computes, a tree like `value`.

    Args:
        names: the names on the path of the parameter; the last one is its attribute.
        value: the parameter's value, with any leading axes.
        tensor: the size of the tensor axis.
    """
    role = role_of(names)
    if tensor == 1 or role == "whole" or isinstance(value, MixedStack | MixedTensor | Int8Embedding):
        return jax.tree.map(lambda leaf: P(), value)
    if isinstance(value, QuantizedTensor):
        return _quantized_specs(role, value, tensor)
    return jax.tree.map(lambda leaf: _dense_spec(role, names[-1], leaf.shape, tensor), value)


def frozen_specs(names: tuple[str, ...], value: Any, fsdp: int, tensor: int) -> Any:
    """Return the partition specs with which a frozen value is stored, a tree like `value`; see `layer_specs`."""

    by_vocabulary = role_of(names) == "vocabulary"

    def stored(leaf: Any, spec: P) -> P:
        if TENSOR in spec and by_vocabulary and leaf.shape[0] % (fsdp * tensor) == 0:
            return P((FSDP, TENSOR))  # as the loss needs the rows of the head
        return _with_fsdp(leaf.shape, spec, fsdp, tensor)

    return jax.tree.map(stored, value, layer_specs(names, value, tensor))


def adapter_spec(names: tuple[str, ...], shape: tuple[int, ...], tensor: int) -> P:
    """Return the partition spec of a leaf of an adapter, or of the optimizer's state for it, in which it has its shape."""
    return P() if tensor == 1 else _dense_spec(role_of(names), names[-1], shape, tensor)


def split_axis(shape: tuple[int, ...], devices: int) -> int | None:
    """Return the axis along which a frozen leaf is split over so many devices, or None if the leaf is replicated."""
    axes = range(max(len(shape) - 2, 1), len(shape))
    return next((axis for axis in axes if shape[axis] % devices == 0), None)


def _quantized_specs(role: Role, q: QuantizedTensor, tensor: int) -> QuantizedTensor:
    """Return the specs of the leaves of a 4-bit matrix or of a stack."""
    specs: Any = jax.tree.map(lambda leaf: P(), q)
    if role == "input" and q.parts == tensor:
        rows = P(*[None] * (q.ndim - 2), TENSOR)
        return dataclasses.replace(specs, codes=rows, scales=rows)
    if role == "output" and q.flat_shape is None and q.shape[-1] % tensor == 0:
        columns = P(*[None] * (q.ndim - 1), TENSOR)
        specs = dataclasses.replace(specs, codes=columns, scales=columns)
        blocks = q.scales.shape[-2] * q.scales.shape[-1]
        if q.scale_absmax is not None and blocks % (tensor * SCALE_BLOCK_SIZE) == 0:
            specs = dataclasses.replace(specs, scale_absmax=P(*[None] * (q.ndim - 2), TENSOR))
    return specs


def _dense_spec(role: Role, attribute: str, shape: tuple[int, ...], tensor: int) -> P:
    """Return the spec of an array: a dense weight `[..., in, out]`, a bias `[..., out]` or a matrix of LoRA."""
    along = {
        ("output", "weight"): -1,
        ("output", "bias"): -1,
        ("output", "lora_b"): -1,
        ("input", "weight"): -2,
        ("input", "lora_a"): -2,
        ("vocabulary", "weight"): -2,
    }.get((role, attribute))
    if along is None or len(shape) < -along or shape[along] % tensor:
        return P()
    return P(*[None] * (len(shape) + along), TENSOR)


def _with_fsdp(shape: tuple[int, ...], spec: P, fsdp: int, tensor: int) -> P:
    """Return the spec of a stored leaf: that of the layer, with the rest split over `fsdp`; whole leaves over both axes."""
    if TENSOR in spec:
        place = spec.index(TENSOR)
        own = [size // tensor if axis == place else size for axis, size in enumerate(shape)]
        axis = split_axis(tuple(own), fsdp)
        if fsdp == 1 or axis is None:
            return spec
        axes: list[Any] = [*spec, *[None] * (axis + 1 - len(spec))]
        axes[axis] = (TENSOR, FSDP) if axis == place else FSDP
        return P(*axes)
    both = (fsdp * tensor, (FSDP, TENSOR) if tensor > 1 else FSDP)
    for devices, names in (both, (fsdp, FSDP)):
        axis = split_axis(shape, devices)
        if axis is not None:
            return P(*[None] * axis, names)
    return P()


def names_of(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the names of the attributes on a path of `jax.tree_util`, down to the variable."""
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def map_variables(function: Any, tree: Any) -> Any:
    """Return a tree like an `nnx.State` whose variables are replaced by `function(names on the path, variable)`."""

    def apply(path: tuple[Any, ...], variable: Any) -> Any:
        return function(names_of(path), variable)

    return jax.tree_util.tree_map_with_path(apply, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
