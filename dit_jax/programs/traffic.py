"""Bytes that a compiled program moves between HBM and the chip, with loops counted once per iteration."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dit_jax.programs.collectives import KINDS
from dit_jax.programs.hlo import ATTENTION_CALLS, FREE, MATMUL_CALLS, MATMULS, RUNS, Computation, Instruction, Program

# Instructions that compute nothing. A fusion of only these and scalar instructions is a copy.
MOVES = {
    "parameter",
    "constant",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "copy",
    "copy-start",
    "slice-start",
    "transpose",
    "reshape",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "broadcast",
    "pad",
    "convert",
}
STRUCTURE = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation"}


class Traffic(NamedTuple):
    """HBM bytes of one device, for instructions that contain a matrix product or convolution and for all others."""

    matmul: int
    other: int


class Work(NamedTuple):
    """One executed instruction (on a GPU, a kernel).

    Fields:
        kind: "products", "attention" (a fused kernel), "copies" (a scan's stacks, slices, fills, casts, layouts), "arithmetic".
        place: pass and module of the network, such as "backward blocks/mlp/in"; for a fusion, those of its result.
        bytes: read and written per execution.
        times: number of executions.
    """

    kind: str
    place: str
    bytes: int
    times: int


def works(program: Program) -> Iterator[Work]:
    """Yields the HBM traffic of every instruction; on-chip arrays do not count, slices count as slices.

    An array that stays in a cache between two instructions counts twice, so that this is an upper bound on GPUs.
    """
    for computation, instruction, times in program.executed():
        if instruction.opcode in FREE | RUNS or instruction.opcode.endswith("-done") or only_communicates(program, instruction):
            continue
        matmul, moved = _cost(program, computation, instruction)
        yield Work(_kind(program, instruction, matmul), place(instruction), moved, times)


def only_communicates(program: Program, instruction: Instruction) -> bool:
    """Whether the instruction is a collective, the start of one, or a fusion of nothing else (the form on TPUs)."""
    if instruction.opcode == "fusion":
        inside = [i for i in program.computations[instruction.called()[0]].values() if i.opcode not in MOVES | {"custom-call"}]
        return bool(inside) and all(only_communicates(program, i) for i in inside)
    return instruction.opcode.removesuffix("-start") in KINDS


def hbm_traffic(program: Program) -> Traffic:
    """Total bytes of `works`, split as the roofline model needs them."""
    total = {True: 0, False: 0}
    for work in works(program):
        total[work.kind in ("products", "attention")] += work.times * work.bytes
    return Traffic(total[True], total[False])


def by_place(program: Program) -> list[dict[str, Any]]:
    """Totals per kind and place, {"kind", "place", "kernels", "bytes"}, in descending order of bytes."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for work in works(program):
        row = rows.setdefault((work.kind, work.place), {"kind": work.kind, "place": work.place, "kernels": 0, "bytes": 0})
        row["kernels"] += work.times
        row["bytes"] += work.times * work.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def place(instruction: Instruction) -> str:
    """Pass ("forward", "backward", "again" if rematerialised, otherwise "step") and module path of an instruction."""
    match = re.search(r'op_name="([^";]*)', instruction.attributes)
    *parts, _ = match[1].split("/") if match else [""]
    name = "/".join(parts)
    when = (
        "again"
        if "rematted_computation" in name
        else "backward"
        if "transpose(" in name
        else "forward"
        if "jvp(" in name
        else "step"
    )
    # Linen names a method other than __call__ "Class.method", beside the path of modules.
    modules = [part for part in parts if "(" not in part and part not in STRUCTURE and "." not in part]
    return " ".join([when, "/".join(modules) or ("loop" if "while" in parts else "other")])


def _kind(program: Program, instruction: Instruction, matmul: bool) -> str:
    if instruction.opcode == "custom-call" and ATTENTION_CALLS.search(instruction.attributes):
        return "attention"
    if matmul:
        return "products"
    inside = program.computations[instruction.called()[0]].values() if instruction.opcode == "fusion" else (instruction,)
    moves = all(i.opcode in MOVES or all(not a.dims for a in i.arrays) for i in inside)
    return "copies" if moves else "arithmetic"


def _hbm(instruction: Instruction) -> int:
    return sum(array.bytes for array in instruction.arrays if not array.on_chip)


def _cost(program: Program, computation: Computation, instruction: Instruction) -> tuple[bool, int]:
    """(whether the instruction contains a matrix product, its bytes)."""
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
        read = sum(
            min(_hbm(operand), _part_read(program, fused, _parameter(fused, number), _hbm(operand)))
            for number, operand in enumerate(operands)
        )
        return any(is_matmul(program, i) for i in fused.values()), read + _written(program, fused, instruction)
    written = _hbm(instruction)
    if instruction.opcode == "custom-call" and len(instruction.arrays) > 1 and instruction.arrays[-1].dtype in ("s8", "u8"):
        written -= instruction.arrays[-1].bytes  # the workspace of cuBLAS and cuDNN, used only in part
    return is_matmul(program, instruction), written + sum(map(_hbm, operands))


def is_matmul(program: Program, instruction: Instruction) -> bool:
    """Whether the instruction is a matrix product or a convolution, or a fusion that contains one."""
    if instruction.opcode == "fusion":
        return any(is_matmul(program, i) for name in instruction.called() for i in program.computations[name].values())
    if instruction.opcode == "custom-call":
        return bool(MATMUL_CALLS.search(instruction.attributes))
    return instruction.opcode in MATMULS


def _parameter(computation: Computation, number: int) -> str:
    return next(i.name for i in computation.values() if i.opcode == "parameter" and i.text.strip() == str(number))


def _part_read(program: Program, computation: Computation, name: str, whole: int) -> int:
    """Bytes of the value `name` that a fused computation reads; a value that it only slices or updates counts in part."""
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
    """Bytes that a fusion writes; a result that it updates in place counts as the update."""
    return sum(
        min(array.bytes, _update(program, fused, index, array.bytes))
        for index, array in enumerate(instruction.arrays)
        if not array.on_chip
    )


def _update(program: Program, fused: Computation, index: int, whole: int) -> int:
    result = next(i for i in fused.values() if i.root)
    while result.opcode == "tuple":  # an operand may be a tuple itself
        for name in result.operands:
            part = fused[name]
            if index < len(part.arrays):
                break
            index -= len(part.arrays)
        result = part
    while result.opcode == "bitcast" and result.operands[0] in fused:
        result = fused[result.operands[0]]
    if result.opcode == "fusion":
        return _update(program, program.computations[result.called()[0]], index, whole)
    if result.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in fused[result.operands[1]].arrays)
    return whole
