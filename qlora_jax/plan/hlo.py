"""A compiled program: its loops, the bytes that it moves, and the cycles that the compiler expects.

XLA's own count of bytes takes the body of a loop once, and for a GPU that is not attached it has no count. Here every
instruction that runs reads its operands and writes its result once, with these rules:

- the body of a loop counts as often as it runs (`known_trip_count`, or the constant that its condition compares with);
- an instruction that only slices an operand reads the slice, and one that updates a slice writes the slice; in a fusion,
  the elements that its results need count (`plan.fusions`);
- the kernels of 4-bit matrices read one layer of the stacks that are their operands;
- arrays in a TPU's own memory (`S(1)`) or in host memory (`S(5)`) are not counted, but moving them there or back is.

The result is a lower bound for matrix products, as a kernel may read an operand more than once.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from qlora_jax.plan.fusions import SLICES, parameter_reads, result_writes, updates, written
from qlora_jax.plan.instructions import Computation, Instruction, parse_computations

_MOVES_NOTHING = frozenset(("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"))
_MOVES_NOTHING |= {"partition-id", "replica-id", "copy-done", "slice-done", "async-done", "async-update", "send-done"}
_MOVES_NOTHING |= {"recv-done", "all-gather-done", "all-reduce-done", "collective-permute-done"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: its computations by name, with their instructions in the order of the schedule."""

    computations: dict[str, Computation]
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

    def total(
        self,
        count: Callable[[Computation, Instruction], int],
        computation: str | None = None,
        *,
        trips: bool = True,
    ) -> int:
        """Return the sum of `count` over the instructions that run.

        Args:
            count: returns a number for a computation and one of its instructions.
            computation: the name of the computation; the entry if None.
            trips: whether the body of a loop counts as often as it runs, or once.
        """
        scope = self.computations[computation or self.entry]
        found = 0
        for instruction in scope.values():
            called = instruction.called("to_apply") or instruction.called("calls")
            if instruction.opcode == "while":
                body = self.total(count, instruction.called("body"), trips=trips)
                found += body * (self.trip_count(instruction) if trips else 1)
            elif instruction.opcode == "conditional":
                branches = (name for name in instruction.branches() if name in self.computations)
                found += max((self.total(count, name, trips=trips) for name in branches), default=0)
            elif instruction.opcode in ("call", "async-start") and called in self.computations:
                found += self.total(count, called, trips=trips)
            else:
                found += count(scope, instruction)
        return found

    def traffic(self, computation: str | None = None, *, trips: bool = True) -> int:
        """Return the bytes that a computation reads and writes; see `total` for the arguments."""
        return self.total(lambda scope, x: sum(self.reads(scope, x)) + self.writes(scope, x), computation, trips=trips)

    def stack_reads(self) -> int:
        """Return the bytes that kernels read of stacks of 4-bit matrices, in loops as often as they run."""

        def count(scope: Computation, instruction: Instruction) -> int:
            operands = (scope[name] for name in instruction.operands if name in scope) if instruction.of_stacks else ()
            return sum(_layer(operand) for operand in operands if _is_stack(operand))

        return self.total(count)

    def cycles(self) -> int | None:
        """Return the cycles that the compiler of a TPU expects one run to take; None if it expects none.

        The compiler has no expectation for a kernel that it does not know (`unknown_kernels`).
        """
        return self.total(lambda _, instruction: instruction.cycles or 0) or None

    def unknown_kernels(self) -> int:
        """Return how often kernels run of whose time the compiler of a TPU has no expectation."""
        return self.total(lambda _, x: int(x.opcode == "custom-call" and "tpu_custom_call" in x.text and x.cycles is None))

    def reads(self, scope: Computation, instruction: Instruction) -> list[int]:
        """Return the bytes that an instruction reads of each operand."""
        sizes = [scope[name].size if name in scope else 0 for name in instruction.operands]
        if updates(self.computations, instruction) is not None:
            return [0, *sizes[1:]]
        match instruction.opcode:
            case opcode if opcode in _MOVES_NOTHING or opcode == "while":
                return [0] * len(sizes)
            case opcode if opcode in SLICES or opcode == "slice-start":
                in_memory, whole = bool(sizes and sizes[0]), instruction.all_sizes
                part = whole[1] if opcode == "slice-start" else max(whole)
                return [min(sizes[0], part) if in_memory else 0, *[0] * (len(sizes) - 1)]
            case "custom-call" if instruction.of_stacks:
                return [_layer(scope[name]) if name in scope else 0 for name in instruction.operands]
            case "fusion" if (called := instruction.called("calls")) in self.computations:
                found = parameter_reads(self.computations, called)
                return [min(size, found.get(place, 0)) for place, size in enumerate(sizes)]
            case _:
                return sizes

    def writes(self, scope: Computation, instruction: Instruction) -> int:
        """Return the bytes that an instruction writes."""
        if updates(self.computations, instruction) is not None:
            return min(instruction.size, written(self.computations, scope, instruction))
        match instruction.opcode:
            case opcode if opcode in _MOVES_NOTHING or opcode == "while":
                return 0
            case "copy-start":  # (destination, source, context)
                return instruction.sizes[0]
            case "slice-start":  # ((source), destination, context)
                return instruction.sizes[1]
            case "fusion":
                found = result_writes(self.computations, instruction.called("calls") or "")
                return instruction.size if found is None else sum(map(min, instruction.sizes, found))
            case _:
                return instruction.size


def _is_stack(operand: Instruction) -> bool:
    return len(operand.shapes) == 1 and len(operand.shapes[0]) == 3


def _layer(operand: Instruction) -> int:
    """Return the bytes of one matrix of an operand `[layers, ...]`, or all bytes of another operand."""
    return operand.size // operand.shapes[0][0] if _is_stack(operand) else operand.size


def parse_program(text: str) -> Program:
    """Return the program of the text that `compiled.as_text()` returns.

    Raises:
        ValueError: the text has no entry computation.
    """
    return Program(*parse_computations(text))
