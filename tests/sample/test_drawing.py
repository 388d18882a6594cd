"""Samples in shards: drawn by index, gone on with, refused. Two processes and kills are in test_sampling_runs.py."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import tiny
from kill_points import SHARES, check_every_kill, tree

from dit_jax import build
from dit_jax.errors import NotFinite, UserError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.sample import drawing, samples_file, shards
from dit_jax.sample.drawing import draw
from dit_jax.sample.generator import Generator, default_chunk_size, in_chunks
from dit_jax.sample.labels import spread_labels
from dit_jax.sample.weights import weights_fingerprint
from dit_jax.storage.sealed import sealed
from dit_jax.tasks.state import abstract_state

CONFIG = tiny.config(model__depth=1, sampler__num_steps=2)
TASK = build.Run(CONFIG).task
COUNT = 150  # three shards, the last of them no whole number of chunks
LABELS = spread_labels(COUNT, 10)


def generator(devices=1, batch_size=64, seed=3, fsdp=1, sampler=CONFIG):
    mesh = make_mesh(devices // fsdp, fsdp, devices=jax.devices()[:devices])
    made = Generator(TASK, mesh, build.Run(sampler).sampler, build.Run(CONFIG).guidance, batch_size, seed, chunk_size=8)
    rng = np.random.default_rng(7)
    like = abstract_state(TASK, mesh).ema_params
    made.params = jax.tree.map(lambda x: jax.device_put((0.1 * rng.standard_normal(x.shape)).astype(x.dtype), x.sharding), like)
    return made


def run(out, made=None, labels=LABELS, **more):
    made = made or generator()
    made_by = {"seed": made.seed, "weights": weights_fingerprint(made.params)}
    return draw(out, made, made.params, {"codec": {}}, {"label": labels}, len(labels), made_by, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished folder."""
    out = tmp_path_factory.mktemp("drawing") / "whole"
    run(out)
    return out


def test_images_that_are_not_finite_are_refused(whole, tmp_path):
    """NaN rounded to black images, exit 0: the images and labels must be named, and nothing of them written."""
    made = generator(batch_size=24)
    table = made.params["label_embedding"]
    table["embedding"] = table["embedding"].at[3].set(np.nan)
    with pytest.raises(NotFinite, match=r"3 of 24 images of a batch hold NaN or infinity: 3 \(label 3\), 13 \(label 3\), 23 "):
        run(tmp_path / "x.npz", made)
    assert not (tmp_path / "x.npz").exists() and not list((tmp_path / "x.shards" / "shards").iterdir())
    with pytest.raises(NotFinite, match=r"1 of 2 images .*: 1 \(label 3\)\."):
        made(made.params, {"codec": {}}, {"label": np.array([4, 3])}, 2)


def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def content(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "shards").iterdir())}


@pytest.mark.parametrize("devices, batch_size", [(1, 7), (8, 24)])
def test_bits_do_not_depend_on_batch_or_devices(whole, tmp_path, devices, batch_size):
    """Rows rounded otherwise in a batch of another size, a chunk that begins elsewhere, images in another order."""
    run(tmp_path / "other", generator(devices, batch_size))
    assert content(tmp_path / "other") == content(whole)
    images = np.concatenate([images for _, images, _ in shards.read(whole).rows(40)])
    assert images.std() > 10 and images.shape == (COUNT, 8, 8, 1)
    assert len(np.unique(images.reshape(COUNT, -1), axis=0)) == COUNT


def test_split_parameters_give_the_same_images(whole, tmp_path):
    """Rows that come back in another order, or twice, where devices share the work on a row."""
    run(tmp_path / "x.npz", generator(8, 32, fsdp=4))
    images = np.load(tmp_path / "x.npz")["arr_0"].astype(int)
    assert np.abs(images - np.concatenate([images for _, images, _ in shards.read(whole).rows()])).max() <= 1


def test_npz(whole, tmp_path):
    """An npz that NumPy cannot read, in another order, or with other bytes the next time; shards left behind."""
    drawn = run(tmp_path / "x.npz")
    with np.load(drawn.samples) as file:
        np.testing.assert_array_equal(file["arr_0"], np.concatenate([images for _, images, _ in shards.read(whole).rows()]))
        np.testing.assert_array_equal(file["labels"], LABELS)
        assert json.loads(str(file["made_by"]))["seed"] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"x.npz", "x.png"}
    bytes_before = drawn.samples.read_bytes()
    assert run(drawn.samples).new_images == 0
    damaged = bytearray(bytes_before)
    damaged[len(damaged) // 3] ^= 1
    drawn.samples.write_bytes(damaged)
    assert run(drawn.samples).new_images == COUNT
    assert drawn.samples.read_bytes() == bytes_before


def test_goes_on(whole, tmp_path, capfd):
    """A flipped bit that stays, a missing shard that is not drawn, a sound one that is drawn again."""
    folder, before = copy(whole, tmp_path), content(whole)
    file = folder / "shards" / "00001-of-00003.npy"
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)
    (folder / "shards" / "00002-of-00003.json").unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        shards.read(folder)
    with pytest.raises(UserError, match="damaged"):
        shards.opened(folder).read(1)
    assert run(folder).new_images == 64 + 22
    assert content(folder) == before
    assert "00001-of-00003.npy has other bytes" in capfd.readouterr().err
    assert run(folder).new_images == 0


def test_stops_and_goes_on(whole, tmp_path, monkeypatch):
    """A signal that is not heard while drawing, or after which finished shards are lost."""
    with monkeypatch.context() as patch:
        patch.setattr(drawing.StopSignal, "requested", lambda self, call: call == 2)
        drawn = run(tmp_path / "out", generator(batch_size=32))
    assert drawn.stopped and drawn.new_images == 64
    assert len(content(tmp_path / "out")) == 2
    assert run(tmp_path / "out").new_images == COUNT - 64
    assert content(tmp_path / "out") == content(whole)


OTHERS = {
    "seed": (lambda out: run(out, generator(seed=4)), "made_by.seed: 3 there, 4 now"),
    "labels": (lambda out: run(out, labels=LABELS[::-1].copy()), "labels_sha256"),
    "count": (lambda out: run(out, labels=LABELS[:100]), "num_images: 150 there, 100 now"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused(whole, tmp_path, other):
    """Half of one set of samples and half of another in one folder."""
    call, text = OTHERS[other]
    with pytest.raises(UserError, match="give another --out") as error:
        call(copy(whole, tmp_path))
    assert text in str(error.value)
    assert content(tmp_path / "copy") == content(whole)


def test_other_random_numbers_are_other_samples():
    """Shards of two noises in one folder, or the old images for a command that means others; an old folder that is refused."""
    old = shards.settings_of(LABELS, (8, 8, 1), {}, {})
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        new = shards.settings_of(LABELS, (8, 8, 1), {}, {})
    finally:
        jax.config.update("jax_default_prng_impl", "threefry2x32")
    line = "random.jax_default_prng_impl: 'threefry2x32' there, 'rbg' now"
    assert shards.changes(old, new) == shards.changes(old, new, same_versions=False) == [line]
    assert not shards.changes({key: value for key, value in old.items() if key != "random"}, new)


def test_other_weights_are_refused(whole, tmp_path):
    """Samples of two checkpoints in one folder, one weight of which differs in its last bit."""
    made = generator()
    made.params["final"]["linear"]["bias"] = jax.numpy.nextafter(made.params["final"]["linear"]["bias"], 9.0)
    with pytest.raises(UserError, match=r"made_by\.weights"):
        run(copy(whole, tmp_path), made)


def test_replace(whole, tmp_path):
    """The final samples of a run that went on with another sampler, refused or mixed with the old."""
    folder = copy(whole, tmp_path)
    assert run(folder, generator(seed=4), replace=True).new_images == COUNT
    assert shards.read(folder).made_by["seed"] == 4


def test_strange_folders(tmp_path):
    """A folder of something else that is written into, a file that is overwritten."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        run(tmp_path)
    np.savez(tmp_path / "theirs.npz", arr_0=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="does not say how"):
        run(tmp_path / "theirs.npz")
    with pytest.raises(UserError, match="is a file"):
        run((tmp_path / "notes.txt").rename(tmp_path / "notes"))
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": 9}, "format 9"),
        ({"shape": ["../../etc", 8, 1]}, "which is impossible"),
        ({"num_images": 10**12}, "does not hold the labels"),
        ({"made_by": "../x"}, "does not say how"),
    ],
)
def test_hostile_manifest(whole, tmp_path, change, text):
    """A manifest with a seal of its own that makes the reader open another path or allocate without end."""
    folder = copy(whole, tmp_path)
    settings = json.loads((folder / "manifest.json").read_text())
    settings.pop("seal")
    (folder / "manifest.json").write_bytes(sealed(settings | change))
    with pytest.raises(UserError, match=text):
        shards.read(folder)


def test_pickles_are_not_opened(whole, tmp_path):
    """Labels or a shard that run code when they are read."""
    folder = copy(whole, tmp_path)
    np.save(folder / "labels.npy", np.array([os.system] * COUNT, object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        shards.read(folder)


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    """A stack trace without a path after hours, or a hang of the thread that writes."""

    def full(path, parts):
        if path.suffix == ".npy" and path.parent.name == "shards":
            raise OSError(28, "No space left on device")
        return real(path, parts)

    real = shards.write_atomic
    monkeypatch.setattr(shards, "write_atomic", full)
    with pytest.raises(UserError, match=r"00000-of-00003.npy cannot be written \(No space left on device\)"):
        run(tmp_path / "out")


def test_batches(whole):
    """A reader that loses or repeats images where batches and shards do not fit each other."""
    found = shards.read(whole)
    images = np.concatenate([found.read(k) for k in range(3)])
    parts = list(found.batches(60, 140, 9))
    assert [len(part) for part in parts] == [9] * 8 + [8]
    np.testing.assert_array_equal(np.concatenate(parts), images[60:140])


def test_large_npz(tmp_path):
    """An npz whose images, far more than are held at once, do not come back; a date that makes equal samples differ."""
    blocks = [np.full((100, 32, 32, 3), i, np.uint8) for i in range(5)]
    for name in ("a.npz", "b.npz"):
        samples_file.write_stream(tmp_path / name, (500, 32, 32, 3), iter(blocks), np.zeros(500, np.int32), {})
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], np.concatenate(blocks))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_chunks():
    """A chunk of rows of one device alone, while the others wait, or rows that come back in another order."""
    x = jax.numpy.arange(12)  # of three devices: 0 to 3, 4 to 7, 8 to 11
    found = in_chunks(lambda rows: rows + 100 * rows.sum(), 2, 3, x)
    assert found.tolist() == [i + 100 * (39 if i % 4 > 1 else 27) for i in range(12)]


def test_default_chunk_size():
    """Chunks that starve an accelerator, or that a shard is no multiple of."""
    assert [default_chunk_size(tokens, "tpu") for tokens in (256, 1024, 16)] == [64, 16, 64]
    assert [default_chunk_size(tokens, "cpu") for tokens in (4, 16, 64, 256)] == [64, 32, 8, 8]


def test_a_folder_whose_samples_are_replaced_stays_claimed(tmp_path):
    """A second command that draws into a folder because the first removed its lock with the old samples."""
    labels = np.zeros(3, np.int32)
    old, new = (shards.Shards(tmp_path, shards.settings_of(labels, (4, 4, 3), {"seed": seed}, {}), labels) for seed in (0, 1))
    with shards.claimed(old):
        pass
    with shards.claimed(new, replace=True), pytest.raises(UserError, match="another command"), shards.claimed(new):
        pass


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["x.npz", "x"])
def test_killed_before_any_file_operation(tmp_path, name, share):
    """A folder that no later start accepts, a partial file or folder that stays, a picture that is never made, other bytes."""
    made, labels = generator(), LABELS[:70]

    def ended(folder):
        files = tree(folder)
        assert not [file for file in files if "partial" in file or "lock" in file]
        return files

    assert len(check_every_kill(tmp_path, lambda folder: run(folder / name, made, labels), share, ended, times=2)) > 20
