"""Parses the HLO text of a compiled program: its instructions, their shapes and how often each is executed.

XLA's own cost analysis counts the body of a loop once. Here a body counts once per iteration.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

ITEM_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
    "c128": 16,
    "token": 0,
}
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^{}]*\}|%?[\w.\-]+)"
)
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "domain",
    "add-dependency",
}
HEADER = re.compile(r"(?:ENTRY\s+)?%?([\w.\-]+)\s*\(")
RUNS = {"call", "conditional", "async-start", "call-start"}  # run their computations once per execution
MATMULS = {"dot", "convolution", "ragged-dot"}
MATMUL_CALLS = re.compile(r'custom_call_target="[^"]*(gemm|matmul|fmha|conv|attention|tpu_custom_call)', re.IGNORECASE)
ATTENTION_CALLS = re.compile(r'custom_call_target="[^"]*(fmha|attention)', re.IGNORECASE)


@dataclass(frozen=True)
class Array:
    """One array of a shape; `on_chip` if the compiler placed it in on-chip memory instead of HBM (a TPU's VMEM)."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool

    @property
    def bytes(self) -> int:
        size = ITEM_BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else None)
        if size is None:
            raise ValueError(f"the size of the element type {self.dtype!r} is unknown: add it to ITEM_BYTES")
        return math.ceil(size * math.prod(self.dims))


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Fields:
        arrays: of the result, one for each leaf of a tuple.
        operands: names of instructions of the same computation.
        text: the text in the parentheses: the number of a parameter, the value of a constant.
        attributes: the text after them.
    """

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    root: bool

    def called(self) -> tuple[str, ...]:
        """Names of the computations that the instruction calls."""
        return tuple(
            name.strip().lstrip("%")
            for group in CALLED.findall(self.attributes)
            for name in group.strip("{}").split(",")
            if name.strip()
        )


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Program:
    """An HLO module: its computations and the name of the entry."""

    computations: dict[str, Computation]
    entry: str

    def trip_count(self, loop: Instruction) -> int | None:
        """Number of iterations of a `while`; None if the program does not determine it.

        It is known if XLA noted it, or if the loop is `for i = start; i < limit; i += step` with three constants. The step is
        not always 1: a TPU's windowed products are unrolled by 2.
        """
        if match := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.attributes):
            return int(match[1])
        condition, body = (self.computations[named(loop, name)] for name in ("condition", "body"))
        test, result = root_of(condition), root_of(body)
        if test.opcode != "compare" or "direction=LT" not in test.attributes or result.opcode != "tuple":
            return None
        place = element_of(condition, test.operands[0])
        caller = next(c for c in self.computations.values() if c.get(loop.name) is loop)
        given = caller[loop.operands[0]]
        if place is None or given.opcode != "tuple":
            return None
        start, limit = constant_of(caller, given.operands[place]), constant_of(condition, test.operands[1])
        following = behind_copies(body, result.operands[place])
        if following.opcode != "add" or element_of(body, following.operands[0]) != place:
            return None
        step = constant_of(body, following.operands[1])
        if start is None or limit is None or step is None:
            return None
        return max(0, -(-(limit - start) // step))

    def executed(self, into_fusions: bool = False) -> Iterator[tuple[Computation, Instruction, int]]:
        """Yields (computation, instruction, number of executions) of all executed instructions; every branch of a conditional.

        The body of a loop with an unknown trip count counts once.
        """
        yield from self._executed(self.entry, 1, into_fusions)

    def _executed(self, name: str, times: int, into_fusions: bool) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.opcode == "while":
                yield from self._executed(named(instruction, "body"), times * (self.trip_count(instruction) or 1), into_fusions)
            elif instruction.opcode in RUNS or (into_fusions and instruction.opcode == "fusion"):
                for called in instruction.called():
                    yield from self._executed(called, times, into_fusions)

    def unknown_loops(self) -> list[str]:
        """Names of the loops with an unknown trip count."""
        return [i.name for _, i, _ in self.executed() if i.opcode == "while" and self.trip_count(i) is None]


def named(instruction: Instruction, attribute: str) -> str:
    """The name of the computation in an attribute.

    Raises:
        ValueError: the instruction has no such attribute.
    """
    match = re.search(rf"\b{attribute}=%?([\w.\-]+)", instruction.attributes)
    if match is None:
        raise ValueError(f"the instruction {instruction.name} has no {attribute}= in {instruction.attributes!r}")
    return match[1]


def root_of(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def behind_copies(computation: Computation, name: str) -> Instruction:
    """The instruction that produces a value, skipping copies and bitcasts."""
    while computation[name].opcode in ("copy", "bitcast"):
        name = computation[name].operands[0]
    return computation[name]


def constant_of(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, or None."""
    source = behind_copies(computation, name)
    return int(source.text) if source.opcode == "constant" and re.fullmatch(r"-?\d+", source.text) else None


def element_of(computation: Computation, name: str) -> int | None:
    """The index at which a value is taken from a tuple, or None."""
    source = behind_copies(computation, name)
    index = re.search(r"index=(\d+)", source.attributes)
    return int(index[1]) if index and source.opcode == "get-tuple-element" else None


def parse(text: str) -> Program:
    """Parses `compiled.as_text()`.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if line.startswith("}"):
            current = None
        elif line.rstrip().endswith("{") and (header := HEADER.match(line)):
            name = header[1]
            current = computations[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text has no ENTRY computation: it is not the output of compiled.as_text()")
    return Program(computations, entry)


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"an HLO instruction has an unclosed parenthesis: {text[:200]}")


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    text = rest[opening + 1 : closing]
    return Instruction(
        name.removeprefix("ROOT ").lstrip("%"),
        arrays(shape),
        rest[:opening].strip(),
        tuple(re.findall(r"%([\w.\-]+)", text)),
        text,
        rest[closing + 1 :],
        name.startswith("ROOT "),
    )


def arrays(shape: str) -> tuple[Array, ...]:
    """The leaves of a printed shape: "(f32[2,3]{1,0}, s32[])" -> two arrays."""
    return tuple(
        Array(dtype, tuple(int(n) for n in re.sub(r"[<=]", "", dims).split(",") if n), "S(" in (layout or ""))
        for dtype, dims, layout in ARRAY.findall(shape)
    )
