"""The instructions of a compiled program, parsed from its text.

%fusion.7 = bf16[8192,4096]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused.7        one instruction a line
%body (p: (s32[], …)) -> (…) {   …   }                                            in computations
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
_OF_STACKS = "_4bit"  # kernels that read one matrix of a stack in place (`quant.kernels`)


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
        """The bytes of the result that are in the device's memory."""
        return sum(self.sizes)

    @property
    def all_sizes(self) -> list[int]:
        """The bytes of each array of the result, in whatever memory it is; at least one number."""
        return [array_bytes(*array) for array in zip(self.dtypes, self.shapes, strict=True)] or [0]

    @property
    def elements(self) -> list[int]:
        """The number of elements of each array of the result."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def of_stacks(self) -> bool:
        """Whether it is a kernel of 4-bit matrices: on TPU its name contains that of the kernel, on GPU its text."""
        return self.opcode == "custom-call" and _OF_STACKS in self.name + self.text

    @property
    def cycles(self) -> int | None:
        """The cycles that the TPU's compiler expects it to take; None if the compiler does not say."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        return int(found[1]) if found else None

    def called(self, attribute: str) -> str | None:
        """Return the name of the computation that an attribute refers to, or None."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """Return the names of the computations of a conditional, one of which runs."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.text)
        return _NAME.findall(found[1]) if found else []


Computation = dict[str, Instruction]  # by name, in the order of the schedule


def array_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of an array; two 4-bit values are one byte."""
    return math.ceil(_bits(dtype) * math.prod(shape) / 8)


def bytes_of(dtype: str, elements: int) -> int:
    """Return the bytes of so many elements."""
    return math.ceil(_bits(dtype) * elements / 8)


def _bits(dtype: str) -> int:
    bits = _BITS.get(dtype)
    return int(re.findall(r"\d+", dtype)[0]) if bits is None else bits


def parse_computations(text: str) -> tuple[dict[str, Computation], str]:
    """Return (the computations by name, the name of the entry) of the text that `compiled.as_text()` returns.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif line == "}" or line.startswith("}, "):  # not the end of a configuration in an instruction: "}}, metadata="
            current = None
        elif found := _LINE.match(line):
            root, name, result, opcode, rest = found.groups()
            arrays = list(_arrays(result))
            inside, after = _split_operands(rest)
            current[name] = Instruction(
                name=name,
                opcode=opcode,
                sizes=tuple(array_bytes(dtype, shape) if near else 0 for dtype, shape, near in arrays),
                dtypes=tuple(dtype for dtype, _, _ in arrays),
                shapes=tuple(shape for _, shape, _ in arrays),
                operands=tuple(_NAME.findall(inside)) if opcode not in ("parameter", "constant") else (),
                text=rest if opcode in ("parameter", "constant") else after,
                root=root is not None,
            )
    if entry is None:
        raise ValueError("expected the text of a compiled program, found no entry")
    return computations, entry


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
