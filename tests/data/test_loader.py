"""Loader: the batch of a step depends on (seed, step) alone, and trouble in a thread or worker is an error."""

import hashlib
import multiprocessing
import subprocess
import sys

import grain
import numpy as np
import pytest
from absl import flags
from numbered import Numbers

from dit_jax.data.loader import Loader, read_in_order
from dit_jax.data.sources import Digits
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError


class Aliases(Numbers):
    """Numbers of which some are given as others: what bad records must look like once they are replaced."""

    def __init__(self, count: int, aliases: dict[int, int]):
        super().__init__(count)
        self.aliases = aliases

    def __getitem__(self, index):
        return super().__getitem__(self.aliases.get(index, index))


class EagerNoise(grain.transforms.RandomMap):
    """Draws before it decodes, so that a failed attempt has used up random numbers."""

    def random_map(self, element, rng):
        noise = rng.random(3)
        return STILL(element) | {"noise": noise}


FLIP = ImageTransform(4, 1, True)
STILL = ImageTransform(4, 1, False)


def take(loader: Loader, steps: int, start_step: int = 0) -> list[dict[str, np.ndarray]]:
    with loader.batches(start_step) as batches:
        return [next(batches) for _ in range(steps)]


def test_clips_pass_through_the_loader():
    """Frames that become rows of the batch, and a batch of clips that a transform or the stacking cannot hold."""

    class Clips(Numbers):
        def __getitem__(self, index):
            clip = np.full((3, 4, 4, 1), index, np.uint8) + np.arange(3, dtype=np.uint8)[:, None, None, None]
            return {"image": clip, "label": index}

    source = Clips(10)
    (batch,) = take(Loader(source, FLIP, 6, 0), 1)
    assert batch["image"].shape == (6, 3, 4, 4, 1)
    (rows,) = read_in_order(source, STILL, 10)
    np.testing.assert_array_equal(rows["image"], np.stack([source[i]["image"] for i in range(10)]))
    np.testing.assert_array_equal(batch["image"], rows["image"][batch["label"]])


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batch_shapes():
    """Catches batches of the global size on every host, and changed dtypes."""
    (batch,) = take(Loader(Digits(split="train"), ImageTransform(8, 1, False), 12, 0, process_count=3), 1)
    assert batch["image"].shape == (4, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


def test_every_epoch_is_complete_and_in_another_order():
    """Catches examples repeated or lost at an epoch border inside a batch, and the same order in every epoch."""
    labels = np.concatenate([b["label"] for b in take(Loader(Numbers(50), FLIP, 12, 3), 25)])[:300].reshape(6, 50)
    for epoch in labels:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert len({tuple(epoch) for epoch in labels}) == 6
    assert not any((epoch == np.arange(50)).all() for epoch in labels)


def test_examples_fewer_than_a_batch():
    """Catches a batch larger than the data set that hangs or repeats within an epoch."""
    labels = np.concatenate([b["label"] for b in take(Loader(Numbers(3), FLIP, 8, 0), 3)]).reshape(8, 3)
    assert (np.sort(labels, 1) == np.arange(3)).all()
    assert take(Loader(Numbers(1), FLIP, 2, 0), 1)[0]["label"].tolist() == [0, 0]


def test_start_step_skips():
    """Catches a resumed run that sees other batches or other mirrorings, in the first epoch and past borders."""
    loader = Loader(Numbers(50), FLIP, 12, 7)
    batches = take(loader, 14)
    for start_step in (1, 4, 5, 12):
        assert_same(take(loader, 2, start_step), batches[start_step : start_step + 2])
    assert_same(take(Loader(Numbers(50), FLIP, 12, 7), 2, 10**12), take(loader, 2, 10**12))


def test_hosts_split_the_batch_in_blocks():
    """Catches a global batch whose rows depend on the number of hosts: another slice is then another run."""
    whole = take(Loader(Numbers(50), FLIP, 24, 1), 5, 3)
    for count in (2, 3, 8):
        hosts = [take(Loader(Numbers(50), FLIP, 24, 1, process_index=i, process_count=count), 5, 3) for i in range(count)]
        joined = [{k: np.concatenate([host[s][k] for host in hosts]) for k in whole[s]} for s in range(5)]
        assert_same(joined, whole)


def test_batches_do_not_depend_on_threads_but_on_seed():
    """Catches rows in the order threads finish, a random state shared by threads, and a seed that is ignored."""
    expected = take(Loader(Numbers(90), FLIP, 20, 5, num_threads=1), 8)
    assert_same(take(Loader(Numbers(90), FLIP, 20, 5, num_threads=16), 8), expected)
    other = take(Loader(Numbers(90), FLIP, 20, 6), 8)
    assert not any(np.array_equal(a["label"], b["label"]) for a, b in zip(expected, other, strict=True))


def test_the_same_example_is_mirrored_anew_each_epoch():
    """Catches one fixed flip per example: the flip belongs to the position in the stream."""
    batches = take(Loader(Numbers(40), FLIP, 40, 2), 8)
    mirrored = np.stack([(b["image"][:, 0, 0, 0] != b["label"])[np.argsort(b["label"])] for b in batches])[:, 1:]
    assert 0.35 < mirrored.mean() < 0.65  # 312 throws, 5 sigma
    assert ((mirrored.sum(0) > 0) & (mirrored.sum(0) < 8)).mean() > 0.9


VERB = """
import hashlib, sys
from absl import app, flags
WORKERS = flags.DEFINE_integer("workers", 0, "worker processes")
FAIL = flags.DEFINE_bool("fail", False, "raise in a worker")

class Failing:
    def __init__(self, source):
        self.source = source
    def __len__(self):
        return len(self.source)
    def __getitem__(self, index):
        return self.source[index] if index != 7 else 1 / 0

def main(_):
    from dit_jax.data import loader, sources, transforms
    source = sources.Digits(split="train")
    source = Failing(source) if FAIL.value else source
    train = loader.Loader(source, transforms.ImageTransform(8, 1, True), 48, 11, WORKERS.value, 4)
    digest = hashlib.sha256()
    with train.batches(30) as batches:
        for _ in range(32 if FAIL.value else 5):
            batch = next(batches)
            digest.update(batch["image"].tobytes() + batch["label"].tobytes())
    # The last batch outlives the workers, so it must not be their shared memory.
    print(digest.hexdigest(), batch["label"].sum(), type(batch["image"]).__name__)

if __name__ == "__main__":
    app.run(main)
"""


def run_verb(folder, *arguments):
    (folder / "verb.py").write_text(VERB)
    return subprocess.run([sys.executable, "-m", "verb", *arguments], cwd=folder, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_workers_under_python_dash_m(tmp_path):
    """Catches workers that cannot start from a verb, change the batches, hang on exit or leave noise behind."""
    digest = hashlib.sha256()
    for batch in take(Loader(Digits(split="train"), ImageTransform(8, 1, True), 48, 11), 5, 30):
        digest.update(batch["image"].tobytes() + batch["label"].tobytes())
    run = run_verb(tmp_path, "--workers=2")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [digest.hexdigest(), str(batch["label"].sum()), "ndarray"]
    assert "Traceback" not in run.stderr and "leak" not in run.stderr


@pytest.mark.slow
def test_error_in_a_worker_leaves_no_shared_memory(tmp_path):
    """Catches a batch that stays in shared memory because the frames of the error hold it, and an error without its cause."""
    run = run_verb(tmp_path, "--workers=1", "--fail")
    assert run.returncode != 0 and "ZeroDivisionError: division by zero" in run.stderr
    assert "leak" not in run.stderr


def test_dead_worker_is_an_error(parsed_flags):
    """Catches a run that waits for ever for a worker the system killed."""
    with Loader(Numbers(50), FLIP, 8, 0, num_workers=1, num_threads=1).batches() as batches:
        next(batches)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(RuntimeError, match=r"data loading stopped.*exit code -9.*num_workers"):
            for _ in range(50):
                next(batches)


BAD, REPLACED = (7, 8, 30, 49), {7: 9, 8: 9, 30: 31, 49: 0}


@pytest.mark.parametrize("transform", [FLIP, EagerNoise()])
def test_bad_record_is_replaced_by_the_next(transform):
    """Catches a replacement that depends on hosts or threads, that has other random numbers, or that leaves the source."""
    expected = take(Loader(Aliases(50, REPLACED), transform, 12, 3), 14)
    source = Numbers(50, bad=BAD)
    assert_same(take(Loader(source, transform, 12, 3, max_bad_share=0.1), 14), expected)
    assert_same(take(Loader(source, transform, 12, 3, num_threads=1, max_bad_share=0.1), 3, 5), expected[5:8])
    hosts = [take(Loader(source, transform, 12, 3, max_bad_share=0.1, process_index=i, process_count=3), 5) for i in range(3)]
    assert_same([{k: np.concatenate([host[s][k] for host in hosts]) for k in expected[s]} for s in range(5)], expected[:5])


def test_bad_records_are_named_once(capsys):
    """Catches a replacement in silence, a line for every epoch, and a batch that shows the user what is not an array."""
    with Loader(Numbers(50, bad=BAD), FLIP, 10, 3, max_bad_share=0.1).batches() as batches:
        for _ in range(15):
            assert next(batches).keys() == {"image", "label"}
        assert sorted(batches.bad_records) == list(BAD)
        assert "number-30.png is not a readable image" in batches.bad_records[30]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(sum(f"number-{i}.png" in line for line in lines) == 1 for i in BAD)


@pytest.mark.parametrize(
    ("count", "bad", "share", "message"),
    [
        (400, (11,), 0.001, None),
        (400, (11, 12), 0.001, r"2 of the 400 records \(0\.50%\).*=0\.001 tolerates 1: number-1.*loader\.max_bad_share=0\.01"),
        (50, (7, 8, 30), 0.04, r"3 of the 50 .*=0\.04 tolerates 2: number-.*number-.*number-.*loader\.max_bad_share=0\.1"),
        (50, (7, 8, 30), 0.06, None),
        (100, tuple(range(0, 87, 3)), 0.29, None),
        (100, tuple(range(0, 90, 3)), 0.29, r"30 of the 100 records \(30\.00%\).*tolerates 29:.*Restore them\. Resuming a run"),
        (4, (2,), 0.0, r"1 of the 4 records"),
        (40, tuple(range(40)), 0.9, r"16 consecutive records from number \d+ .* check the storage\. number-\d+\.png is"),
        (3, (0, 1, 2), 0.9, r"3 consecutive records"),
    ],
)
def test_share_of_bad_records(count, bad, share, message):
    """Catches a limit that is off by one or rounded, and a run that goes on with what little can be read."""
    batches = Loader(Numbers(count, bad=bad), STILL, 20, 0, max_bad_share=share).batches()
    if message is None:
        with batches:
            assert len([next(batches) for _ in range(count // 20 + 1)]) and sorted(batches.bad_records) == list(bad)
        return
    with batches, pytest.raises(UserError, match=message):
        for _ in range(count // 20 + 1):
            next(batches)


def test_a_small_data_set_is_read_before_training(capsys):
    """One corrupt file of 40 that ends the run, or two that are found only when they are drawn, after the step is compiled."""
    Loader(Numbers(40, bad=(7,)), STILL, 20, 0).check_small()
    Loader(Numbers(301, bad=(7, 8)), STILL, 20, 0).check_small()  # not read: it would take long
    with pytest.raises(UserError, match=r"2 of the 40 records .*tolerates 1: number-7\.png.*; number-8\.png"):
        Loader(Numbers(40, bad=(7, 8)), STILL, 20, 0).check_small()
    with pytest.raises(UserError, match="1 of the 40"):
        Loader(Numbers(40, bad=(7,)), STILL, 20, 0, max_bad_share=0.0).check_small()


def test_bad_records_come_out_of_workers(parsed_flags):
    """Catches a worker that replaces in silence, a number or reason lost on the way, and an error that loses its type."""
    expected = take(Loader(Aliases(50, REPLACED), FLIP, 12, 3), 5)
    loader = Loader(Numbers(50, bad=BAD), FLIP, 12, 3, num_workers=2, num_threads=1, max_bad_share=0.07)
    with loader.batches() as batches:
        assert_same([next(batches)], expected[:1])
        assert set(batches.bad_records) == {7, 8, 30} and "number-30.png" in batches.bad_records[30]
        with pytest.raises(UserError, match=r"4 of the 50 records.*number-\d+\.png is not a readable image"):
            [next(batches) for _ in range(5)]


def test_workers_without_parsed_flags():
    """Catches grain's UnparsedFlagAccessError, which does not say what to do."""
    was_parsed = flags.FLAGS.is_parsed()
    flags.FLAGS.unparse_flags()
    try:
        with pytest.raises(RuntimeError, match="mark_as_parsed"):
            Loader(Numbers(4), FLIP, 2, 0, num_workers=1).batches()
    finally:
        if was_parsed:
            flags.FLAGS.mark_as_parsed()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_count": 3}, "batch_size=8 must be a positive multiple of the 3"),
        ({"process_index": 1}, "process_index=1"),
        ({"seed": -1}, "seed=-1"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_threads": 0}, "num_threads=0"),
        ({"max_bad_share": 1.0}, r"max_bad_share=1\.0 must lie in \[0, 1\)"),
        ({"max_bad_share": -0.1}, "max_bad_share=-0"),
        ({"source": Numbers(0)}, "empty"),
    ],
)
def test_bad_arguments(arguments, message):
    """Catches arguments that would fail later, inside grain or in another process."""
    with pytest.raises(ValueError, match=message):
        Loader(**({"source": Numbers(9), "transform": STILL, "batch_size": 8, "seed": 0} | arguments))
    with pytest.raises(ValueError, match="start_step=-1"):
        Loader(Numbers(9), STILL, 8, 0).batches(-1)


def test_read_in_order_reads_once():
    """Catches a lost short batch, a shuffled or mirrored read, and a range off by one."""
    batches = list(read_in_order(Numbers(11), FLIP, 4))
    assert [len(b["label"]) for b in batches] == [4, 4, 3]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), np.arange(11))
    np.testing.assert_array_equal(np.concatenate([b["image"][:, 0, 0, 0] for b in batches]), np.arange(11))
    part = list(read_in_order(Numbers(11), STILL, 4, start=3, stop=8))
    assert [b["index"].tolist() for b in part] == [[3, 4, 5, 6], [7]]
    assert list(read_in_order(Numbers(11), STILL, 4, start=5, stop=5)) == []
    with pytest.raises(ValueError, match=r"3\.\.12 is not within the 11"):
        read_in_order(Numbers(11), STILL, 4, start=3, stop=12)


def test_read_in_order_reports_bad_records():
    """Catches a bad record dropped without a report, and indices that shift after it."""
    source = Numbers(9, bad=(0, 5))
    with pytest.raises(UserError, match=r"number-0\.png"):
        list(read_in_order(source, STILL, 4))
    bad: list[tuple[int, str]] = []
    batches = list(read_in_order(source, STILL, 4, bad_records=bad))
    assert [b["index"].tolist() for b in batches] == [[1, 2, 3, 4], [6, 7, 8]]
    assert [i for i, _ in bad] == [0, 5] and "number-5.png" in bad[1][1]


def test_read_in_order_gives_captions():
    """Catches captions that shift against their images at a bad record, and a key where no image has one."""
    source = Numbers(10, bad=(1,), captions=(1, 2, 4))
    batches = list(read_in_order(source, STILL, 3, bad_records=[]))
    assert [b.get("caption") for b in batches] == [[None, "the number 2", None], ["the number 4", None, None], None]
    assert [b["label"].tolist() for b in batches] == [[0, 2, 3], [4, 5, 6], [7, 8, 9]]
    (batch,) = take(Loader(source, STILL, 8, 0, max_bad_share=0.1), 1)
    assert batch.keys() == {"image", "label"}
