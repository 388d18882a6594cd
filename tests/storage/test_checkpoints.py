"""training/checkpoint.py, step_folder.py, fingerprint.py: what comes back is what was saved, whatever the disk does."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dit_jax.errors import UserError
from dit_jax.storage import step_folder
from dit_jax.storage.checkpoints import Checkpointer, SaveError, restore_subtree
from dit_jax.storage.fingerprint import fingerprints, host_fingerprint, leaf_names

# Orbax leaves unawaited reads behind when it meets a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema_params: dict
    opt_state: tuple
    key: jax.Array


def mesh_of(count):
    """An (n / 2, 2) or (1, 1) mesh of at most `count` devices."""
    count = min(count, jax.device_count())
    shape = (count // 2, 2) if count > 1 else (1, 1)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])


def shardings(state, mesh):
    """Matrices are split over fsdp, everything else is on every device."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(None, "fsdp") if leaf.ndim == 2 else PartitionSpec()), state
    )


def make_state(step, mesh, width=128):
    """Big enough that its arrays are not kept inside orbax's index, which has checksums of its own."""
    rng = np.random.default_rng(step)
    kernel = jnp.asarray(rng.normal(size=(64, width)), jnp.float32)
    params = {"block": {"kernel": kernel, "bias": jnp.ones((width,), jnp.bfloat16) * step}}
    ema_params = jax.tree.map(lambda x: x * 0.5, params)
    key = jax.random.key(step)
    state = State(jnp.asarray(step, jnp.int32), params, ema_params, optax.adam(1e-3).init(params), key)
    return jax.device_put(state, shardings(state, mesh))


def abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for name, a, b in zip(leaf_names(left), jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype, name
        bits = jax.random.key_data if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else (lambda x: x)
        assert np.array_equal(np.asarray(bits(a)), np.asarray(bits(b))), name


def save_steps(folder, steps, **kwargs):
    mesh = mesh_of(8)
    with Checkpointer(folder, every_steps=1, **kwargs) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step, mesh), {"config": {"lr": 0.1}, "step": step})
    return abstract(make_state(0, mesh), mesh)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with good steps 1 and 2, to be copied, and the abstract state."""
    folder = tmp_path_factory.mktemp("good")
    return folder, save_steps(folder, [1, 2])


@pytest.fixture
def copy(two_steps, tmp_path):
    shutil.copytree(two_steps[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "float8_e4m3fn"])
def test_fingerprint_is_the_same_on_host_and_device_and_sees_every_change(dtype):
    """A fingerprint that ignores low bits, positions or the sharding lets a damaged or permuted array pass."""
    mesh = mesh_of(8)
    values = np.arange(96).reshape(12, 8) % (2 if dtype == "bool" else 100)
    array = jnp.asarray(values).astype(dtype)
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    expected = host_fingerprint(np.asarray(array))
    assert fingerprints([array, sharded]) == [expected, expected]
    raw = np.asarray(array).copy()
    for position, bit in ((0, 0), (17, 0), (95, 0), (50, 0 if dtype == "bool" else 6)):
        flipped = raw.copy().reshape(-1)
        flipped.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[raw.itemsize])[position] ^= 1 << bit
        assert host_fingerprint(flipped) != expected
        assert fingerprints([jnp.asarray(flipped.reshape(raw.shape))]) == [host_fingerprint(flipped)]
    swapped = raw.copy()
    swapped[0], swapped[1] = raw[1, ::-1], raw[0, ::-1]
    assert host_fingerprint(swapped) != expected
    assert host_fingerprint(raw[:-1]) != expected


def test_fingerprint_sees_swapped_powers_of_two():
    """With plain linear weights, 1.0 and 2.0 swapped at a distance of 256 cancel mod 2^32."""
    array = np.ones(512, np.float32)
    array[0] = 2.0
    moved = np.ones(512, np.float32)
    moved[256] = 2.0
    assert host_fingerprint(array) != host_fingerprint(moved)


def test_fingerprint_refuses_what_it_cannot_read():
    """A dtype without whole bytes must not get a made-up fingerprint; slashes in keys must not merge two leaves."""
    with pytest.raises(ValueError, match="complex64"):
        fingerprints([jnp.ones(2, jnp.complex64)])
    with pytest.raises(ValueError, match="int4"):
        fingerprints([jnp.ones(2, jnp.int4)])
    with pytest.raises(ValueError, match="a/b"):
        leaf_names({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize("count", [8, 4, 1])
def test_restores_bit_for_bit_onto_other_meshes(two_steps, count):
    """Catches leaves lost, cast or put on the wrong devices when the device count changes, typed keys included."""
    folder, like = two_steps
    mesh = mesh_of(count)
    state, meta = Checkpointer(folder, every_steps=1).restore(abstract(like, mesh))
    assert_same(state, make_state(2, mesh_of(8)))
    assert meta == {"config": {"lr": 0.1}, "step": 2}
    expected = jax.tree.leaves(shardings(state, mesh))
    assert all(leaf.sharding == sharding for leaf, sharding in zip(jax.tree.leaves(state), expected, strict=True))
    assert jax.random.key_impl(state.key) == jax.random.key_impl(jax.random.key(0))


def test_saved_values_survive_donation(tmp_path):
    """Catches an asynchronous save that still reads buffers after `save` returned."""
    mesh = mesh_of(8)
    state = make_state(1, mesh, width=256)
    double = jax.jit(lambda s: s.replace(params=jax.tree.map(lambda x: x * 2, s.params)), donate_argnums=0)
    with Checkpointer(tmp_path, every_steps=1) as checkpointer:
        checkpointer.save(1, state, {})
        jax.block_until_ready(double(state))
        checkpointer.wait()
        restored, _ = checkpointer.restore(abstract(make_state(1, mesh, width=256), mesh))
    assert_same(restored, make_state(1, mesh, width=256))


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    """A first run must get None, also when a killed process left only an unfinished save, which is removed."""
    like = abstract(make_state(0, mesh_of(1)), mesh_of(1))
    assert Checkpointer(tmp_path / "missing", every_steps=1).restore(like) is None
    (tmp_path / "3.orbax-checkpoint-tmp-17").mkdir()
    (tmp_path / "229.orbax-checkpoint-tmp" / "state").mkdir(parents=True)  # of a second Ctrl-C while saving
    (tmp_path / "notes").mkdir()
    assert Checkpointer(tmp_path, every_steps=1).restore(like) is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restore_subtree(tmp_path, {"params": like.params})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.replace(step=jax.ShapeDtypeStruct((), jnp.uint32, sharding=s.step.sharding)), "step has dtype"),
        (lambda s: s.replace(ema_params=jax.tree.map(lambda x: x.update(dtype=jnp.float16), s.ema_params)), "float16"),
        (lambda s: s.replace(step=s.step.update(shape=(1,))), r"step has shape \(1,\), the checkpoint \(\)"),
        (lambda s: s.replace(params={**s.params, "head": s.step}), "params/head is not in the checkpoint"),
        (lambda s: s.replace(params={}), "params/block/bias is only in the checkpoint"),
    ],
)
def test_another_model_is_refused_by_leaf_and_nothing_is_set_aside(copy, two_steps, change, message):
    """A changed config must not be taken for a damaged file (orbax casts dtypes silently), nor cost a checkpoint."""
    with pytest.raises(UserError, match=message):
        Checkpointer(copy, every_steps=1).restore(change(two_steps[1]))
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]


def test_a_leaf_without_sharding_is_named(two_steps):
    """Without a sharding orbax fails with "Topology mismatch" on another device count, which helps nobody."""
    folder, like = two_steps
    with pytest.raises(ValueError, match="leaf step has no sharding"):
        Checkpointer(folder, every_steps=1).restore(like.replace(step=jax.ShapeDtypeStruct((), jnp.int32)))


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_is_harmless_or_found(copy, two_steps, caplog):
    """Orbax restores garbage for a flipped bit without an error (12 of 12 tries)."""
    found, expected = set(), {step: make_state(step, mesh_of(8)) for step in (1, 2)}
    pristine = two_steps[0]
    for file in files_of(pristine / "2"):
        name = file.relative_to(pristine)
        size = file.stat().st_size
        for offset in {0, size // 3, size // 2, size - 1}:
            data = bytearray(file.read_bytes())
            data[offset] ^= 0x10
            (copy / name).write_bytes(data)
            state, meta = Checkpointer(copy, every_steps=1).restore(two_steps[1])
            assert_same(state, expected[int(state.step)])
            assert meta == {"config": {"lr": 0.1}, "step": int(state.step)}
            if int(state.step) == 1:
                found.add(str(name))
                assert sorted(path.name for path in copy.iterdir()) == ["1", "2.corrupt"]
                (copy / "2.corrupt").rename(copy / "2")
            (copy / name).write_bytes(file.read_bytes())
    biggest = max(files_of(pristine / "2" / "state"), key=lambda path: path.stat().st_size)
    assert biggest.parent.name == "d"
    assert {"2/meta/metadata", "2/state/manifest.ocdbt", str(biggest.relative_to(pristine))} <= found
    assert "arrays differ from the saved ones" in caplog.text  # what orbax itself does not notice


@pytest.mark.parametrize("harm", ["truncate", "zero", "delete", "empty_folder"])
def test_a_broken_step_is_set_aside_and_the_older_one_used(copy, two_steps, harm):
    """`latest_step()` of orbax goes on naming a broken step; a folder without content counts as the newest."""
    data_files = [path for path in files_of(copy / "2" / "state") if path.parent.name == "d"]
    for path in data_files:
        if harm == "truncate":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif harm == "zero":
            path.write_bytes(bytes(path.stat().st_size))
        elif harm == "delete":
            path.unlink()
    if harm == "empty_folder":
        shutil.rmtree(copy / "2")
        (copy / "2").mkdir()
    with Checkpointer(copy, every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(two_steps[1])
        assert_same(state, make_state(1, mesh_of(8)))
        checkpointer.save(2, make_state(2, mesh_of(8)), {})  # orbax would return False and save nothing
        checkpointer.wait()
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2", "2.corrupt"]


def test_all_steps_bad_is_an_error_that_renames_nothing(copy, two_steps):
    """Training from scratch over a ruined run, or renaming every step because of one systematic failure."""
    for step in (1, 2):
        (copy / str(step) / "meta" / "metadata").write_text("{}")
    for _ in range(2):
        with pytest.raises(UserError, match=r"step 2: its meta .* step 1: its meta"):
            Checkpointer(copy, every_steps=1).restore(two_steps[1])
    assert sorted(path.name for path in copy.iterdir()) == ["1", "2"]
    for step in (1, 2):
        (copy / str(step)).rename(copy / f"{step}.corrupt")
    with pytest.raises(UserError, match="only damaged"):
        Checkpointer(copy, every_steps=1).restore(two_steps[1])


def test_subtree_is_verified_and_the_folder_only_read(copy, two_steps):
    """Sampling beside a training job: a wrong EMA must not be used, and nothing may be renamed under the job."""
    mesh = mesh_of(2)
    wanted = {"ema_params": abstract(two_steps[1].ema_params, mesh)}
    tree, meta, step = restore_subtree(copy, wanted)
    assert step == meta["step"] == 2
    assert_same(tree, {"ema_params": make_state(2, mesh_of(8)).ema_params})
    with pytest.raises(UserError, match="momentum is not in the checkpoint"):
        restore_subtree(copy, {"momentum": two_steps[1].step})

    (copy / "3").mkdir()
    before = {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]}
    tree, _, step = Checkpointer(copy, every_steps=1).restore_subtree(wanted)
    assert step == 2
    with pytest.raises(UserError, match="step 3"):
        restore_subtree(copy, wanted, step=3)
    assert restore_subtree(copy, wanted, step=1)[2] == 1
    assert before == {path: path.stat().st_mtime_ns for path in [copy, *copy.rglob("*")]}
    with pytest.raises(FileNotFoundError, match="step 7"):
        restore_subtree(copy, wanted, step=7)


def test_going_back_on_purpose_sets_newer_steps_aside(tmp_path):
    """After a roll-back orbax refuses every save up to the old newest step without a word."""
    mesh = mesh_of(8)
    like = save_steps(tmp_path, [1, 2, 3])
    with Checkpointer(tmp_path, every_steps=1) as checkpointer:
        state, _ = checkpointer.restore(like, step=1)
        assert int(state.step) == 1
        checkpointer.save(2, make_state(20, mesh), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "2.abandoned", "3.abandoned"]
    state, _ = Checkpointer(tmp_path, every_steps=1).restore(like)
    assert int(state.step) == 20


def test_retention_keeps_the_newest_and_the_milestones(tmp_path):
    """Catches deleted milestones, and folders that grow without bound."""
    save_steps(tmp_path, [2, 4, 6, 8, 10, 12], keep_last=2, keep_every_steps=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "12", "6"]


def test_the_newest_verified_step_stays_until_a_newer_one_is_verified(tmp_path):
    """Counting only committed steps would delete the one step that is known to be good."""
    mesh = mesh_of(8)
    with Checkpointer(tmp_path, every_steps=1, keep_last=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step, mesh), {})
            while not (tmp_path / str(step)).exists():
                time.sleep(0.01)  # not `wait`, which would start the read-back
        assert step_folder.steps_in(tmp_path) == [1, 2, 3]  # known by now: 1 is good
        checkpointer.save(4, make_state(4, mesh), {})
        checkpointer.wait()
        assert step_folder.steps_in(tmp_path) == [2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_a_step_is_deleted_only_after_a_newer_one_was_read_back(tmp_path, monkeypatch):
    """A fault between commit and read-back must not cost the last good step, though keep_last would let it go."""
    like = save_steps(tmp_path, [1])
    real = step_folder.read_back

    def damage_first(path, *args):
        file = max(files_of(tmp_path / path.name / "state" / "d"), key=lambda file: file.stat().st_size)
        file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
        return real(path, *args)

    monkeypatch.setattr(step_folder, "read_back", damage_first)
    with pytest.raises(SaveError, match="not written"):
        save_steps(tmp_path, [2], keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.corrupt"]
    monkeypatch.setattr(step_folder, "read_back", real)
    assert int(Checkpointer(tmp_path, every_steps=1).restore(like)[0].step) == 1


@pytest.fixture
def full_disk():
    """A switch that makes every write past 64 KB of a file fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def switch(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536 if full else limits[0], limits[1]))

    yield switch
    switch(False)
    signal.signal(signal.SIGXFSZ, previous)


def big_state(step, mesh):
    """256 KB that do not compress."""
    state = {"step": jnp.asarray(step), "noise": jax.random.normal(jax.random.key(step), (256, 256))}
    return jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def test_a_failed_save_is_reported_removed_and_survived(tmp_path, full_disk):
    """Orbax's save says True, keeps the dead step in its cache and its half-written files on the full disk."""
    mesh = mesh_of(1)
    with Checkpointer(tmp_path, every_steps=1) as checkpointer:
        checkpointer.save(1, big_state(1, mesh), {})
        checkpointer.wait()
        full_disk(True)
        checkpointer.save(2, big_state(2, mesh), {})
        with pytest.raises(SaveError, match="newest is 1"):
            checkpointer.wait()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
        full_disk(False)
        checkpointer.save(2, big_state(2, mesh), {})  # the same step again: orbax would find it in its cache
        checkpointer.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), big_state(0, mesh))
    assert int(Checkpointer(tmp_path, every_steps=1).restore(like)[0]["step"]) == 2


def test_the_third_failure_in_a_row_stops_the_run(tmp_path, full_disk):
    """A run must neither die of one failed save nor train for days without any."""
    mesh = mesh_of(1)
    checkpointer = Checkpointer(tmp_path, every_steps=10)
    full_disk(True)
    checkpointer.save(10, big_state(10, mesh), {})
    deadline = time.monotonic() + 20
    while checkpointer._failures == 0 and time.monotonic() < deadline:
        assert not checkpointer.due(11)  # notices the failure between saves
        time.sleep(0.01)
    assert checkpointer._failures == 1
    checkpointer.save(20, big_state(20, mesh), {})
    checkpointer.save(30, big_state(30, mesh), {})
    with pytest.raises(SaveError, match="3 checkpoints in a row"):
        checkpointer.save(40, big_state(40, mesh), {})
    with pytest.raises(SaveError):
        checkpointer.close()


def test_save_never_does_nothing(tmp_path, monkeypatch):
    """Orbax returns False for an old step and drops numpy scalars on restore; both must be errors of `save`."""
    mesh = mesh_of(1)
    state = big_state(1, mesh)
    with Checkpointer(tmp_path, every_steps=5) as checkpointer:
        assert [step for step in range(12) if checkpointer.due(step)] == [5, 10]
        checkpointer.save(5, state, {})
        with pytest.raises(ValueError, match="step 5 exists"):
            checkpointer.save(5, state, {})
        with pytest.raises(ValueError, match="step 5 exists"):
            checkpointer.save(4, state, {})
        with pytest.raises(ValueError, match="leaf step is a int32"):
            checkpointer.save(6, {**state, "step": np.int32(3)}, {})
        with pytest.raises(ValueError, match="meta must be"):
            checkpointer.save(6, state, {"value": np.float32(1)})
        monkeypatch.setattr(ocp.CheckpointManager, "save", lambda *args, **kwargs: False)
        checkpointer.save(7, state, {})
        with pytest.raises(SaveError, match="newest is 5"):
            checkpointer.wait()
        monkeypatch.undo()
        checkpointer.save(8, state, {})
        checkpointer.wait()
        assert checkpointer.latest_step == 8
    with pytest.raises(UserError, match="keep_last=0"):
        Checkpointer(tmp_path, every_steps=1, keep_last=0)


def test_the_first_error_is_not_hidden_by_a_failed_save(tmp_path, full_disk):
    """Leaving the `with` block because of a NaN must report the NaN, whatever the disk does."""
    with pytest.raises(FloatingPointError), Checkpointer(tmp_path, every_steps=1) as checkpointer:
        full_disk(True)
        checkpointer.save(1, big_state(1, mesh_of(1)), {})
        raise FloatingPointError


CHILD = """
    import sys, jax, jax.numpy as jnp
    from dit_jax.storage.checkpoints import Checkpointer
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=one),
            "x": jax.ShapeDtypeStruct((500, 500), jnp.float32, sharding=one)}
    make = jax.jit(lambda step: {"step": step, "x": jax.random.normal(jax.random.key(step), (500, 500))})
    checkpointer = Checkpointer(sys.argv[1], every_steps=1)
    found = checkpointer.restore(like)
    step = jnp.int32(0) if found is None else found[0]["step"]
    if found is not None:
        assert jnp.array_equal(found[0]["x"], make(step)["x"])
    print("start", int(step), flush=True)
    while True:
        step = step + 1
        checkpointer.save(int(step), make(step), {})
        print("saving", int(step), flush=True)
"""


def kill_while_saving(folder, after_saves):
    """Runs the child, kills it -9 while a save is being written, returns (its first step, the last step it began)."""
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(CHILD), str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        start = int(child.stdout.readline().split()[1])
        for _ in range(after_saves):
            last = int(child.stdout.readline().split()[1])
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=20)
    rest = child.stdout.read().split()
    return start, max([last, *map(int, rest[1::2])])


@pytest.mark.parametrize(
    "kills", [pytest.param(2, marks=[pytest.mark.slow, pytest.mark.faults]), pytest.param(10, marks=pytest.mark.exhaustive)]
)
def test_kill_9_while_saving_loses_no_committed_step(tmp_path, kills):
    """Catches a half-written or half-deleted step taken for the newest, and leftovers that pile up."""
    reached = 0
    for kill in range(kills):
        start, last = kill_while_saving(tmp_path, after_saves=3 + kill)
        assert start >= reached - 1, "more than the save in flight was lost"
        reached = last
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".corrupt")]
    newest = Checkpointer(tmp_path, every_steps=1).latest_step
    assert newest >= reached - 1
    tree, _, step = restore_subtree(
        tmp_path,
        {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))},
    )
    assert int(tree["step"]) == step == newest


TWO = """
    import os, sys, time, signal
    import jax, jax.numpy as jnp, numpy as np
    folder, port, rank, phase = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from dit_jax.storage.checkpoints import Checkpointer
    from dit_jax.runtime.signals import StopSignal
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    make = jax.jit(lambda step: {"step": step, "x": jnp.arange(64.0).reshape(8, 8) * step},
                   out_shardings={"step": whole, "x": split})
    like = {"step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
            "x": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)}
    with Checkpointer(folder, every_steps=20) as checkpointer, StopSignal() as stop:
        found = checkpointer.restore(like)
        step = 0 if found is None else int(found[0]["step"])
        print("start", step, flush=True)
        while phase == "train":
            step += 1
            state = make(jnp.int32(step))
            jax.block_until_ready(state)
            stopping = stop.requested(step)
            if checkpointer.due(step) or stopping:
                checkpointer.save(step, state, {"step": step})
                print("saved", step, flush=True)
            if stopping:
                break
            time.sleep(0.005)
    print("end", step, flush=True)
    jax.distributed.shutdown()
"""


def two_processes(folder, phase, signal_to_second=None):
    """The last {word: step} that each process printed; the second gets the signal once it has saved."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(TWO), str(folder), str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    children = [
        subprocess.Popen([*command, str(rank), phase], stdout=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    try:
        if signal_to_second is not None:
            while not children[1].stdout.readline().startswith("saved 20"):
                assert children[1].poll() is None
            children[1].send_signal(signal_to_second)
        outputs = [child.communicate(timeout=120)[0].splitlines() for child in children]
        assert [child.returncode for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    ours = re.compile(r"(start|saved|end) (\d+)")  # Gloo prints here too
    return [{hit[1]: int(hit[2]) for hit in map(ours.fullmatch, output) if hit} for output in outputs]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_at_one_step_and_agree_on_what_to_restore(tmp_path, number):
    """A signal to one of two processes must save one step on both; a damaged shard must not leave one in a barrier."""
    first, second = two_processes(tmp_path, "train", number)
    assert first["end"] == second["end"] == first["saved"] == second["saved"]
    newest, older = step_folder.steps_in(tmp_path)[:-3:-1]
    assert newest == first["end"]
    for file in files_of(tmp_path / str(newest) / "state" / "ocdbt.process_1"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for file in files_of(tmp_path / str(newest) / "state" / "d"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    first, second = two_processes(tmp_path, "look")
    assert first["start"] == second["start"] == older
    assert (tmp_path / f"{newest}.corrupt").exists()
