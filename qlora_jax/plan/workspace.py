"""The workspace of cuDNN's attention, which XLA adds to a program only where a device is attached.

The backward pass of cuDNN's flash attention computes dQ by atomic additions into float32 accumulators `[b, heads, T, d]`,
and stores the sums over d of dO · O, float32 `[b, heads, T]`:

    workspace = b · heads · T · (d + 1) · 4 bytes

If it also returns the gradient of a bias, it stores the gradients of all scores, `[b, heads, T, S]` in bfloat16 with T and
S rounded up to tiles, in place of the accumulators. Source: NVIDIA's cudnn-frontend,
include/cudnn_frontend/node/scaled_dot_product_flash_attention.h, `CompositeSDPABackwardNode` (`dQ_accum`, `softmax_sum`,
`use_dp_workspace`, `get_fe_workspace_size_node`). In the packed layout, with the offsets of several sequences in a row,
XLA (xla/stream_executor/cuda/cuda_dnn.cc) describes each sequence as a row of its own of full length, and the workspace has
their number as b. What cuDNN's closed library itself asks for besides is known only on the device, and is not counted.

XLA asks cuDNN for these bytes and makes them a result of the call, u8[bytes], which without a device remains u8[0]. So the
bytes are written into the program before it is compiled, and XLA's buffer assignment counts them while the call runs. On
several devices the calls are made within XLA's partitioner; there they are found in the compiled program and added to the
peak, which is an upper bound.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from qlora_jax.plan.hlo import Program

_CALL = re.compile(r"__cudnn\$fmha\w*Backward")
_TILE_QUERIES, _TILE_KEYS = 64, 128


def attention_workspace(
    batch: int, heads: int, length: int, head_size: int, *, keys: int | None = None, bias: bool = False
) -> int:
    """Return the bytes of workspace of cuDNN's backward pass of attention.

    Args:
        batch: the rows; in the packed layout the sequences.
        heads: the heads of the queries.
        length: the queries of a row.
        head_size: the features of a head.
        keys: the keys of a row; None: as many as queries.
        bias: whether the gradient of a bias is returned.
    """
    sums = batch * heads * length * 4
    if not bias:
        return sums + batch * heads * length * head_size * 4
    keys = length if keys is None else keys
    tiles = math.ceil(length / _TILE_QUERIES) * _TILE_QUERIES * math.ceil(keys / _TILE_KEYS) * _TILE_KEYS
    return sums + batch * heads * tiles * 2


def add_workspaces(module: Any) -> int:
    """Give the calls of a lowered program (an MLIR module in StableHLO) their workspace; return the largest, or 0."""
    from jax.extend.mlir import ir

    most = 0
    with module.context, ir.Location.unknown(module.context):
        for call in _calls(module.operation):
            *gradients, workspace = call.results
            shapes = [tuple(ir.RankedTensorType(gradient.type).shape) for gradient in gradients]
            statistics = tuple(ir.RankedTensorType(call.operands[3].type).shape)
            size = _bytes(shapes, statistics)
            workspace.set_type(ir.RankedTensorType.get((size,), ir.IntegerType.get_unsigned(8)))
            most = max(most, size)
    return most


def missing_workspace(program: Program) -> int:
    """Return the bytes of the largest workspace that a compiled program has no memory for, or 0."""
    most = 0
    for body in program.computations.values():
        for call in body.values():
            if call.opcode == "custom-call" and _CALL.search(call.text) and call.shapes[-1] == (0,):
                statistics = body[call.operands[3]].shapes[0]
                most = max(most, _bytes(list(call.shapes[:-1]), statistics))
    return most


def _bytes(gradients: list[tuple[int, ...]], statistics: tuple[int, ...]) -> int:
    """Return the bytes of the workspace of one call.

    Args:
        gradients: the shapes of its results: `[b, heads, T, d]`, twice `[b, kv heads, S, d]`, and maybe that of a bias.
        statistics: the shape of the softmax's statistics, whose first axis is that of the sequences.
    """
    (_, heads, length, head_size), (_, _, keys, _) = gradients[:2]
    return attention_workspace(statistics[0], heads, length, head_size, keys=keys, bias=len(gradients) > 3)


def _calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                inner = inner.operation
                if inner.name == "stablehlo.custom_call" and _CALL.search(str(inner.attributes["call_target_name"])):
                    yield inner
                yield from _calls(inner)
