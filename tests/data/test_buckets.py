"""Buckets: which shape a step has, which examples a shape has, and batches that depend on (seed, step) alone."""

import collections
import itertools
from types import SimpleNamespace

import bucketed
import numpy as np
import pytest
import tiny
from bucketed import Sized

from dit_jax.data.buckets import Buckets, Cycle
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.latent_loader import LatentBuckets
from dit_jax.data.loader import Loader, Part
from dit_jax.errors import UserError


@pytest.mark.parametrize("weights", [(1,), (1, 1), (3, 1), (5, 2, 1), (7, 7, 7, 2)])
def test_a_step_has_the_ordinal_that_counting_gives(weights):
    """A closed form that repeats or skips a batch of a bucket, at the border of a cycle too."""
    cycle, seen = Cycle(weights), collections.Counter()
    for step in range(3 * sum(weights) + 2):
        bucket, ordinal = cycle.at(step)
        assert ordinal == seen[bucket]
        seen[bucket] += 1
    assert cycle.at(10**12 * sum(weights)) == (cycle.at(0)[0], 10**12 * weights[cycle.at(0)[0]])


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (5, 2, 1), (10, 1)])
def test_buckets_are_spread_evenly(weights):
    """All steps of a bucket in a row: the network forgets, and the loss has waves."""
    order = Cycle(weights).order
    for number, weight in enumerate(weights):
        counts = np.cumsum(order == number)
        assert counts[-1] == weight
        wanted = np.arange(1, len(order) + 1) * weight / len(order)
        assert np.abs(counts - wanted).max() < 1.5
    assert Cycle((3, 1)).order.tolist() == [0, 0, 1, 0]


def test_examples_fall_to_the_nearest_shape_that_they_fill():
    """Landscapes in the portrait bucket, a clip that is too short, an image that no bucket of clips can use."""
    buckets = Buckets(((1, 8, 8, 4), (1, 8, 16, 4), (1, 16, 8, 4), (1, 32, 32, 4), (4, 8, 8, 4)))
    sizes = np.array([[1, 10, 10, 0], [1, 10, 19, 0], [3, 30, 10, 0], [3, 10, 10, 8], [4, 99, 9, 8], [0, 0, 0, 0], [9, 5, 5, 16]])
    square, wide, tall, large, clip = buckets.members(sizes, len(sizes))
    assert square.tolist() == large.tolist() == [0, 5]  # images, as there are some
    assert wide.tolist() == [1, 5] and tall.tolist() == [2, 4, 5] and clip.tolist() == [4, 5, 6]
    # at 4 frames per second a clip of 4 frames needs 7 of 8 per second, and 13 of 16
    clips = Buckets(((1, 8, 8, 4), (4, 8, 8, 4)))
    assert [x.tolist() for x in clips.members(sizes[[4, 6]], 2, fps=8)] == [[0, 1], [0, 1]]
    with pytest.raises(UserError, match="none of the 2 examples belongs to the bucket 4x8x8"):
        clips.members(sizes[[4, 6]], 2, fps=4)
    assert [x.tolist() for x in buckets.members(None, 3)] == 5 * [[0, 1, 2]]


@pytest.mark.parametrize(
    "classes, message",
    [
        (((4, 8, 8),), r"\(4, 8, 8\); each must be"),
        ((4, 8, 8, 1), "has 4; each must be"),
        (((4, 8, 8, 0.5),), "has 0.5"),
        (((4, 8, 8, 2, 0),), "has 0 in"),
        (((4, 8, 8, 2, 0.3),), "weights 3 and 7"),
        (((4, 8, 8, 2), (4, 8, 8, 3)), "4x8x8 twice"),
        (((4, 8, 8, 2, 9_000), (1, 8, 8, 2, 2_000)), "11,000 steps"),
    ],
)
def test_bad_classes(classes, message):
    """A section that fails in the middle of a run, or is understood in another way than it was meant."""
    with pytest.raises(UserError, match=message):
        Buckets(classes)


SHAPES = ((1, 8, 8, 12, 1), (4, 8, 8, 8, 2), (4, 8, 12, 4, 1))
SIZES = ((1, 8, 8, 0), (6, 8, 8, 8), (5, 8, 12, 8))


def loader(index=0, count=1, seed=3, source=None, **options):
    buckets, source = Buckets(SHAPES), source or Sized(60, SIZES)
    records = buckets.members(source.sizes(), len(source))
    parts = [
        Part(ClipTransform(b.frames, 8, 1, True, size=(b.height, b.width)), b.batch_size, seed + k, numbers)
        for k, (b, numbers) in enumerate(zip(buckets.all, records, strict=True))
    ]
    return Loader(
        source, parts[0].transform, parts[0].batch_size, seed, process_index=index, process_count=count, parts=parts,
        cycle=buckets.cycle, **options,
    )  # fmt: skip


def take(loader, steps, start=0):
    with loader.batches(start) as batches:
        return list(itertools.islice(batches, steps))


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_batches_of_buckets():
    """Batches of another shape than that of their step, or of examples of another bucket."""
    batches = take(loader(), 8)
    shapes = [SHAPES[bucket] for bucket in Buckets(SHAPES).cycle.order] * 2
    assert [x["image"].shape for x in batches] == [(b, f, h, w, 1) for f, h, w, b, _ in shapes]
    for batch in batches:
        frames, width = batch["image"].shape[1], batch["image"].shape[3]
        index, number = batch["image"][:, :, 0, 0, 0].astype(int), batch["image"][:, :, 1, 0, 0].astype(int)
        np.testing.assert_array_equal(index[:, 0] % 10, batch["label"])
        np.testing.assert_array_equal(index, index[:, :1] + np.zeros(frames, int))  # one clip
        np.testing.assert_array_equal(number, number[:, :1] + np.arange(frames))  # frames in order
        assert set((index[:, 0] % 3).tolist()) == {(1, 8): {0}, (4, 8): {1}, (4, 12): {2}}[frames, width]


def test_every_bucket_has_epochs():
    """Examples that are repeated or lost within an epoch of their bucket."""
    labels = [x["label"] for x in take(loader(), 16) if x["image"].shape[3] == 12]  # 20 examples, 5 batches of 4 an epoch
    assert len(labels) == 4
    counts = collections.Counter(np.concatenate(labels).tolist())
    assert max(counts.values()) <= 2


@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_resumed_run_has_the_same_batches(start):
    """Buckets that begin again with their first batch after a resume."""
    assert_same(take(loader(), 4, start), take(loader(), start + 4)[start:])


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_every_batch(count):
    """Hosts with different buckets at a step, or whose rows together are another batch."""
    whole = take(loader(), 6, 2)
    hosts = [take(loader(index, count), 6, 2) for index in range(count)]
    assert_same([{k: np.concatenate([host[s][k] for host in hosts]) for k in whole[s]} for s in range(6)], whole)


def test_threads_do_not_matter():
    """Rows in the order in which threads finish."""
    assert_same(take(loader(num_threads=1), 6), take(loader(num_threads=8), 6))


@pytest.mark.slow
def test_workers_do_not_matter(parsed_flags):
    """A worker that begins with another step, or takes turns with the wrong one."""
    assert_same(take(loader(num_workers=2), 6, 3), take(loader(), 6, 3))


def test_bad_records_are_replaced_within_their_bucket(capsys):
    """A replacement of another shape, which no batch can hold; a bad record that is reported with its place in the bucket."""
    source = Sized(60, SIZES, bad=(4, 7))
    with loader(source=source, max_bad_share=0.1).batches() as batches:
        shapes = [next(batches)["image"].shape for _ in range(12)]
        assert set(batches.bad_records) == {4, 7}
    assert {shape[1:] for shape in shapes} == {(1, 8, 8, 1), (4, 8, 8, 1), (4, 8, 12, 1)}
    assert "bad record 4" in capsys.readouterr().err


def test_batch_sizes_divide_among_hosts():
    """A bucket whose rows some host does not have."""
    with pytest.raises(UserError, match="batch_size=8 must be a positive multiple of the 3"):
        loader(0, 3)


def test_caches_take_turns():
    """A bucket whose cache is read with the number of the step in place of that of its batch; an iterator that loses a step."""
    loaders = [SimpleNamespace(batch=lambda ordinal, k=k: {"at": (k, ordinal)}, retry_seconds=0.0) for k in range(2)]
    loader = LatentBuckets(loaders, Cycle((2, 1)), source=None)
    with loader.batches(4) as batches:
        assert [next(batches)["at"] for _ in range(5)] == [(1, 1), (0, 3), (0, 4), (1, 2), (0, 5)]


def test_seeds_of_buckets_differ():
    """Buckets of the same examples that take them in the same order, so that a batch of clips repeats the one of images."""
    run = tiny.run_on_one_device(bucketed.config(data={"name": "sized", "count": 40, "knows": False}))
    first, second = (part.seed for part in run.loader.parts)
    assert first != second
    assert (
        tiny.run_on_one_device(bucketed.config(data={"name": "sized", "count": 40, "knows": False}, seed=1)).loader.parts[0].seed
        != first
    )
