"""Texts of training examples: captions, long captions, templates, and their way into batches."""

import numpy as np
import pytest
from numbered import Letters, Numbers

from dit_jax.data.captions import CaptionedImage, CaptionEntries, Captions, filled
from dit_jax.data.loader import Loader
from dit_jax.data.sources.digits import DigitPairs, Digits
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import UserError

EXAMPLE = {"label": 1, "name": "x.jpg", "caption": "short", "caption_long": "long"}


def entries(dropout=None, **fields):
    return CaptionEntries(Captions(**fields), ("cat", "owl"), Letters(), dropout)


@pytest.mark.parametrize("rate", [0.0, 0.95, 1.0])
def test_share_of_long_captions(rate):
    """Catches a rate that is ignored at 0 or 1, or that is not the share of long captions."""
    captions = Captions(long_caption_rate=rate)
    texts = [captions.of(EXAMPLE, (), np.random.default_rng(i)) for i in range(2000)]
    share = np.mean([text == "long" for text in texts])
    assert share == rate if rate in (0, 1) else abs(share - rate) < 0.015
    assert captions.of(EXAMPLE, (), None) == "short"


def test_templates():
    """Catches a template that replaces an own caption, one that is never drawn, "a owl", and an example without a long text."""
    captions = Captions(("{a} {name}", "a photo of {a} {name}"), (), (), 1.0)
    bare = {"label": 1, "name": "y.jpg"}
    drawn = {captions.of(bare, ("cat", "owl"), np.random.default_rng(i)) for i in range(30)}
    assert drawn == {"an owl", "a photo of an owl"}
    assert captions.of(EXAMPLE | {"caption_long": ""}, ("cat", "owl"), np.random.default_rng(0)) == "short"
    assert captions.of(bare, ("cat", "owl"), None) == "an owl" and filled("{a} {name}", "cat") == "a cat"
    assert captions.all_of(("cat",)) == ["a cat", "a photo of a cat"]


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"long_caption_rate": 1.5}, "must lie in 0 to 1"),
        ({"templates": ("a {class}",)}, "may have {name} and {a}"),
        ({"templates": ("a {",)}, "may have {name} and {a}"),
    ],
)
def test_fields_that_are_wrong(fields, words):
    """Catches templates that end in a KeyError at the first example."""
    with pytest.raises(UserError, match=words):
        Captions(**fields)


def test_data_without_captions():
    """Catches training on empty texts: an error before training where a set has none, and by name for a single image."""
    with pytest.raises(UserError, match=r"no captions; write them beside the images"):
        Captions().check(Digits())
    with pytest.raises(UserError, match=r"names has 2 names and the data set 10 classes"):
        Captions(("{name}",), names=("a", "b")).check(Digits())
    with pytest.raises(UserError, match=r"need the classes of labelled data"):
        Captions(("{name}",)).check(DigitPairs(count=3))
    Captions(("{name}",)).check(Digits())
    for caption in ({}, {"caption": ""}):
        with pytest.raises(UserError, match=r"x\.jpg has no caption; write it, or set"):
            Captions().of({"label": 0, "name": "x.jpg"} | caption, (), None)


def test_dropout_of_encoders():
    """Catches rates of another encoder, encoders that are dropped together, and one that is dropped in an evaluation."""
    of = entries((0.0, 0.5, 0.5))
    present = np.stack([of(EXAMPLE, np.random.default_rng(i))["present"] for i in range(2000)])
    assert present.dtype == bool and present[:, 0].all()
    np.testing.assert_allclose(present[:, 1:].mean(0), 0.5, atol=0.04)
    assert abs((present[:, 1] & present[:, 2]).mean() - 0.25) < 0.04
    assert of(EXAMPLE, None)["present"].all() and "present" not in entries()(EXAMPLE, None)


def loader(workers, process=0, processes=1):
    source = Numbers(30, captions=range(30), bad=(4,))
    transform = CaptionedImage(ImageTransform(2, 1, True), entries((0.3,), long_caption_rate=0.5))
    return Loader(source, transform, 12, 3, workers, 4, max_bad_share=0.1, process_index=process, process_count=processes)


def batches_of(*arguments):
    with loader(*arguments).batches() as batches:
        return [next(batches) for _ in range(4)]


def test_batches_do_not_depend_on_the_readers():
    """Catches texts and dropped encoders that change with the number of hosts, and a text of another image after a bad record."""
    whole, parts = batches_of(0), [batches_of(0, process, 2) for process in range(2)]
    for step, batch in enumerate(whole):
        assert batch.keys() == {"image", "label", "tokens_letters", "present"} and batch["tokens_letters"].shape == (12, 2)
        for name, x in batch.items():
            np.testing.assert_array_equal(x, np.concatenate([part[step][name] for part in parts]))
        lengths = [len(f"the number {label}") for label in batch["label"]]
        np.testing.assert_array_equal(batch["tokens_letters"][:, 1], lengths)
    assert len({bool(x) for batch in whole for x in batch["present"][:, 0]}) == 2


@pytest.mark.slow
def test_batches_of_workers():
    """Catches entries of captions that change with worker processes, or that cannot be pickled."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    for one, other in zip(batches_of(0), batches_of(2), strict=True):
        for name, x in one.items():
            np.testing.assert_array_equal(x, other[name])


def test_digit_pairs():
    """Catches a pair whose caption is in another order than its digits, and examples that change from one read to the next."""
    source, digits = DigitPairs(count=50), Digits()
    assert len(source) == 50 and len({source[i]["caption"] for i in range(50)}) > 30
    for i in (0, 7):
        image, again = source[i]["image"], source[i]["image"]
        assert image.shape == (8, 16, 1) and (image == again).all()
        first, second = source[i]["caption"].split()
        halves = np.split(image, 2, axis=1)
        words = [next(digits[j]["label"] for j in range(len(digits)) if (digits[j]["image"] == half).all()) for half in halves]
        from dit_jax.data.sources.digits import WORDS

        assert [WORDS[label] for label in words] == [first, second]
        assert first in source[i]["caption_long"] and source[i]["caption_long"].endswith(second)
