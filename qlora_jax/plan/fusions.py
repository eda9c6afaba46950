"""The part of its operands that a fusion reads, and the part of its results that it writes.

A fusion computes only the elements of its inner values that its results need. So the elements that are needed are followed
from the results back to the parameters:

    slice, dynamic-slice, gather        need as many elements of their operand as are needed of them
    elementwise, copies, broadcasts     need no more elements of an operand than are needed of them
    reductions                          need in proportion
    fusions in the fusion               the same, through their own instructions
    updates of slices in place          need nothing of the array that they update
    products and all others             need all of an operand

A copy of a whole stack from which a slice is taken later, in the same fusion, thus counts as that slice.
"""

import math

from qlora_jax.plan.instructions import Computation, Instruction, bytes_of

Computations = dict[str, Computation]

SLICES = frozenset(("dynamic-slice", "slice", "gather"))
SEE_THROUGH = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))
_ALL = frozenset(("dot", "convolution", "sort", "scatter", "select-and-scatter", "reduce-window", "custom-call", "fft"))
_ALL |= {"while", "conditional", "cholesky", "triangular-solve", "topk", "ragged-dot"}


def updates(computations: Computations, instruction: Instruction) -> int | None:
    """Return the place of the operand that an instruction writes into its first operand; None if it does no such thing.

    A scatter writes in place if it combines nothing: its computation returns one of its parameters.
    """
    if instruction.opcode == "dynamic-update-slice":
        return 1
    if instruction.opcode == "scatter" and len(instruction.shapes) == 1:
        root = _root(computations.get(instruction.called("to_apply") or "", {}))
        return 2 if root is not None and root.opcode == "parameter" else None
    return None


def parameter_reads(computations: Computations, name: str) -> dict[int, int]:
    """Return the bytes that a fused computation reads of each parameter that it needs, by the parameter's index."""
    body = computations.get(name, {})
    root = _root(body)
    needed = {} if root is None else _needs(computations, body, root.elements, True)
    dtypes = {_index(x): x.dtypes for x in body.values() if x.opcode == "parameter"}
    return {index: sum(map(bytes_of, dtypes[index], elements)) for index, elements in needed.items()}


def result_writes(computations: Computations, name: str) -> list[int] | None:
    """Return the bytes that a fused computation writes of each of its results; None if it has no result.

    Of an array of which it updates a slice in place, it writes the slice.
    """
    body = computations.get(name, {})
    root = _root(body)
    return None if root is None else [written(computations, body, root, place) for place in range(len(root.shapes))]


def written(computations: Computations, body: Computation, root: Instruction, place: int = 0) -> int:
    """Return the bytes that are written of array `place` of an instruction's result."""
    size = root.all_sizes[place]
    while True:
        called = root.called("calls") or ""
        if root.opcode == "tuple" and (part := _part(body, root, place)) is not None:
            root, place = part
        elif root.opcode == "get-tuple-element" and root.operands[0] in body:
            place, root = _place(root), body[root.operands[0]]
        elif root.opcode in SEE_THROUGH and root.operands and root.operands[0] in body:
            root = body[root.operands[0]]
        elif root.opcode == "fusion" and (inner := _root(computations.get(called, {}))) is not None:
            body, root = computations[called], inner
        elif (update := updates(computations, root)) is not None and root.operands[update] in body:
            return min(size, sum(body[root.operands[update]].all_sizes))
        else:
            return size


def _part(body: Computation, tuple_of: Instruction, place: int) -> tuple[Instruction, int] | None:
    """Return (the instruction whose result holds array `place` of a tuple, the array's place in it); None: it is unknown.

    An operand of a tuple may be a tuple of arrays itself, such as the result of a reduction of several arrays.
    """
    for name in tuple_of.operands:
        if name not in body:
            return None
        if place < len(body[name].shapes):
            return body[name], place
        place -= len(body[name].shapes)
    return None


def _needs(computations: Computations, body: Computation, wanted: list[int], in_place: bool) -> dict[int, list[int]]:
    """Return the elements that are needed of each array of each parameter of a fused computation, by the parameter's index.

    Args:
        computations: all computations.
        body: the fused computation.
        wanted: the elements that are needed of each array of its result.
        in_place: whether its results are those of the whole fusion, whose memory may be that of a parameter.
    """
    root = _root(body)
    if root is None:
        return {}
    needed = {root.name: wanted}
    results = {root.name} if in_place else set()
    parameters: dict[int, list[int]] = {}
    for instruction in reversed(body.values()):
        own = needed.get(instruction.name)
        if own is None or not any(own):
            continue
        if instruction.opcode == "parameter":
            parameters[_index(instruction)] = own
            continue
        if instruction.name in results and instruction.opcode in SEE_THROUGH | {"tuple"}:
            results.update(instruction.operands)
        sources = [body.get(name) for name in instruction.operands]
        for source, more in zip(sources, _of_operands(computations, instruction, sources, own, results), strict=True):
            if source is not None:
                before = needed.get(source.name, [0] * len(more))
                needed[source.name] = [
                    min(one + other, most) for one, other, most in zip(before, more, source.elements, strict=True)
                ]
    return parameters


def _of_operands(
    computations: Computations,
    instruction: Instruction,
    operands: list[Instruction | None],
    wanted: list[int],
    results: set[str],
) -> list[list[int]]:
    """Return the elements that an instruction needs of each array of each operand, for those that are wanted of itself.

    `results` are the instructions whose memory is that of the fusion's results.
    """
    everything = [[] if operand is None else operand.elements for operand in operands]
    if updates(computations, instruction) is not None:
        return [[0 if instruction.name in results else wanted[0]], *everything[1:]]
    match instruction.opcode:
        case "get-tuple-element":
            return [[wanted[0] if index == _place(instruction) else 0 for index in range(len(everything[0]))]]
        case "tuple":
            return [[count] for count in wanted] if len(wanted) == len(operands) else everything
        case "fusion" | "call":
            called = computations.get(instruction.called("calls") or instruction.called("to_apply") or "", {})
            found = _needs(computations, called, wanted, instruction.name in results)
            return [found.get(place, [0] * len(arrays)) for place, arrays in enumerate(everything)]
        case opcode if opcode in SLICES:
            return [[min(wanted[0], everything[0][0])], *everything[1:]]
        case opcode if opcode in _ALL or len(wanted) != 1:
            return everything
        case "reduce" | "bitcast" | "bitcast-convert":  # in proportion
            whole = max(math.prod(instruction.shapes[0]), 1)
            return [[math.ceil(count * wanted[0] / whole) for count in arrays] for arrays in everything]
        case _:
            return [[min(count, wanted[0]) for count in arrays] for arrays in everything]


def _root(body: Computation) -> Instruction | None:
    return next((x for x in body.values() if x.root), None)


def _index(parameter: Instruction) -> int:
    return int(parameter.text.split(")")[0])


def _place(instruction: Instruction) -> int:
    return int(instruction.text.split("index=")[1].split(",")[0])
