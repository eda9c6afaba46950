"""A compiled program, parsed from its text: its loops, the bytes that it moves, and the arrays that exist at the same time.

    %fusion.7 = bf16[8192,4096]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused.7        one instruction a line
    %body (p: (s32[], …)) -> (…) {   …   }                                            in computations

XLA's own count of bytes takes the body of a loop once, and for a GPU that is not attached it has no count. Here every
instruction that runs reads its operands and writes its result once, with these rules:

- the body of a loop counts as often as it runs (`known_trip_count`, or the constant that its condition compares with);
- an instruction that only slices an operand reads the slice, and one that updates a slice writes the slice, in a fusion too;
- the kernels of 4-bit matrices read one layer of the stacks that are their operands;
- arrays in a TPU's own memory (`S(1)`) or in host memory (`S(5)`) are not counted, but moving them there or back is.

The result is a lower bound for fusions and matrix products, as a kernel may read an operand more than once; a slice that is
not recognised counts as its whole operand.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b(pred|token|opaque|[su]\d+|bf16|f\d+(?:e\w+)?|c\d+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_MOVES_NOTHING = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"))
_MOVES_NOTHING |= {"partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update", "send-done"}
_MOVES_NOTHING |= {"recv-done", "all-gather-done", "all-reduce-done", "collective-permute-done"}
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_OF_STACKS = "_4bit"  # kernels that read one matrix of a stack in place (`quant.kernels`)
_SEE_THROUGH = frozenset(("bitcast", "reshape", "copy", "convert", "transpose"))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: its name in the computation.
        opcode: its operation.
        sizes: the bytes of each array of its result; 0 for an array that is not in the device's memory.
        dtypes, shapes: those of each array of its result.
        operands: the names of its operands.
        text: its text after the operands.
        root: whether it is the result of the computation.
    """

    name: str
    opcode: str
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def size(self) -> int:
        """The bytes of the result."""
        return sum(self.sizes)

    @property
    def of_stacks(self) -> bool:
        """Whether it is a kernel of 4-bit matrices: on TPU its name contains that of the kernel, on GPU its text."""
        return self.opcode == "custom-call" and _OF_STACKS in self.name + self.text

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation that an attribute refers to, or None."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: its computations by name, with their instructions in the order of the schedule."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def loops(self, computation: str | None = None) -> Iterator[tuple[Instruction, int]]:
        """Yield (loop, how often its body runs) for the loops of a computation; of the entry if None."""
        for instruction in self.computations[computation or self.entry].values():
            if instruction.opcode == "while":
                yield instruction, self.trip_count(instruction)

    def trip_count(self, loop: Instruction) -> int:
        """Return how often the body of a loop runs; 1 if the program does not say."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = self.computations.get(loop.called("condition") or "", {})
        root = next((x for x in condition.values() if x.root), None)
        for name in root.operands if root is not None and "direction=LT" in root.text else ():
            constant = condition.get(name)
            if constant is not None and constant.opcode == "constant" and (found := re.match(r"(\d+)\)", constant.text)):
                return int(found[1])
        return 1

    def traffic(self, computation: str | None = None, *, trips: bool = True) -> int:
        """Return the bytes that a computation reads and writes.

        Args:
            computation: its name; the entry if None.
            trips: whether the body of a loop counts as often as it runs, or once.
        """
        scope = self.computations[computation or self.entry]
        total = 0
        for instruction in scope.values():
            if instruction.opcode == "while":
                body = self.traffic(instruction.called("body"), trips=trips)
                total += body * (self.trip_count(instruction) if trips else 1)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
                names = _NAME.findall(branches[1]) if branches else []
                total += max((self.traffic(name, trips=trips) for name in names if name in self.computations), default=0)
            elif instruction.opcode in ("call", "async-start") and (
                called := instruction.called("to_apply") or instruction.called("calls")
            ):
                total += self.traffic(called, trips=trips)
            else:
                total += sum(self.reads(scope, instruction)) + self.writes(scope, instruction)
        return total

    def stack_reads(self, computation: str | None = None) -> int:
        """Return the bytes that kernels read of stacks of 4-bit matrices, in loops as often as they run."""
        scope = self.computations[computation or self.entry]
        total = 0
        for instruction in scope.values():
            if instruction.opcode == "while":
                total += self.trip_count(instruction) * self.stack_reads(instruction.called("body"))
            elif instruction.opcode == "call":
                total += self.stack_reads(instruction.called("to_apply"))
            elif instruction.of_stacks:
                stacks = (scope[name] for name in instruction.operands if name in scope and _is_stack(scope[name]))
                total += sum(_layer(stack) for stack in stacks)
        return total

    def reads(self, scope: dict[str, Instruction], instruction: Instruction) -> list[int]:
        """Return the bytes that an instruction reads of each operand."""
        sizes = [scope[name].size if name in scope else 0 for name in instruction.operands]
        match instruction.opcode:
            case opcode if opcode in _MOVES_NOTHING or opcode == "while":
                return [0] * len(sizes)
            case "dynamic-slice" | "slice" | "gather" | "slice-start":
                in_memory, whole = bool(sizes and sizes[0]), self._whole(instruction)
                part = whole[1] if instruction.opcode == "slice-start" else max(whole)
                return [min(sizes[0], part) if in_memory else 0, *[0] * (len(sizes) - 1)]
            case "dynamic-update-slice":
                return [0, *sizes[1:]]
            case "custom-call" if instruction.of_stacks:
                return [_layer(scope[name]) if name in scope else 0 for name in instruction.operands]
            case "fusion":
                body = self.computations.get(instruction.called("calls") or "", {})
                return [min(size, self._read_of_parameter(body, i, size)) for i, size in enumerate(sizes)]
            case _:
                return sizes

    def writes(self, scope: dict[str, Instruction], instruction: Instruction) -> int:
        """Return the bytes that an instruction writes."""
        match instruction.opcode:
            case opcode if opcode in _MOVES_NOTHING or opcode == "while":
                return 0
            case "dynamic-update-slice":
                return min(instruction.size, _updated(scope, instruction, instruction.size))
            case "copy-start":  # (destination, source, context)
                return instruction.sizes[0]
            case "slice-start":  # ((source), destination, context)
                return instruction.sizes[1]
            case "fusion":
                body = self.computations.get(instruction.called("calls") or "", {})
                root = next((x for x in body.values() if x.root), None)
                if root is None:
                    return instruction.size
                roots = [body.get(name, root) for name in root.operands] if root.opcode == "tuple" else [root]
                return sum(min(size, _updated(body, one, size)) for size, one in zip(instruction.sizes, roots, strict=False))
            case _:
                return instruction.size

    @staticmethod
    def _whole(instruction: Instruction) -> list[int]:
        return [_bytes(*array) for array in zip(instruction.dtypes, instruction.shapes, strict=True)] or [0]

    def _read_of_parameter(self, body: dict[str, Instruction], index: int, size: int) -> int:
        """Return the bytes that a fusion reads of its operand: those of slices if only slices of it are read."""
        parameter = next((x for x in body.values() if x.opcode == "parameter" and x.text.startswith(f"{index})")), None)
        if parameter is None or size == 0:
            return size
        total, waiting = 0, [parameter.name]
        while waiting:
            name = waiting.pop()
            for user in body.values():
                if name not in user.operands:
                    continue
                if user.opcode in _SLICES and user.operands[0] == name:
                    total += max(self._whole(user))
                elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                    continue
                elif user.opcode in _SEE_THROUGH and not user.root:
                    waiting.append(user.name)
                elif user.opcode == "fusion" and (inner := self.computations.get(user.called("calls") or "")):
                    places = (place for place, operand in enumerate(user.operands) if operand == name)
                    total += sum(self._read_of_parameter(inner, place, size) for place in places)
                else:
                    return size
        return total


def _is_stack(operand: Instruction) -> bool:
    return len(operand.shapes) == 1 and len(operand.shapes[0]) == 3


def _layer(operand: Instruction) -> int:
    """Return the bytes of one matrix of an operand `[layers, ...]`, or all bytes of another operand."""
    return operand.size // operand.shapes[0][0] if _is_stack(operand) else operand.size


def _updated(body: dict[str, Instruction], root: Instruction, size: int) -> int:
    """Return the bytes that a root writes: those of a slice if it updates one in place."""
    while root.opcode in _SEE_THROUGH and root.operands and root.operands[0] in body:
        root = body[root.operands[0]]
    if root.opcode == "dynamic-update-slice" and root.operands[1] in body:
        update = body[root.operands[1]]
        return sum(_bytes(*array) for array in zip(update.dtypes, update.shapes, strict=True))
    return size


def _bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype)
    bits = int(re.findall(r"\d+", dtype)[0]) if bits is None else bits
    return math.ceil(bits * math.prod(shape) / 8)


def parse_program(text: str) -> Program:
    """Return the program of the text that `compiled.as_text()` returns.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] | None = None
    entry = None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith(
            "}, "
        ):  # not the end of some configuration within an instruction: "}}, metadata="
            current = None
        elif found := _LINE.match(line):
            root, name, result, opcode, rest = found.groups()
            arrays = list(_arrays(result))
            inside, after = _split_operands(rest)
            current[name] = Instruction(
                name=name,
                opcode=opcode,
                sizes=tuple(_bytes(dtype, shape) if near else 0 for dtype, shape, near in arrays),
                dtypes=tuple(dtype for dtype, _, _ in arrays),
                shapes=tuple(shape for _, shape, _ in arrays),
                operands=tuple(_NAME.findall(inside)) if opcode not in ("parameter", "constant") else (),
                text=rest if opcode in ("parameter", "constant") else after,
                root=root is not None,
            )
    if entry is None:
        raise ValueError("expected the text of a compiled program, found no entry")
    return Program(computations, entry)


def _arrays(result: str) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Yield (dtype, shape, whether it is in the device's memory) for each array of a result."""
    for found in _SHAPE.finditer(result):
        shape = tuple(map(int, found[2].split(","))) if found[2] else ()
        yield found[1], shape, re.search(r"S\(\d+\)", found[3] or "") is None


def _split_operands(rest: str) -> tuple[str, str]:
    depth = 1
    for index, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:index], rest[index + 1 :]
    return rest, ""
