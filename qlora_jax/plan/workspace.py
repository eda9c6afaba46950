"""The workspace of cuDNN's attention, which XLA adds to a program only where a device is attached.

The backward pass of cuDNN's flash attention computes dQ by atomic additions into float32 accumulators `[b, heads, T, d]`,
and stores the sums over d of dO · O, float32 `[b, heads, T]`:

    workspace = b · heads · T · (d + 1) · 4 bytes

Source: NVIDIA's cudnn-frontend, include/cudnn_frontend/node/scaled_dot_product_flash_attention.h,
`CompositeSDPABackwardNode` (`dQ_accum`, `softmax_sum`, `get_fe_workspace_size_node`). Attention of packed rows is several
calls, each with a part of the queries and of the heads (`nn.attention_packed`). What cuDNN's closed library itself asks for
besides is known only on the device, and is not counted.

XLA asks cuDNN for these bytes and makes them a result of the call, u8[bytes], which without a device remains u8[0]. So the
bytes are written into the program before it is compiled, and XLA's buffer assignment counts them while the call runs. On
several devices the calls are made within XLA's partitioner; there they are found in the compiled program and added to the
peak, which is an upper bound.
"""

import re
from collections.abc import Iterator
from typing import Any

from qlora_jax.plan.hlo import Program

_CALL = re.compile(r"__cudnn\$fmha\w*Backward")


def attention_workspace(batch: int, heads: int, length: int, head_size: int) -> int:
    """Return the bytes of workspace of cuDNN's backward pass of attention.

    Args:
        batch: the rows.
        heads: the heads of the queries.
        length: the queries of a row.
        head_size: the features of a head.
    """
    return batch * heads * length * (head_size + 1) * 4


def add_workspaces(module: Any) -> int:
    """Give the calls of a lowered program (an MLIR module in StableHLO) their workspace; return the largest, or 0."""
    from jax.extend.mlir import ir

    most = 0
    with module.context, ir.Location.unknown(module.context):
        for call in _calls(module.operation):
            *gradients, workspace = call.results
            size = attention_workspace(*ir.RankedTensorType(gradients[0].type).shape)
            workspace.set_type(ir.RankedTensorType.get((size,), ir.IntegerType.get_unsigned(8)))
            most = max(most, size)
    return most


def missing_workspace(program: Program) -> int:
    """Return the bytes of the largest workspace that a compiled program has no memory for, or 0."""
    most = 0
    for body in program.computations.values():
        for call in body.values():
            if call.opcode == "custom-call" and _CALL.search(call.text) and call.shapes[-1] == (0,):
                most = max(most, attention_workspace(*call.shapes[0]))
    return most


def _calls(operation: Any) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                inner = inner.operation
                if inner.name == "stablehlo.custom_call" and _CALL.search(str(inner.attributes["call_target_name"])):
                    yield inner
                yield from _calls(inner)
