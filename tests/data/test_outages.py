"""Storage that goes away: a short outage changes no batch, a long one ends the run, and a damaged record is bad at once."""

import errno
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
from numbered import Away, Numbers
from tar_files import encoded, write_tar

from dit_jax.data import heartbeats, retries
from dit_jax.data.latent_loader import LatentBatches
from dit_jax.data.loader import Loader, read_in_order
from dit_jax.data.sources import ImageFolder, TarShards
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import TemporaryFailure, Unavailable, UserError

STILL = ImageTransform(4, 1, False)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Hundredths of a second in place of seconds."""
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(retries, "LONGEST_PAUSE", 0.04)
    monkeypatch.setattr(retries, "MISSING_SECONDS", 0.1)


def take(loader, steps):
    with loader.batches() as batches:
        return [next(batches) for _ in range(steps)], batches.bad_records


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        for key in a | b:
            np.testing.assert_array_equal(a[key], b[key])


def image_folder(path):
    for name in ("ant", "bee"):
        (path / name).mkdir(parents=True)
        for i in range(6):
            (path / name / f"{i}.png").write_bytes(encoded(i))
    return ImageFolder(path)


def tars(path):
    write_tar(path / "a.tar", {f"{i}.{suffix}": data for i in range(12) for suffix, data in image_and_class(i)})
    return TarShards(str(path))


def image_and_class(i):
    return (("png", encoded(i)), ("cls", b"%d" % (i % 3)))


@pytest.mark.parametrize("make", [image_folder, tars])
def test_a_folder_that_is_away_for_a_moment(tmp_path, make, capsys):
    """A data folder that is renamed away and back: records counted as bad, another batch, or a run that ends."""
    source = make(tmp_path / "data")
    expected, _ = take(Loader(source, ImageTransform(8, 3, True), 4, 0), 6)
    (tmp_path / "data").rename(tmp_path / "away")
    if isinstance(source, TarShards):
        source._open_files._open.cache_clear()  # open files can be read under any name
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(tmp_path / "data"))
    back.start()
    batches, bad = take(Loader(source, ImageTransform(8, 3, True), 4, 0, max_bad_share=0.0), 6)
    assert_same(batches, expected)
    assert not bad
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2, said
    away, returned = said
    assert "No such file" in away and "trying again for 300 s (loader.retry_seconds)" in away
    assert returned.startswith("data: readable again after 0.")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_gone_for_good(number):
    """An outage that becomes 16 bad records and status 2, or one that is waited for 16 times over."""
    source = Away(50, number, after=40)
    with Loader(source, STILL, 8, 0, num_threads=4, retry_seconds=0.3).batches() as batches:
        start = time.monotonic()
        with pytest.raises(TemporaryFailure, match=rf"cannot be read any more, after 0\.3 s .*{os.strerror(number)}"):
            for _ in range(10):
                next(batches)
        assert time.monotonic() - start < 4.0  # not 16 times 0.3
    with (
        Loader(Away(50, number), STILL, 8, 0, num_threads=4, retry_seconds=0.3).batches() as batches,
        pytest.raises(UserError, match="16 consecutive records"),  # nothing was ever read: no supervisor helps
    ):
        next(batches)


def test_one_file_is_missing(capsys):
    """One lost file that ends the run, is waited for as long as for the storage, or again in every epoch."""
    source = Away(40, errno.ENOENT, only=(7,))
    with Loader(source, STILL, 20, 0, num_threads=1).batches() as batches:
        for _ in range(8):
            next(batches)
        assert list(batches.bad_records) == [7] and "No such file" in batches.bad_records[7]
    assert capsys.readouterr().err.count("trying again") == 1


def test_a_damaged_record_is_not_tried_again(capsys):
    """Minutes for a file that will never be readable."""
    start = time.monotonic()
    _, bad = take(Loader(Numbers(40, bad=(7,)), STILL, 20, 0), 4)
    assert list(bad) == [7] and time.monotonic() - start < 10.0
    assert "trying again" not in capsys.readouterr().err


def test_a_decoder_is_not_the_storage():
    """An OSError without an errno, as Pillow raises them in a user's source, that is tried again for minutes."""
    with pytest.raises(OSError, match="cannot identify"):
        take(Loader(Away(40, None), STILL, 20, 0), 1)


def test_a_start_does_not_wait():
    """A start that cannot read its data and waits for minutes, or ends with 75 and is started again for ever."""
    start = time.monotonic()
    with pytest.raises(UserError, match="40 of the 40 records"):
        Loader(Away(40, errno.EIO), STILL, 20, 0).check_small()
    assert time.monotonic() - start < 10.0


def test_the_run_is_told_that_it_waits():
    """A watchdog that ends a run which waits for its data; a signal that is answered only when the data is back."""
    told = []
    with Loader(Away(50, errno.EIO), STILL, 8, 0).batches() as batches:
        batches.on_wait(lambda: told.append(1))
        threading.Timer(0.4, batches.stop_waiting).start()
        with pytest.raises(TemporaryFailure, match="stopped while the data was away"):
            next(batches)
    assert len(told) > 5


def test_latents_are_read_again(capsys):
    """A latent cache on storage that fails for a moment, or for good."""
    end = time.monotonic() + 0.2

    def batch(step):
        if (step == 1 and time.monotonic() < end) or step == 3:
            raise Unavailable("00000-of-00001.moments.npy: Input/output error")
        return {"step": step}

    with LatentBatches(batch, 0, 0.5) as batches:
        assert [next(batches)["step"] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(TemporaryFailure, match=r"moments\.npy"):
            next(batches)
    assert "readable again" in capsys.readouterr().err


def test_read_in_order(capsys):
    """Encoding and statistics that leave out what was away for a moment, or go on without the rest of the data."""
    whole = list(read_in_order(Numbers(20), STILL, 8))
    bad: list[tuple[int, str]] = []
    source = Away(20, errno.EIO, after=5, fails=40)
    assert_same(read_in_order(source, STILL, 8, bad_records=bad), whole)
    assert not bad and "readable again" in capsys.readouterr().err
    with pytest.raises(TemporaryFailure):
        list(read_in_order(Away(20, errno.EIO, after=5), STILL, 8, bad_records=bad, retry_seconds=0.2))
    rows = read_in_order(Away(20, errno.ENOENT, only=(3,)), STILL, 20, bad_records=bad)
    assert len(next(rows)["label"]) == 19 and bad[0][0] == 3


def test_heartbeats_are_shared(monkeypatch):
    """Workers whose signs the main process does not see; shared memory with a name, which a kill leaves behind."""
    board = heartbeats.Heartbeats(2)
    copy = pickle.loads(pickle.dumps(board))
    monkeypatch.setattr(heartbeats, "_row", 2)
    assert board.last(1) == 0 and not board.waits()
    copy.read()
    assert time.monotonic() - board.last(1) < 1 and board.last(0) == 0
    assert not copy.wait(0) and board.waits()
    board.stop()
    assert copy.wait(100)
    board.close()


@pytest.mark.slow
@pytest.mark.faults
def test_an_outage_in_workers(parsed_flags, capfd):
    """Workers that wait without the main process's knowledge, so that the watchdog ends the run; their end as a bad record."""
    told, options = [], {"num_workers": 2, "num_threads": 2}
    with Loader(Numbers(50), STILL, 8, 0).batches() as batches:
        expected = [next(batches) for _ in range(3)]
    with Loader(Away(50, errno.EIO, fails=8), STILL, 8, 0, **options).batches() as batches:
        batches.on_wait(lambda: told.append(1))
        assert_same([next(batches) for _ in range(3)], expected)
    assert told and "readable again" in capfd.readouterr().err
    with (
        Loader(Away(50, errno.EIO, after=30), STILL, 8, 0, retry_seconds=1.0, num_workers=1).batches() as batches,
        pytest.raises(TemporaryFailure, match="cannot be read any more"),
    ):
        for _ in range(10):
            next(batches)


@pytest.mark.slow
@pytest.mark.faults
def test_a_worker_that_hangs(parsed_flags):
    """A run that waits for ever for a worker that hangs, and does not say which."""
    with Loader(Numbers(50), STILL, 8, 0, num_workers=2, num_threads=1, retry_seconds=1.0).batches() as batches:
        next(batches), next(batches)
        pid = batches._heartbeats.pid(1)
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(TemporaryFailure, match=rf"worker 1 of 2 \(process {pid}\) .* read nothing for 1 s"):
            for _ in range(50):
                next(batches)
