"""Bytes that a compiled program moves between HBM and a chip, loops counted as often as they run."""

from typing import NamedTuple

from dit_jax.analysis.collectives import KINDS
from dit_jax.analysis.hlo import FREE, MATMUL_CALLS, MATMULS, Computation, Instruction, Program


class Traffic(NamedTuple):
    """Bytes on one device: of instructions with a matrix product or convolution in them, and of all others."""

    matmul: int
    other: int


def hbm_traffic(program: Program) -> Traffic:
    """What every instruction reads and writes, arrays in nearer memories left out, slices counted as slices.

    An array that stays in a cache between two instructions counts twice, so that this is an upper bound on GPUs.
    """
    total = {True: 0, False: 0}
    for computation, instruction, times in program.executed():
        opcode = instruction.opcode
        if opcode in FREE or opcode.endswith("-done") or opcode == "async-start" or opcode.removesuffix("-start") in KINDS:
            continue
        matmul, moved = _cost(program, computation, instruction)
        total[matmul] += times * moved
    return Traffic(total[True], total[False])


def _hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)


def _cost(program: Program, computation: Computation, instruction: Instruction) -> tuple[bool, int]:
    """(whether it holds a matrix product, bytes)."""
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, ...) and (from, to, ...)
        to, source = instruction.arrays[:2][:: 1 if instruction.opcode == "copy-start" else -1]
        return False, to.bytes * ((not to.on_chip) + (not source.on_chip))
    if 'custom_call_target="AllocateBuffer"' in instruction.attributes:
        return False, 0
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return False, 2 * _hbm(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return False, 2 * _hbm(operands[1])
    if instruction.opcode == "fusion":
        fused = program.computations[instruction.called()[0]]
        read = sum(min(_hbm(operand), _part_read(program, fused, _parameter(fused, number), _hbm(operand)))
                   for number, operand in enumerate(operands))
        return any(_is_matmul(program, i) for i in fused.values()), read + _written(program, fused, instruction)
    return _is_matmul(program, instruction), _hbm(instruction) + sum(map(_hbm, operands))


def _is_matmul(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":
        return any(_is_matmul(program, i) for name in instruction.called() for i in program.computations[name].values())
    if instruction.opcode == "custom-call":
        return bool(MATMUL_CALLS.search(instruction.attributes))
    return instruction.opcode in MATMULS


def _parameter(computation: Computation, number: int) -> str:
    return next(i.name for i in computation.values() if i.opcode == "parameter" and i.text.strip() == str(number))


def _part_read(program: Program, computation: Computation, name: str, whole: int) -> int:
    """Bytes of the value `name` that a fused computation reads: of one that it only slices or overwrites in part, that part."""
    parts = 0
    for user in computation.values():
        for place, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.opcode == "bitcast":
                parts += _part_read(program, computation, user.name, whole)
            elif user.opcode == "fusion":
                inner = program.computations[user.called()[0]]
                parts += _part_read(program, inner, _parameter(inner, place), whole)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                parts += sum(array.bytes for array in user.arrays)
            elif user.opcode != "dynamic-update-slice" or place:
                return whole
    return parts


def _written(program: Program, fused: Computation, instruction: Instruction) -> int:
    """Bytes that a fusion writes: of a result that it updates in place, the update."""
    return sum(min(array.bytes, _update(program, fused, index, array.bytes))
               for index, array in enumerate(instruction.arrays) if not array.on_chip)


def _update(program: Program, fused: Computation, index: int, whole: int) -> int:
    result = next(i for i in fused.values() if i.root)
    if result.opcode == "tuple":
        result, index = fused[result.operands[index]], 0
    while result.opcode == "bitcast" and result.operands[0] in fused:
        result = fused[result.operands[0]]
    if result.opcode == "fusion":
        return _update(program, program.computations[result.called()[0]], index, whole)
    if result.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in fused[result.operands[1]].arrays)
    return whole
