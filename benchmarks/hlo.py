"""Reads the text of a compiled TPU program: its loops, XLA's estimated cycles, and the copies in them."""

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

ROUND, CHUNK, STEP = 1, 2, 3  # how deep loops lie in a program of rounds

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")
_MOVES = {"copy", "copy-start", "transpose", "reshape"}
_FREE = {"bitcast", "parameter", "constant", "tuple", "get-tuple-element"}


class Instruction(NamedTuple):
    """One line of HLO: ``name = shape opcode(...)``, XLA's estimate of its cycles, and what it calls."""

    name: str
    shape: str
    opcode: str
    cycles: int
    calls: tuple[str, ...]
    condition: str = ""
    constant: int = 0

    @property
    def nbytes(self) -> float:
        """Of its result; of a tuple's first array."""
        found = _ARRAY.search(self.shape)
        if found is None:
            return 0.0
        bits = int(found[2] or 8)  # pred has none
        return bits / 8 * math.prod(int(d) for d in found[3].split(",") if d)


class Program:
    """The computations of a compiled program's text.

    Attributes:
      computations: instructions by the computation's name.
      depth: how many loops each loop's body lies in, itself included.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = collections.defaultdict(list)
        name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[1]
            elif found := _INSTRUCTION.match(line):
                self.computations[name].append(_instruction(line, *found.groups()))
        outer = {
            called: name
            for name, body in self.computations.items()
            for one in body
            if one.opcode in ("while", "call", "conditional")
            for called in one.calls
        }
        loops = {one.calls[0] for body in self.computations.values() for one in body if one.opcode == "while"}

        def depth(name: str) -> int:
            return (name in loops) + (depth(outer[name]) if name in outer else 0)

        self.depth = {name: depth(name) for name in loops}

    def step(self) -> str:
        """The body of the loop over a client's local steps: of those so deep, the costliest."""
        return max((name for name, d in self.depth.items() if d == STEP), key=self.cycles)

    def cycles(self, name: str, profile: Mapping[str, int] | None = None) -> int:
        """Estimated cycles of a computation, with the loops in it as often as they turn.

        With a ``profile`` they are its cycles, and the estimates where it has none.
        """
        return sum(self._cost(one, profile) for one in self.computations[name])

    def copies(self, name: str) -> int:
        """Estimated cycles of what only moves data in a computation."""
        nested = (
            self._turns(one) * self.copies(called)
            for one in self.computations[name]
            if one.opcode in ("while", "call")
            for called in one.calls
        )
        return sum(self._cost(one, None) for one in self.computations[name] if self._moves(one)) + sum(nested)

    def largest_copy(self) -> float:
        """Bytes of the largest array that is only moved inside a loop."""
        bodies = (one for name in self.depth for one in self._inside(name))
        return max((one.nbytes for one in bodies if self._moves(one)), default=0.0)

    def largest_in_loops(self) -> float:
        """Bytes of the largest array that is made inside a loop in any way."""
        bodies = (one for name in self.depth for one in self._inside(name))
        return max((one.nbytes for one in bodies if one.opcode not in _FREE | {"while", "conditional"}), default=0.0)

    def _inside(self, name: str) -> Iterator[Instruction]:
        """Instructions of a computation and of those that it calls, fusions left out."""
        for one in self.computations[name]:
            yield one
            if one.opcode in ("call", "conditional"):
                for called in one.calls:
                    yield from self._inside(called)

    def _moves(self, one: Instruction) -> bool:
        if one.opcode in _MOVES:
            return True
        inside = {x.opcode for called in one.calls for x in self.computations[called]}
        return one.opcode == "fusion" and bool(inside & _MOVES) and inside <= _MOVES | _FREE

    def _cost(self, one: Instruction, profile: Mapping[str, int] | None) -> int:
        if one.opcode == "while":
            return self._turns(one) * self.cycles(one.calls[0], profile)
        if one.opcode == "conditional":
            return max(self.cycles(called, profile) for called in one.calls)
        if one.opcode == "call":
            return self.cycles(one.calls[0], profile)
        return one.cycles if profile is None else profile.get(one.name, one.cycles)

    def _turns(self, one: Instruction) -> int:
        """The constant that a loop's counter is compared with; 1 if its length is not known."""
        constants = [x.constant for x in self.computations[one.condition] if x.opcode == "constant"] or [1]
        return max(1, *constants)


def _instruction(line: str, name: str, shape: str, opcode: str, rest: str) -> Instruction:
    cycles = re.search(r'estimated_cycles":"(\d+)"', line)
    calls = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
        calls += [x.strip().lstrip("%") for x in branches[1].split(",")]
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    constant = re.match(r"(\d+)\)", rest) if opcode == "constant" and shape.startswith("s32[]") else None
    return Instruction(
        *(name, shape, opcode, int(cycles[1]) if cycles else 0, tuple(calls)),
        *(condition[1] if condition else "", int(constant[1]) if constant else 0),
    )
