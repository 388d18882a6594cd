"""How devices are arranged in a mesh, and which process reads which rows."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dit_jax.errors import UserError
from dit_jax.parallel import rules
from dit_jax.parallel.mesh import arrange, make_mesh, reader_place


def torus(*sides, kind="TPU v6 lite"):
    """TPUs of a slice, four to a host, in the order of their hosts."""
    places = sorted(itertools.product(*map(range, sides)), key=lambda at: (at[2], at[1] // 2, at[0] // 2, at[1], at[0]))
    return [
        SimpleNamespace(platform="tpu", device_kind=kind, core_on_chip=0, id=i, coords=at, process_index=i // 4)
        for i, at in enumerate(places)
    ]


@pytest.mark.parametrize(
    "sizes, sides", [((8, 1, 2, 1), (4, 4, 1)), ((1, 4, 2, 2), (4, 4, 1)), ((8, 4, 2, 1), (4, 4, 4)), ((2, 16, 1, 2), (4, 4, 4))]
)
def test_a_torus_is_split_where_the_mesh_asks(sizes, sides):
    """A tensor axis of 2 refused on a torus whose sides are 4, or given to devices that are not neighbours."""
    mesh = arrange(sizes, torus(*sides))
    assert mesh.shape == sizes and len({device.id for device in mesh.flat}) == mesh.size
    last = max(axis for axis, size in enumerate(sizes) if size > 1)
    for group in np.moveaxis(mesh, last, -1).reshape(-1, sizes[last]):
        assert sum(abs(a - b) for a, b in zip(group[0].coords, group[1].coords, strict=True)) == 1


def gpus(*per_host):
    """GPUs as JAX numbers them: those of a host are a slice."""
    hosts = [host for host, count in enumerate(per_host) for _ in range(count)]
    return [SimpleNamespace(platform="gpu", device_kind="H100", id=i, slice_index=host) for i, host in enumerate(hosts)]


@pytest.mark.parametrize(
    "sizes, across", [((4, 2, 2, 1), (0,)), ((1, 16, 1, 1), (1,)), ((2, 4, 2, 1), (0,)), ((1, 4, 4, 1), (1,))]
)
def test_gpus_of_two_hosts(sizes, across):
    """A run on two hosts with GPUs that JAX refuses to build a mesh for; a tensor axis over the slow network between them."""
    mesh = arrange(sizes, gpus(8, 8))
    assert sorted(device.id for device in mesh.flat) == list(range(16)) and mesh.shape == sizes
    hosts = np.vectorize(lambda device: device.slice_index)(mesh)
    crossed = tuple(axis for axis in range(4) if (hosts.max(axis) != hosts.min(axis)).any())
    assert crossed == across


def test_three_hosts_over_two_axes():
    """Six slices that no one axis holds: data takes what it can, fsdp the rest."""
    mesh = arrange((2, 6, 2, 1), gpus(*[4] * 6))
    hosts = np.vectorize(lambda device: device.slice_index)(mesh)
    assert (hosts.max(2) == hosts.min(2)).all() and len(set(hosts[0].flat)) == 3


def test_hosts_of_unequal_size():
    """A mesh error of JAX's that names no host."""
    with pytest.raises(UserError, match=r"2 slices .* of unequal size: \{0: 8, 1: 4\}"):
        make_mesh(-1, devices=gpus(8, 4))


def pod(shape, owners):
    """A mesh over devices that belong to the given processes, one number per device in the mesh's order."""
    devices = np.array([SimpleNamespace(process_index=i) for i in owners]).reshape(shape)
    return SimpleNamespace(devices=devices, shape=dict(zip(("data", "fsdp", "tensor", "sequence"), shape, strict=True)))


@pytest.mark.parametrize(
    "shape, owners, places",
    [
        ((2, 4, 1, 1), [0] * 4 + [1] * 4, [(0, 2), (1, 2)]),
        ((1, 1, 8, 1), [0] * 4 + [1] * 4, [(0, 1), (0, 1)]),
        ((2, 1, 2, 2), [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((4, 1, 2, 1), [0, 1, 0, 1, 2, 3, 2, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_who_reads_what(monkeypatch, shape, owners, places):
    """Processes that share rows (tensor over hosts) and read different ones: their devices would train on different batches."""
    for process, wanted in enumerate(places):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert reader_place(pod(shape, owners)) == wanted


def test_rows_that_two_processes_share_in_part():
    """A mesh for which no process can be told which rows to read."""
    with pytest.raises(UserError, match="cannot be divided among 2 processes"):
        reader_place(pod((3, 1, 2, 1), [0, 0, 0, 1, 1, 1]))


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"sequence": 0}, "mesh.sequence is 0; it must be at least 1"),
        ({"sequence": 3}, "= 2 x 1 x 1 x 3 needs 6 devices"),
    ],
)
def test_bad_mesh(fields, text):
    """An axis that is dropped, or leaves devices idle."""
    with pytest.raises(UserError, match=text):
        make_mesh(**fields)


def test_the_sums_of_adafactor_are_whole():
    """Catches a spec of the parameter on an array of one dimension less, and a parameter named v that is taken for a sum."""
    table = ((r"(in|v)/kernel", ("fsdp", "tensor")),)
    assert rules.rule_of("opt_state/0/v_row/blocks/in/kernel", (2, 32), table) == ()
    assert rules.rule_of("opt_state/0/v/blocks/in/kernel", (1,), table) == ()
    assert rules.rule_of("opt_state/0/v/blocks/in/kernel", (2, 32, 8), table) == ("fsdp", "tensor")
    assert rules.rule_of("v/kernel", (8, 8), table) == ("fsdp", "tensor")
