"""Which collectives of a compiled program run beside matrix products: its schedule, read for what is between start and end."""

from dit_jax.programs.collectives import KINDS, Collective, channel_in_steps
from dit_jax.programs.hlo import RUNS, Computation, Instruction, Program
from dit_jax.programs.traffic import is_matmul

STRUCTURE = RUNS | {"fusion", "while"}  # what they do is what their computations do


def hidden_share(program: Program, found: list[Collective]) -> float | None:
    """Of the bytes that `found` sends, the part that travels beside matrix products; None where nothing is sent.

    A collective counts whole if a product is scheduled between its start and its end, be it shorter than the transfer: an upper
    bound. Other work does not count: an optimizer's update is over long before a gradient's sum.
    """
    sent = sum(c.times * c.sent_bytes for c in found)
    names = hidden(program)
    return sum(c.times * c.sent_bytes for c in found if c.name in names) / sent if sent else None


def hidden(program: Program) -> set[str]:
    """Names of the collectives with a matrix product between their start and their end.

    Two forms: a pair X-start, X-done; and a TPU's collective in steps, which stands under one channel in a fusion that begins it,
    in those that it runs beside, also in loops, and in one that ends it.
    """
    held = {name: _held(program, computation) for name, computation in program.computations.items()}
    found: set[str] = set()
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
                    found |= {name for name, _ in _of(order[start], held)}
        overlapped |= {
            channel
            for channel, (first, *_, last) in ((c, p) for c, p in steps.items() if len(p) > 1)
            if any(_multiplies(program, i) for i in order[first + 1 : last])
        }
    return found | {name for pairs in held.values() for name, channel in pairs if channel in overlapped}


def _held(program: Program, computation: Computation) -> set[tuple[str, str | None]]:
    """(name, channel if carried out in steps) of the collectives in a computation and in all that it runs."""
    found = set()
    for instruction in computation.values():
        if _communicates(instruction):
            found.add((instruction.name, channel_in_steps(instruction)))
        elif instruction.opcode in STRUCTURE:
            for name in instruction.called():
                found |= _held(program, program.computations[name])
    return found


def _of(instruction: Instruction, held: dict[str, set[tuple[str, str | None]]]) -> set[tuple[str, str | None]]:
    if _communicates(instruction):
        return {(instruction.name, channel_in_steps(instruction))}
    return set().union(*(held[name] for name in instruction.called())) if instruction.opcode in STRUCTURE else set()


def _communicates(instruction: Instruction) -> bool:
    return instruction.opcode.removesuffix("-start") in KINDS


def _multiplies(program: Program, instruction: Instruction) -> bool:
    """Whether it is or runs a matrix product: what lasts as long as a transfer does."""
    if instruction.opcode in STRUCTURE - {"fusion"}:
        return any(_multiplies(program, i) for name in instruction.called() for i in program.computations[name].values())
    return is_matmul(program, instruction)
