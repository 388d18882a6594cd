"""Reading a latent cache: every row is where the manifest says, and the batch of a step depends on (seed, step) alone."""

import dataclasses
import os
import threading
import types

import jax
import numpy as np
import pytest
from latents import CODEC, Photographs, contents, flip_byte, job, params

from dit_jax.data.captions import Captions
from dit_jax.data.latent_loader import LatentLoader, resident_moments
from dit_jax.data.latents import LatentCache
from dit_jax.data.transforms import ImageTransform
from dit_jax.encode.cache_folder import finish
from dit_jax.encode.writer import Job, Shard, encode
from dit_jax.errors import Unavailable, UserError
from dit_jax.parallel.mesh import make_mesh
from dit_jax.storage.sealed import digest, read_sealed, sealed

N = 68


@pytest.fixture(scope="module")
def weights():
    return params()


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "cache"
    encode(job(weights), path, 0.05)
    return path


@pytest.fixture(scope="module")
def cache(folder):
    return LatentCache(folder)


@pytest.fixture
def copy(folder, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for name, data in contents(folder).items():
        (path / name).write_bytes(data)
    return path


def all_moments(folder):
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.moments.npy"))])


def take(loader, steps, start_step=0):
    with loader.batches(start_step) as batches:
        return [next(batches) for _ in range(steps)]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key])


def test_gather(folder, cache):
    """Rows of the wrong shard, in another order than asked for, or the image in place of its mirror image."""
    rows = np.random.default_rng(0).integers(0, 2 * N, 200)
    np.testing.assert_array_equal(cache.gather(rows), all_moments(folder)[rows])
    np.testing.assert_array_equal(cache.slice(50, 125), all_moments(folder)[50:125])
    assert len(cache) == N and cache.views == 2 and cache.num_classes == 5 and cache.class_names[1] == "bee"
    assert cache.labels.dtype == np.int32 and cache.moments_shape == (4, 4, 4)


@pytest.mark.parametrize("rows", [[-1], [0, 2 * N]])
def test_rows_out_of_range(cache, rows):
    """A negative row that is counted from the end, or one past the end that is clamped to it."""
    with pytest.raises(IndexError, match=r"outside \[0, 136\)"):
        cache.gather(np.array(rows))


def test_captions_go_with_their_record(cache):
    """Captions of the record in the source's numbering, which bad records shift."""
    captions = cache.captions(np.arange(N))
    assert [caption is not None for caption in captions] == (cache.source_index % 3 == 0).tolist()
    assert all(caption == f"number {i}, zażółć" for caption, i in zip(captions, cache.source_index, strict=True) if caption)
    long = cache.long_captions(np.arange(N))
    assert long == [f"a long text about {i}" if i % 6 == 0 else None for i in cache.source_index]


def test_training_from_a_cache_draws_long_captions(cache):
    """Catches long captions that a cache keeps and training never sees, and texts of other records."""

    def entries(example, rng):
        return {"length": np.array(len(Captions(("{name}",), long_caption_rate=1.0).of(example, cache.class_names, rng)))}

    loader = LatentLoader(cache, 12, 3, flip=False, entries=entries)
    numbers = cache.source_index[loader.rows(0)[0]]
    expected = [
        len(f"a long text about {i}") if i % 6 == 0 else len(f"number {i}, zażółć") if i % 3 == 0 else len("ant") for i in numbers
    ]
    assert loader.batch(0)["length"].tolist() == expected
    assert any(i % 6 == 0 for i in numbers)


def test_every_epoch_is_complete_and_in_another_order(cache):
    """Records repeated or lost where a batch runs across the border of two epochs, or is longer than one."""
    for batch_size in (24, 3 * N + 5):
        loader = LatentLoader(cache, batch_size, 3, flip=True)
        records = np.concatenate([loader.rows(step)[0] for step in range(20)])[: 6 * N].reshape(-1, N)
        np.testing.assert_array_equal(np.sort(records), np.broadcast_to(np.arange(N), records.shape))
        assert len({tuple(epoch) for epoch in records}) == len(records)


def test_a_batch_depends_on_seed_and_step_alone(cache):
    """A loader with a state: another batch after a restart, or from the same loader asked twice."""
    loader = LatentLoader(cache, 24, 3, flip=True)
    steps = take(loader, 9)
    for step in (0, 4, 8):
        assert_same(take(LatentLoader(cache, 24, 3, flip=True), 1, step)[0], steps[step])
        assert_same(loader.batch(step), steps[step])
    assert (LatentLoader(cache, 24, 4, flip=True).rows(0)[0] != loader.rows(0)[0]).any()


@pytest.mark.parametrize("resident", [False, True])
def test_hosts_side_by_side_are_one_host(cache, resident):
    """Records or flips drawn per host."""
    whole = take(LatentLoader(cache, 24, 3, flip=True, resident=resident), 8)
    parts = [take(LatentLoader(cache, 24, 3, True, index, 3, resident), 8) for index in range(3)]
    for step, batch in enumerate(whole):
        assert_same({k: np.concatenate([part[step][k] for part in parts]) for k in batch}, batch)


def test_moments_labels_and_flips(folder, cache):
    """A label of another record; flips that are not drawn anew, not half, or drawn although none are wanted."""
    loader = LatentLoader(cache, 40, 1, flip=True)
    moments, mirrors = all_moments(folder), []
    for step, batch in enumerate(take(loader, 50)):
        records, rows = loader.rows(step)
        assert batch["moments"].dtype == np.float16 and batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], cache.labels[records])
        np.testing.assert_array_equal(batch["moments"], moments[rows])
        np.testing.assert_array_equal(rows // 2, records)
        mirrors.append(rows % 2)
    assert abs(np.mean(mirrors) - 0.5) < 4 * 0.5 / np.sqrt(2000)
    assert len({tuple(m) for m in mirrors}) == 50
    assert not any((LatentLoader(cache, 40, 1, flip=False).rows(step)[1] % 2).any() for step in range(5))


@pytest.mark.parametrize("shape", [(4, 2, 1), (2, 2, 2), (8, 1, 1)])
def test_resident_rows_are_the_gathered_ones(cache, shape):
    """A device that holds another part than the row numbers mean; a padding that shifts."""
    mesh = make_mesh(*shape)
    moments = resident_moments(cache, mesh)
    ways = shape[0] * shape[1]
    assert moments.shape[0] % ways == 0 and 2 * N <= moments.shape[0] < 2 * N + ways and moments.dtype == np.float16
    assert moments.addressable_shards[0].data.shape[0] == moments.shape[0] // ways
    resident, mapped = (take(LatentLoader(cache, 24, 3, True, resident=r), 6) for r in (True, False))
    for rows, batch in zip(resident, mapped, strict=True):
        assert rows["row"].dtype == np.int32
        np.testing.assert_array_equal(jax.jit(lambda x, row: x[row])(moments, rows["row"]), batch["moments"])
        np.testing.assert_array_equal(rows["label"], batch["label"])


def test_resident_moments_that_do_not_fit(cache):
    """A device that runs out of memory in the middle of a run's start."""

    class Device:
        def memory_stats(self):
            return {"bytes_limit": 1000, "bytes_in_use": 500}

    mesh = types.SimpleNamespace(shape={"data": 4, "fsdp": 1}, local_devices=[Device()])
    with pytest.raises(UserError, match="use more devices"):
        resident_moments(cache, mesh)


def test_errors_of_the_thread_reach_the_caller(cache, monkeypatch):
    """A training that waits for ever for a batch; threads that stay behind."""
    loader = LatentLoader(cache, 24, 3, flip=True)
    before = threading.active_count()
    monkeypatch.setattr(cache, "gather", lambda rows: 1 / 0)
    batches = loader.batches()
    with pytest.raises(ZeroDivisionError):
        next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    monkeypatch.undo()
    for _ in range(20):
        with loader.batches() as batches:
            next(batches)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    "fields, error, text",
    [
        ({"batch_size": 7, "process_count": 2}, UserError, "multiple of the 2 processes"),
        ({"batch_size": 0}, UserError, "positive"),
        ({"seed": -1}, ValueError, "seed"),
        ({"process_index": 1}, ValueError, "process_index"),
    ],
)
def test_bad_arguments(cache, fields, error, text):
    """A value that is cast or clamped."""
    with pytest.raises(error, match=text):
        LatentLoader(cache, **{"batch_size": 8, "seed": 0, "flip": False, **fields})
    with pytest.raises(ValueError, match="start_step"):
        LatentLoader(cache, 8, 0, False).batches(-1)


def test_check(weights, cache, tmp_path):
    """Latents of other weights or another size of image, taken for the config's; scale and dtype, which do not matter."""
    sha256 = cache.manifest["codec"]["weights_sha256"]
    cache.check(CODEC, sha256, ImageTransform(8, 3, flip=True))
    cache.check(dataclasses.replace(CODEC, scale=(3.0, 4.0), shift=1.0, dtype="bfloat16"), sha256, ImageTransform(8, 3, False))
    with pytest.raises(UserError) as error:
        cache.check(dataclasses.replace(CODEC, norm_groups=2), "0" * 64, ImageTransform(16, 1, True, upright=True))
    for field in (
        "codec.norm_groups: 4 in the cache, 2 wanted",
        "codec.weights_sha256",
        "transform.resolution: 8 in the cache",
        "transform.channels",
        "transform.upright: False in the cache",
    ):
        assert field in str(error.value)
    encode(job(weights, mirror=False), tmp_path, 0.05)
    still = LatentCache(tmp_path)
    assert still.views == 1 and LatentLoader(still, 8, 0, flip=False).rows(0)[1].max() < N
    with pytest.raises(UserError, match="no mirror images"):
        still.check(CODEC, sha256, ImageTransform(8, 3, True))
    with pytest.raises(UserError, match="no mirror images"):
        LatentLoader(still, 8, 0, flip=True)


def test_check_knows_images_that_are_not_square(weights, tmp_path):
    """Latents of another shape taken for the config's: height and width swapped, or a square of the same height."""
    encode(job(weights, size=(8, 12)), tmp_path, 0.05)
    wide = LatentCache(tmp_path)
    sha256 = wide.manifest["codec"]["weights_sha256"]
    assert wide.moments_shape == (4, 6, 4)
    wide.check(CODEC, sha256, ImageTransform(99, 3, True, size=(8, 12)))
    for transform, text in (
        (ImageTransform(8, 3, True), "transform.size: .8, 12. in the cache, None wanted"),
        (ImageTransform(8, 3, True, size=(12, 8)), "transform.size: .8, 12. in the cache, .12, 8. wanted"),
    ):
        with pytest.raises(UserError, match=text):
            wide.check(CODEC, sha256, transform)


@dataclasses.dataclass(frozen=True)
class ClipCodec:
    """Says the shapes of a codec that halves time and space; it encodes nothing."""

    image_channels: int = 3
    scale: float = 1.0
    shift: float = 0.0
    dtype: str = "float32"

    def latent_shape(self, shape):
        return 2, 4, 6, 2


def test_moments_of_clips(tmp_path):
    """Statistics over some axes only, rows that lose their frames, a loader or device copy that knows images alone."""
    cache_job = Job(Photographs(10, ()), ClipCodec(), {}, (8, 12), shard_records=4)
    (tmp_path / "settings.json").write_bytes(sealed(cache_job.settings))
    x = np.random.default_rng(0).standard_normal((20, 2, 4, 6, 4)).astype(np.float16)
    for number in range(cache_job.num_shards):
        shard = Shard(cache_job, number)
        shard.count = shard.stop - shard.start
        shard.moments[:] = x[2 * shard.start : 2 * shard.stop]
        shard.labels[:], shard.index[:] = 0, np.arange(shard.start, shard.stop)
        shard.texts = {"captions": [None] * shard.count, "long_captions": [None] * shard.count}
        shard.write(tmp_path, digest(cache_job.settings))
    manifest = finish(tmp_path, 0.0, first=True)
    mean, log_variance = np.split(x.astype(np.float64), 2, axis=-1)
    np.testing.assert_allclose(manifest["latents"]["mean"], mean.mean((0, 1, 2, 3)), rtol=1e-12)
    variance = mean.var((0, 1, 2, 3)) + np.exp(log_variance).mean((0, 1, 2, 3))
    np.testing.assert_allclose(np.square(manifest["latents"]["std"]), variance, rtol=1e-12)
    clips = LatentCache(tmp_path)
    np.testing.assert_array_equal(clips.gather(np.array([13, 0, 19])), x[[13, 0, 19]])
    loader = LatentLoader(clips, 6, 0, flip=True)
    np.testing.assert_array_equal(loader.batch(3)["moments"], x[loader.rows(3)[1]])
    resident = resident_moments(clips, make_mesh(2, 1, 1, devices=jax.devices()[:2]))
    np.testing.assert_array_equal(np.asarray(resident)[:20], x)


def test_what_is_no_cache_is_refused(copy, tmp_path):
    """A stack trace, or batches from a cache that is half there."""
    with pytest.raises(UserError, match="empty"):
        LatentCache("")
    with pytest.raises(UserError, match="not a latent cache"):
        LatentCache(tmp_path)
    (copy / "00001-of-00003.labels.npy").unlink()
    with pytest.raises(UserError, match=r"00001-of-00003\.labels\.npy: No such file"):
        LatentCache(copy, verify=False)
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        LatentCache(copy)


def test_a_shorter_file_is_found_without_hashing(copy):
    """The process killed by the operating system when it reads past the end of a mapped file."""
    path = copy / "00000-of-00003.moments.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"00000-of-00003\.moments\.npy has .* bytes instead of"):
        LatentCache(copy, verify=False)


def test_without_verify_the_bytes_are_trusted(copy):
    """A flag that does nothing: minutes of hashing for those who asked to skip it."""
    flip_byte(copy / "00000-of-00003.moments.npy")
    assert len(LatentCache(copy, verify=False)) == N
    with pytest.raises(UserError, match="1 of 19 files"):
        LatentCache(copy)


@pytest.mark.parametrize("name", ["../secret.npy", "/etc/passwd", "00000-of-00003.index.npy"])
def test_names_outside_the_folder(copy, name):
    """A manifest from elsewhere that reads other files of this machine."""
    manifest = read_sealed(copy / "manifest.json")
    manifest["shards"][0]["files"]["labels"]["name"] = name
    (copy / "manifest.json").write_bytes(sealed(manifest))
    with pytest.raises(UserError, match="it was edited"):
        LatentCache(copy)


def test_the_fingerprint_changes_with_the_data(folder, weights, tmp_path):
    """A run that goes on with another cache in the same place."""
    encode(job(weights, shard_records=69), tmp_path, 0.05)
    assert LatentCache(folder).fingerprint == LatentCache(folder).fingerprint != LatentCache(tmp_path).fingerprint


def test_a_cache_that_goes_away(copy, tmp_path):
    """A memory map that ends the process (SIGBUS) where a file was truncated; a cache that is away taken for a damaged one."""
    cache = LatentCache(copy)
    expected = cache.gather(np.arange(2 * N))
    cache._open_files._open.cache_clear()
    copy.rename(tmp_path / "away")
    with pytest.raises(Unavailable, match=r"moments\.npy: No such file"):
        cache.gather(np.arange(3))
    (tmp_path / "away").rename(copy)
    np.testing.assert_array_equal(cache.gather(np.arange(2 * N)), expected)
    first = min(copy.glob("*.moments.npy"))
    os.truncate(first, first.stat().st_size - 1)
    with pytest.raises(UserError, match="ends within row 57: it was truncated"):
        cache.gather(np.arange(2 * N))
