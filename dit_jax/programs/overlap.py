"""Which collectives of a compiled program overlap with matrix products, according to its schedule."""

from dit_jax.programs.collectives import KINDS, Collective, channel_in_steps
from dit_jax.programs.hlo import RUNS, Computation, Instruction, Program
from dit_jax.programs.traffic import is_matmul

STRUCTURE = RUNS | {"fusion", "while"}  # their work is that of their computations


def hidden_share(program: Program, collectives: list[Collective]) -> float | None:
    """Share of the sent bytes whose transfer overlaps with matrix products; None if nothing is sent.

    A collective counts in full if a product is scheduled between its start and its end, even if the product is shorter than the
    transfer: the share is an upper bound. Other work does not count: an optimizer's update takes far less time than a gradient's
    all-reduce.
    """
    sent = sum(c.times * c.sent_bytes for c in collectives)
    names = hidden(program)
    return sum(c.times * c.sent_bytes for c in collectives if c.name in names) / sent if sent else None


def hidden(program: Program) -> set[str]:
    """Names of the collectives with a matrix product between their start and their end.

    There are two forms: a pair X-start, X-done; and a TPU's collective in steps, which appears under one channel in the fusion
    that starts it, in the fusions that it overlaps with (also in loops), and in the fusion that ends it.
    """
    held = {name: _held(program, computation) for name, computation in program.computations.items()}
    names: set[str] = set()
    overlapped: set[str] = set()
    for computation in program.computations.values():
        order = list(computation.values())
        place = {instruction.name: index for index, instruction in enumerate(order)}
        steps: dict[str, list[int]] = {}
        for index, instruction in enumerate(order):
            for _, channel in _of(instruction, held):
                if channel:
                    steps.setdefault(channel, []).append(index)
            if instruction.opcode.endswith("-done") and instruction.operands[0] in place:
                start = place[instruction.operands[0]]
                if any(_multiplies(program, i) for i in order[start + 1 : index]):
                    names |= {name for name, _ in _of(order[start], held)}
        overlapped |= {
            channel
            for channel, (first, *_, last) in ((c, p) for c, p in steps.items() if len(p) > 1)
            if any(_multiplies(program, i) for i in order[first + 1 : last])
        }
    return names | {name for pairs in held.values() for name, channel in pairs if channel in overlapped}


def _held(program: Program, computation: Computation) -> set[tuple[str, str | None]]:
    """(name, channel if executed in steps) of the collectives in a computation and in all that it calls."""
    collectives = set()
    for instruction in computation.values():
        if _communicates(instruction):
            collectives.add((instruction.name, channel_in_steps(instruction)))
        elif instruction.opcode in STRUCTURE:
            for name in instruction.called():
                collectives |= _held(program, program.computations[name])
    return collectives


def _of(instruction: Instruction, held: dict[str, set[tuple[str, str | None]]]) -> set[tuple[str, str | None]]:
    if _communicates(instruction):
        return {(instruction.name, channel_in_steps(instruction))}
    return set().union(*(held[name] for name in instruction.called())) if instruction.opcode in STRUCTURE else set()


def _communicates(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _multiplies(program: Program, instruction: Instruction) -> bool:
    """Whether the instruction is or calls a matrix product, the only work that takes as long as a transfer."""
    if instruction.opcode in STRUCTURE - {"fusion"}:
        return any(_multiplies(program, i) for name in instruction.called() for i in program.computations[name].values())
    return is_matmul(program, instruction)
