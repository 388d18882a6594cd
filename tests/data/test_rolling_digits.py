"""The generated clips of rolling digits: what each example shows, and what its texts say."""

import numpy as np
import pytest

from dit_jax.data.sources import Digits, RollingDigits
from dit_jax.data.sources.rolling_digits import DIRECTIONS, all_captions
from dit_jax.errors import UserError


def test_an_example_is_a_function_of_its_number_and_rolls_by_whole_steps():
    """Catches a draw that depends on order, a roll along the wrong axis, and frames that restart at phase 0."""
    source, again = RollingDigits(), RollingDigits()
    digits = Digits()
    for index in (0, 1796, 1797 * 7 + 3, len(source) - 1):
        example = source[index]
        np.testing.assert_array_equal(example["video"], again[index]["video"])
        number, way = index % 1797, index // 1797
        direction, phase = list(DIRECTIONS)[way % 5], way // 5
        rows, columns = DIRECTIONS[direction]
        for frame in range(4):
            shift = 2 * (phase + frame)
            wanted = np.roll(digits[number]["image"], (rows * shift, columns * shift), (0, 1))
            np.testing.assert_array_equal(example["video"][frame], wanted)
        assert example["label"] == 5 * int(digits[number]["label"]) + way % 5
        assert ("still" in example["caption"]) == (direction == "still") == ("stays" in example["caption_long"])
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_clip_of_a_period_is_a_perfect_loop():
    """Catches a period that forgets sides which the step does not divide."""
    for step, size in ((2, 8), (2, 9), (3, 12)):
        source = RollingDigits(frames=20, step=step, size=size)
        clip = source.example(5, "left", 0)["video"]
        np.testing.assert_array_equal(clip[source.period], clip[0])
        assert not (clip[1 : source.period] == clip[0]).all((1, 2, 3)).any()


def test_one_frame_gives_the_digits_with_the_captions_of_images():
    source, digits = RollingDigits(frames=1), Digits()
    assert len(source) == len(digits) and source.num_classes == 10
    example = source[8]
    np.testing.assert_array_equal(example["video"][0], digits[8]["image"])
    assert (example["caption"], example["caption_long"], example["label"]) == ("an eight", "a handwritten eight", 8)


def test_images_stand_behind_the_clips_and_buckets_find_them():
    """Catches images with the captions of clips, and sizes in another order than the examples."""
    source = RollingDigits(images=True)
    sizes = source.sizes()
    assert len(source) == len(RollingDigits()) + 1797 == len(sizes)
    for index in (0, 35939, 35940, len(source) - 1):
        frames, height, width, fps = sizes[index]
        example = source[index]
        assert example["video"].shape == (frames, height, width, 1) and example["fps"] == fps
        assert (frames == 1) == (index >= 35940)
    np.testing.assert_array_equal(source[35940 + 7]["video"][0], Digits()[7]["image"])
    assert source[35940 + 8]["caption"] == "an eight"


def test_all_captions_are_those_of_the_examples():
    clips, images = RollingDigits(), RollingDigits(frames=1)
    texts = {clips[i][key] for i in range(0, len(clips), 97) for key in ("caption", "caption_long")}
    texts |= {images[i][key] for i in range(50) for key in ("caption", "caption_long")}
    assert texts == set(all_captions()) and len(all_captions()) == 120


@pytest.mark.parametrize("fields", [{"frames": 0}, {"size": 7}, {"step": 0}, {"step": 8}, {"fps": 0.0}, {"split": "half"}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(UserError):
        RollingDigits(**fields)


def test_the_fingerprint_tells_data_sets_apart():
    """Catches a resumed run that reads other clips."""
    made = [RollingDigits(), RollingDigits(frames=5), RollingDigits(step=1), RollingDigits(size=10), RollingDigits(split="test")]
    made.append(RollingDigits(images=True))
    assert len({source.fingerprint for source in made}) == len(made)
