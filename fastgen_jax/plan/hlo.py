"""What an optimized program does, read from its text."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# An asynchronous collective is counted where it starts.
_COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)
_SUM = re.compile(r"(?:all-reduce|reduce-scatter)(?:-start)?")
_FLOATS = re.compile(r"\bb?f\d+")
_LOOKUP = re.compile(r'op_name="[^"]*/gather"')
_CALLED = re.compile(r"\b(?:to_apply|calls)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_LOOP = re.compile(r" while\(.*\bbody=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# These run nothing: names for parts of other results, or the end of what was started before.
_NO_WORK = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "after-all"}
_ON_CHIP = ("S(1)", "S(3)")  # VMEM, and the common memory of a v4


class _Array(NamedTuple):
    shape: tuple[int, ...]
    bytes: int
    on_chip: bool  # on a TPU: in `_ON_CHIP`, where weights are meant to go


class _Instruction(NamedTuple):
    name: str
    result: str  # its type
    operation: str
    line: str

    @property
    def arrays(self) -> list[_Array]:
        """The arrays of the result."""
        found = []
        for kind, rest, dims, layout in _ARRAY.findall(self.result):
            shape = tuple(map(int, filter(None, dims.split(","))))
            bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
            del rest  # as in f8e4m3fn
            found.append(_Array(shape, max(1, math.prod(shape) * bits // 8), any(space in layout for space in _ON_CHIP)))
        return found


class Copy(NamedTuple):
    """An array of the shape of a weight that a program writes to memory."""

    name: str
    bytes: int
    times: int
    """How often in a step."""


def copied_weights(hlo: str, shapes: Iterable[tuple[int, ...]]) -> list[Copy]:
    """Every result of the shape of a weight, in any order of its axes and padded to whole tiles, to 8 or not, largest first.

    A program should read its weights where they are: such a result is a slice of a stack, a conversion, a copy in another
    layout, or a padded copy. On a TPU, prefetches into memory on the chip do not count.

    Args:
      shapes: those of the weights on one device, of one layer and of all.
    """
    wanted = {_axes(form) for shape in shapes for form in forms(shape)}
    copies = []
    for computation, times in _executed(hlo).items():
        for instruction in _instructions(hlo).get(computation, ()):
            if instruction.operation in _NO_WORK or not _may_copy(instruction):
                continue
            largest = max((a.bytes for a in instruction.arrays if _axes(a.shape) in wanted and not a.on_chip), default=0)
            if largest:
                copies.append(Copy(instruction.name, largest, times))
    return sorted(copies, key=lambda copy: -copy.bytes * copy.times)


def copied_arrays(hlo: str, shapes: Iterable[tuple[int, ...]]) -> list[Copy]:
    """Every copy of an array of one of these shapes, such as that of a whole cache into another layout.

    What a TPU fetches into VMEM as a whole, or writes back from it, does not count.
    """
    wanted, copies = set(shapes), []
    for computation, times in _executed(hlo).items():
        for instruction in _instructions(hlo).get(computation, ()):
            is_copy = instruction.operation in ("copy", "copy-start") or (
                instruction.operation == "fusion" and re.search(r"calls=%?[\w.\-]*(copy|transpose)", instruction.line)
            )
            starts = instruction.operation == "copy-start"  # its result is (copy, original, ...)
            if is_copy and not (starts and any(a.on_chip for a in instruction.arrays)):
                sizes = [a.bytes for a in instruction.arrays if a.shape in wanted and not a.on_chip]
                copies += [Copy(instruction.name, max(sizes), times)] if sizes else []
    return copies


def relaid_rows(hlo: str, num_rows: int, row: int) -> list[str]:
    """What a TPU writes of `num_rows` rows with `row` numbers each in another layout than that of a product.

    That is, with the numbers of one row no longer adjacent in memory, or in other tiles: as one axis, or cut into pieces.
    """
    found = []
    for computation in _executed(hlo):
        for instruction in _instructions(hlo).get(computation, ()):
            if instruction.operation in _NO_WORK:
                continue
            for _, _, dims, layout in _ARRAY.findall(instruction.result):
                shape = tuple(map(int, filter(None, dims.split(","))))
                if math.prod(shape) != num_rows * row:
                    continue
                adjacent = shape[int(layout.split(":")[0].split(",")[0])] if layout else shape[-1]
                if len(shape) == 1 or adjacent == num_rows or instruction.operation in ("reshape", "transpose"):
                    found.append(instruction.name)
    return list(dict.fromkeys(found))


def _axes(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))


def forms(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The shapes that a copy of a weight may have, apart from the order of the axes.

    One or both of the last two axes may be padded to tiles of the kernels, 128 numbers, or of cuBLAS, 8.
    """
    *stack, rows, columns = shape
    for tile in (128, 8):
        for last in itertools.product(*({n, -(-n // tile) * tile} for n in (rows, columns))):
            yield *stack, *last


def _may_copy(instruction: _Instruction) -> bool:
    """Whether the instruction computes its results, instead of passing on or updating arrays that exist."""
    passes_on = {"while", "conditional", "call", "custom-call", "optimization-barrier", "dynamic-update-slice"}
    if instruction.operation in passes_on or instruction.operation.endswith("-start"):
        return False
    return "__custom_fusion" not in instruction.line  # a library's product, with a slice of its operand as an address


def operations_per_layer(hlo: str) -> int:
    """How many operations the loop over layers runs: of all loops, the one with the most. On a GPU, kernel launches.

    Layers of different kinds that follow one another are one body; a loop in it is one operation.
    """
    computations = _instructions(hlo)
    return max((_operations(computations[body]) for body in _bodies(hlo)), default=0)


def operations_of_inner_loops(hlo: str) -> int:
    """How many operations the loops in that body run in all their passes; of those of unknown length, in one pass."""
    computations = _instructions(hlo)

    def inside(body: str) -> int:
        total = 0
        for instruction in computations.get(body, ()):
            loop = _LOOP.search(instruction.line)
            if loop is not None:
                trips = _TRIPS.search(instruction.line)
                passes = int(trips[1]) if trips else 1
                total += passes * (_operations(computations.get(loop[1], [])) + inside(loop[1]))
        return total

    return inside(_layer_body(hlo)) if _bodies(hlo) else 0


def _layer_body(hlo: str) -> str:
    computations = _instructions(hlo)
    return max(_bodies(hlo), key=lambda body: _operations(computations[body]))


def layer_instructions(hlo: str) -> list[str]:
    """What the loop over layers computes, without the names of its values: two programs with equal lists round alike."""
    found = []
    for _, instruction in _of_layer(hlo):
        if instruction.operation not in _NO_WORK:
            line = re.sub(r", metadata=\{[^}]*\}", "", instruction.line)
            found.append(re.sub(r"%[\w.\-]+|calls=[\w.\-]+|to_apply=[\w.\-]+|/\*[^*]*\*/", "", line).strip())
    return sorted(found)


def layer_products(hlo: str) -> list[tuple[str, ...]]:
    """The element types of both operands of every product of matrices in the loop over layers, such as ("s8", "s8").

    Those are the types that the matrix units multiply: a weight that is converted before has the type that it is given.
    """
    return sorted(types for name, types in _operand_types(hlo, ("convolution", "dot")))


def layer_kernels(hlo: str, name: str) -> list[tuple[str, ...]]:
    """The element types of all operands of every call of a Pallas kernel of this name in the loop over layers."""
    return sorted(types for found, types in _operand_types(hlo, ("custom-call",)) if found.startswith(name))


def _operand_types(hlo: str, operations: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name, element types of the operands) of these operations in the loop over layers."""
    computations = _instructions(hlo)
    for computation, instruction in _of_layer(hlo):
        if instruction.operation in operations:
            rest = instruction.line.partition(f" {instruction.operation}")[2]
            types = {other.name: other.result.partition("[")[0] for other in computations[computation]}
            operands = re.findall(r"%([\w.\-]+)", rest[: _balanced(rest)])
            yield instruction.name, tuple(types[operand] for operand in operands)


def _of_layer(hlo: str) -> Iterator[tuple[str, _Instruction]]:
    """The instructions of the loop over layers and of what it calls, each with the name of its computation."""
    computations = _instructions(hlo)
    pending = [_layer_body(hlo)]
    seen = set(pending)
    while pending:
        name = pending.pop()
        for instruction in computations.get(name, ()):
            called = set(_CALLED.findall(instruction.line)) - seen
            seen |= called
            pending += called
            yield name, instruction


def _operations(instructions: list[_Instruction]) -> int:
    return sum(
        instruction.operation not in _NO_WORK and not instruction.operation.endswith("-done") for instruction in instructions
    )


def waits(hlo: str) -> int:
    """How often a GPU's host has to read a value before it can launch the rest of a step.

    That is, branches, and loops whose number of passes is not known when the program is compiled.
    """
    executed, computations = _executed(hlo), _instructions(hlo)
    return sum(
        instruction.operation == "conditional" or (instruction.operation == "while" and not _TRIPS.search(instruction.line))
        for name in executed
        for instruction in computations.get(name, ())
    )


def count_in_loops(hlo: str) -> int:
    """How many collectives the loop over layers of an optimized program runs: of all loops, the one with the most.

    Some backends put collectives into separate computations that the loop calls; TPU7x does, for its SparseCores.
    """
    counts: dict[str, int] = {}
    calls: dict[str, list[str]] = {}
    for name, line in _lines(hlo):
        counts[name] = counts.get(name, 0) + bool(_COLLECTIVE.search(line))
        if "-done(" not in line:  # counted where it started
            calls.setdefault(name, []).extend(_CALLED.findall(line))

    @functools.cache
    def total(name: str) -> int:
        return counts.get(name, 0) + sum(map(total, calls.get(name, ())))

    return max(map(total, _bodies(hlo)), default=0)


def sums_of_floats(hlo: str) -> list[str]:
    """The instructions that add up floating-point numbers over devices in an order that a compiler or a library chooses.

    Without those of lookups in a divided table: all devices but one add zeros, which is exact in any order.
    """
    found = (instruction for _, line in _lines(hlo) if (instruction := _parsed(line)) is not None)
    return [
        instruction.line.strip()
        for instruction in found
        if _SUM.fullmatch(instruction.operation)
        and _FLOATS.search(instruction.result)
        and not _LOOKUP.search(instruction.line)
    ]


def _executed(hlo: str) -> dict[str, int]:
    """The computations whose instructions run one after another, with how often: the program, its loops and branches."""
    computations = _instructions(hlo)
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    executed: dict[str, int] = {}
    pending = [(entry[1], 1)] if entry else []
    while pending:
        name, times = pending.pop()
        executed[name] = max(times, executed.get(name, 0))
        for instruction in computations.get(name, ()):
            if instruction.operation == "while":
                trips = _TRIPS.search(instruction.line)
                passes = times * int(trips[1]) if trips else times
                pending += [(body, passes) for body in re.findall(r"\bbody=%?([\w.\-]+)", instruction.line)]
            elif instruction.operation == "conditional":
                branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.line)
                for listed in re.findall(r"branch_computations=\{([^}]*)\}", instruction.line):
                    branches += re.findall(r"%?([\w.\-]+)", listed)
                pending += [(branch, times) for branch in branches]
            elif instruction.operation == "call":
                pending += [(called, times) for called in _CALLED.findall(instruction.line)]
    return executed


@functools.lru_cache(maxsize=1)
def _instructions(hlo: str) -> dict[str, list[_Instruction]]:
    """The instructions of each computation."""
    computations: dict[str, list[_Instruction]] = {}
    for name, line in _lines(hlo):
        instruction = _parsed(line)
        if instruction is not None:
            computations.setdefault(name, []).append(instruction)
    return computations


def _parsed(line: str) -> _Instruction | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _balanced(rest) if rest.startswith("(") else rest.find(" ")
    operation = re.match(r" ([\w\-]+)\(", rest[end:])
    return None if operation is None else _Instruction(head[1], rest[:end], operation[1], line)


def _balanced(text: str) -> int:
    """The length of the parenthesis with which `text` begins."""
    depth = 0
    for i, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return i + 1
    return len(text)


def _lines(hlo: str) -> Iterator[tuple[str, str]]:
    """Each line of a program, with the name of the computation that contains it."""
    name = ""
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[1]
        yield name, line


def _bodies(hlo: str) -> set[str]:
    return {body for body in _LOOP.findall(hlo) if body in _instructions(hlo)}
