"""What devices say to each other in a compiled program: kinds, groups, bytes and the axes of the mesh."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dit_jax.programs.hlo import Computation, Instruction, Program

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
MANY_AXES = "not along mesh axes"


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Fields:
        groups: [groups, members] indices into the devices of the mesh, in its order; pairs (source, target) of a permute.
        sent_bytes: what one device sends in one run, on a ring: (n - 1) / n of the whole for gathers, scatters and all-to-all,
            twice that for an all-reduce, all of it for a permute.
        times: how often it runs in the program.
    """

    kind: str
    name: str
    groups: np.ndarray
    sent_bytes: float
    times: int


def find(program: Program, num_devices: int) -> list[Collective]:
    """The collectives of a program, wherever they stand: in loops, calls, fusions and asynchronous pairs.

    Raises:
        ValueError: replica groups in a form that this does not know.
    """
    found = []
    carried, seen = _carried_out_in_steps(program), set()
    for computation, instruction, times in program.executed(into_fusions=True):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if (channel := _channel(instruction)) in carried:
            if channel in seen:
                continue
            seen.add(channel)
            times = carried[channel]
        permutes = kind == "collective-permute"
        groups = _pairs(instruction.attributes) if permutes else replica_groups(instruction.attributes, num_devices)
        members = 2 if permutes else groups.shape[1]
        if members < 2 or (permutes and not len(groups)):
            continue
        if kind == "all-reduce" and _only_a_part_is_kept(computation, instruction):
            kind = "reduce-scatter"
        found.append(Collective(kind, instruction.name, groups, _sent(kind, computation, instruction, members), times))
    return found


def _channel(instruction: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found and found[1]


def channel_in_steps(collective: Instruction) -> str | None:
    """The channel of a collective that a TPU carries out in steps beside other work; None for others."""
    return _channel(collective) if "async_collective_fusion_config" in collective.attributes else None


def _carried_out_in_steps(program: Program) -> dict[str, int]:
    """{channel: how often it really runs} of collectives that a TPU carries out beside other work.

    The compiler writes those into every fusion that they run beside, under one channel; the rarest of these is the whole.
    """
    times_of: dict[str, list[int]] = {}
    in_steps = set()
    for _, instruction, times in program.executed(into_fusions=True):
        channel = _channel(instruction)
        if channel and instruction.opcode.removesuffix("-start") in KINDS:
            times_of.setdefault(channel, []).append(times)
            if channel_in_steps(instruction):
                in_steps.add(channel)
    return {channel: min(times_of[channel]) for channel in in_steps}


def _only_a_part_is_kept(computation: Computation, instruction: Instruction) -> bool:
    """Whether this is how TPUs write a reduce-scatter: a fusion of an all-reduce and the slice of it that is kept."""
    users = [i for i in computation.values() if instruction.name in i.operands]
    inside = not any(i.opcode in ("while", "fusion", "all-reduce-done") for i in computation.values())
    return inside and len(users) == 1 and users[0].opcode == "dynamic-slice" and users[0].root


def _sent(kind: str, computation: Computation, instruction: Instruction, members: int) -> float:
    operands = sum(array.bytes for name in instruction.operands if name in computation for array in computation[name].arrays)
    share = (members - 1) / members
    return {
        "all-gather": operands * (members - 1),
        "reduce-scatter": operands * share,
        "all-reduce": 2 * operands * share,
        "all-to-all": operands * share,
        "ragged-all-to-all": operands * share,
    }.get(kind, operands)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    """[4,2]T(1,0) -> the numbers from 0 in that shape, its axes then permuted, flat."""
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(transpose)) if transpose else ids).reshape(-1)


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """[groups, members] of one instruction, in any of the forms that XLA prints.

    {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=2] {'x'} with or without device_ids=([2,2]T(1,0)), {} for everyone.

    Raises:
        ValueError: another form, or groups of unequal size.
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    if not found:
        return np.arange(num_devices)[None]
    text = found[1]
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    if match := re.match(r"mesh\[([^\]]*)\](?:, ?device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", text):
        return _mesh_groups(*match.groups())
    if match := re.match(r"\{((?:\{[\d,]*\},?)*)\}", text):
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", match[1])]
        if not groups:
            return np.arange(num_devices)[None]
        if len({len(group) for group in groups}) == 1:
            return np.asarray(groups)
    raise ValueError(f"replica groups in a form that is not known: {text[:120]}")


def _mesh_groups(axes: str, dims: str | None, transpose: str | None, along: str) -> np.ndarray:
    names = re.findall(r"'([^']+)'=(\d+)", axes)
    sizes = [int(size) for _, size in names]
    ids = _iota(dims, transpose) if dims else np.arange(np.prod(sizes))
    # Part of an axis, 'x':(2)4, is an axis of its own: 2 before it, 4 of it, the rest after.
    parts, chosen = [], []
    wanted = {name: _numbers(part) for name, part in re.findall(r"'([^']+)'(?::(\(\d+\)\d+))?", along)}
    for name, size in ((name, int(size)) for name, size in names):
        if name not in wanted or not wanted[name]:
            chosen += [len(parts)] if name in wanted else []
            parts.append(size)
        else:
            before, count = wanted[name]
            chosen.append(len(parts) + 1)
            parts += [before, count, size // before // count]
    rest = [axis for axis in range(len(parts)) if axis not in chosen]
    members = int(np.prod([parts[axis] for axis in chosen]))
    return ids.reshape(parts).transpose(rest + chosen).reshape(-1, members)


def _pairs(attributes: str) -> np.ndarray:
    """[pairs, 2] of a permute; a device that sends to itself is left out."""
    text = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    pairs = np.asarray(_numbers(text[1]) if text else [], int).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def axes_of(groups: np.ndarray, mesh_shape: dict[str, int]) -> str:
    """ "fsdp", "data+fsdp", ...: the smallest set of mesh axes that holds every group."""
    names = [name for name, size in mesh_shape.items() if size > 1]
    sizes = tuple(mesh_shape.values())
    coordinates = dict(zip(mesh_shape, np.unravel_index(np.arange(np.prod(sizes)), sizes), strict=True))
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            others = [coordinates[name][groups] for name in names if name not in chosen]
            if all((place == place[:, :1]).all() for place in others):
                return "+".join(chosen) or MANY_AXES
    return MANY_AXES


def by_kind_and_axis(found: list[Collective], mesh_shape: dict[str, int]) -> dict[str, dict[str, int]]:
    """{kind: {axes: bytes that one device sends in the whole program}}."""
    table: dict[str, dict[str, int]] = {}
    for c in found:
        row = table.setdefault(c.kind, {})
        axes = axes_of(c.groups, mesh_shape)
        row[axes] = row.get(axes, 0) + round(c.sent_bytes * c.times)
    return table


def spans(groups: np.ndarray, coordinates: np.ndarray) -> Iterator[tuple[int, int]]:
    """(dimension of the torus, chips along it) that the first group reaches over.

    coordinates: [devices, dimensions] of the mesh's devices.
    """
    members = coordinates[groups[0]]
    for dimension in range(coordinates.shape[1]):
        count = len(np.unique(members[:, dimension]))
        if count > 1:
            yield dimension, count
