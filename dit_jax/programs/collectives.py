"""The collectives of a compiled program: kinds, groups, bytes and mesh axes."""

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
        groups: [groups, members] indices into the devices of the mesh, in its order; (source, target) pairs of a permute.
        sent_bytes: bytes that one device sends per execution on a ring: (n - 1) / n of the array for gathers, scatters and
            all-to-all, twice that for an all-reduce, the whole array for a permute.
        times: number of executions in the program.
    """

    kind: str
    name: str
    groups: np.ndarray
    sent_bytes: float
    times: int


def find(program: Program, num_devices: int) -> list[Collective]:
    """All collectives of a program, including those in loops, calls, fusions and asynchronous pairs.

    Raises:
        ValueError: replica groups have an unknown form.
    """
    collectives = []
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
        collectives.append(Collective(kind, instruction.name, groups, _sent(kind, computation, instruction, members), times))
    return collectives


def _channel(instruction: Instruction) -> str | None:
    match = re.search(r"channel_id=(\d+)", instruction.attributes)
    return match and match[1]


def channel_in_steps(collective: Instruction) -> str | None:
    """The channel of a collective that a TPU executes in steps, overlapped with other work; None for others."""
    return _channel(collective) if "async_collective_fusion_config" in collective.attributes else None


def _carried_out_in_steps(program: Program) -> dict[str, int]:
    """{channel: number of executions} of collectives that a TPU overlaps with other work.

    The compiler writes such a collective into every fusion that it overlaps with, under one channel. The smallest count of these
    is the number of executions.
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
    """Whether this is a reduce-scatter in the form that TPUs use: an all-reduce fused with the slice that is kept."""
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
    """[4,2]T(1,0) -> 0, 1, ... in that shape, transposed and flattened."""
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(transpose)) if transpose else ids).reshape(-1)


def replica_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Parses the replica groups [groups, members] of an instruction, in any form that XLA prints.

    {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), mesh['x'=2,'y'=2] {'x'} with or without device_ids=([2,2]T(1,0)), {} for all devices.

    Raises:
        ValueError: another form, or groups of unequal size.
    """
    groups_text = re.search(r"replica_groups=(.*)", attributes)
    if not groups_text:
        return np.arange(num_devices)[None]
    text = groups_text[1]
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
    raise ValueError(f"replica groups of an unknown form: {text[:120]}")


def _mesh_groups(axes: str, dims: str | None, transpose: str | None, along: str) -> np.ndarray:
    names = re.findall(r"'([^']+)'=(\d+)", axes)
    sizes = [int(size) for _, size in names]
    ids = _iota(dims, transpose) if dims else np.arange(np.prod(sizes))
    # A part of an axis, 'x':(2)4, splits the axis in three: 2 before it, 4 for itself, and the rest.
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
    """[pairs, 2] of a permute, without devices that send to themselves."""
    text = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    pairs = np.asarray(_numbers(text[1]) if text else [], int).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def axes_of(groups: np.ndarray, mesh_shape: dict[str, int]) -> str:
    """The smallest set of mesh axes that contains every group: "fsdp", "data+fsdp", ..."""
    names = [name for name, size in mesh_shape.items() if size > 1]
    sizes = tuple(mesh_shape.values())
    coordinates = dict(zip(mesh_shape, np.unravel_index(np.arange(np.prod(sizes)), sizes), strict=True))
    for count in range(len(names) + 1):
        for chosen in itertools.combinations(names, count):
            others = [coordinates[name][groups] for name in names if name not in chosen]
            if all((place == place[:, :1]).all() for place in others):
                return "+".join(chosen) or MANY_AXES
    return MANY_AXES


def by_kind_and_axis(collectives: list[Collective], mesh_shape: dict[str, int]) -> dict[str, dict[str, int]]:
    """Bytes that one device sends in the program, {kind: {axes: bytes}}."""
    table: dict[str, dict[str, int]] = {}
    for c in collectives:
        row = table.setdefault(c.kind, {})
        axes = axes_of(c.groups, mesh_shape)
        row[axes] = row.get(axes, 0) + round(c.sent_bytes * c.times)
    return table


def spans(groups: np.ndarray, coordinates: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields (dimension of the torus, chips along it) for each dimension that the first group spans.

    coordinates: [devices, dimensions] of the mesh's devices.
    """
    members = coordinates[groups[0]]
    for dimension in range(coordinates.shape[1]):
        count = len(np.unique(members[:, dimension]))
        if count > 1:
            yield dimension, count
