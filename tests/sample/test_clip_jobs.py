"""Jobs on clips: what is given comes back unchanged, stands where it should, and leads the rest."""

import json

import numpy as np
import pytest
from PIL import Image
from runs import save_run
from verbs import refused, run_verbs

import dit_jax
from dit_jax import recipes
from dit_jax.errors import UserError
from dit_jax.sample.clip_files import write_clips
from dit_jax.sample.grid import write_animation
from dit_jax.sample.jobs import Animate, Connect, Edit, Extend, Inpaint, Loop
from dit_jax.sample.jobs.given import cells, read_clips
from dit_jax.sample.jobs.given_frames import latent_frames

RNG = np.random.default_rng(3)
CLIP = RNG.integers(0, 256, (3, 8, 8, 1), np.uint8)
FAST = {"prompt": "a three rolling left", "guidance_scale": 1.5}


def config():
    c = recipes.rolling_digits().copy_and_resolve_references()
    c.unlock()
    c.model.update({"depth": 1, "width": 16, "heads": 1, "rope_widths": (4, 6, 6), "context_width": 8, "pooled_width": 8})
    c.conditioner.width = 8
    c.sampler.num_steps = 2
    return c.lock()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "run"
    save_run(folder, config(), 0)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return dit_jax.load(folder)


@pytest.fixture(scope="module")
def window(pipe):
    """A function that draws a window with these given frames at these places."""
    return lambda frames, places: pipe(job=Animate(np.stack(frames)[None], places), **FAST).images[0]


def test_an_animation_begins_with_the_image(pipe, window):
    """Catches an image at another frame, one that the network is not told, and a result that a name of the job changes."""
    drawn = pipe(job=Animate(CLIP[:1]), **FAST).images
    assert drawn.shape == (1, 4, 8, 8, 1)
    np.testing.assert_array_equal(drawn[0, 0], CLIP[0])
    np.testing.assert_array_equal(drawn, pipe(job="animate", given=CLIP[:1], **FAST).images)
    other = pipe(job=Animate(CLIP[1:2]), **FAST).images
    assert (other[0, 1:] != drawn[0, 1:]).any()
    last = window([CLIP[0]], [3])
    np.testing.assert_array_equal(last[3], CLIP[0])


def test_several_images_are_animated_with_a_prompt_each(pipe):
    """Catches given images in another order than the prompts."""
    both = pipe(job=Animate(CLIP[:2]), prompt=["a one rolling up", "a still two"], guidance_scale=1.5).images
    np.testing.assert_array_equal(both[:, 0], CLIP[:2])


def test_a_clip_is_extended_forward_in_windows(pipe, window):
    """Catches a window that begins with other frames than the last, new frames in a wrong order, and given frames that change."""
    drawn = pipe(job=Extend(CLIP), **FAST).images[0]
    assert drawn.shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(drawn[:3], CLIP)
    np.testing.assert_array_equal(drawn[1:], window(CLIP[1:], [0, 1]))
    longer = pipe(job=Extend(CLIP, num_frames=8), **FAST).images[0]
    assert longer.shape == (8, 8, 8, 1)  # of three windows, whose last frame is left out
    np.testing.assert_array_equal(longer[:3], CLIP)
    assert np.abs(longer[:5].astype(int) - drawn).max() <= 1  # another program rounds differently


def test_a_clip_is_extended_backward_in_windows(pipe, window):
    """Catches windows that are joined in the order in which they are drawn."""
    drawn = pipe(job=Extend(CLIP, (2, 3)), **FAST).images[0]
    np.testing.assert_array_equal(drawn[2:], CLIP)
    np.testing.assert_array_equal(drawn[:4], window(CLIP[:2], [2, 3]))
    longer = pipe(job=Extend(CLIP, (2, 3), num_frames=8), **FAST).images[0]
    assert longer.shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(longer[5:], CLIP)
    assert np.abs(longer[3:].astype(int) - drawn).max() <= 1


def test_two_clips_are_connected(pipe, window):
    """Catches a bridge between other frames than the last of one clip and the first of the other."""
    clips = np.concatenate([CLIP[:2], CLIP[2:], CLIP[:1]])
    drawn = pipe(job=Connect(clips), **FAST).images[0]
    assert len(drawn) == 6
    np.testing.assert_array_equal(drawn[[0, 1, 4, 5]], clips)
    np.testing.assert_array_equal(drawn[1:5], window([clips[1], clips[2]], [0, 3]))


def test_a_loop_leads_back_to_its_first_frame(pipe, window):
    """Catches a bridge in the wrong direction, and a first frame that is played twice."""
    drawn = pipe(job=Loop(CLIP), **FAST).images[0]
    assert len(drawn) == 5
    np.testing.assert_array_equal(drawn[:3], CLIP)
    np.testing.assert_array_equal(drawn[3:], window([CLIP[2], CLIP[0]], [0, 3])[1:3])
    alone, plain = pipe(job=Loop(), **FAST).images[0], pipe(**FAST).images[0]
    assert len(alone) == 4 and np.abs(alone[:2].astype(int) - plain[:2]).max() <= 1


def test_a_clip_is_inpainted_in_space_and_time(pipe):
    """Catches a mask of another frame or side, given pixels that change, and an image as mask that holds for one frame only."""
    clip = np.concatenate([CLIP, CLIP[:1]])
    mask = np.zeros((4, 8, 8, 1), np.uint8)
    mask[1, 2:5] = mask[3] = 255
    drawn = pipe(job=Inpaint(clip[None], mask=mask[None]), **FAST).images[0]
    np.testing.assert_array_equal(drawn[mask == 0], clip[mask == 0])
    assert (drawn[mask > 0] != clip[mask > 0]).mean() > 0.5
    column = np.zeros((8, 8), np.uint8)
    column[:, :3] = 255
    drawn = pipe(job=Inpaint(clip, mask=column), **FAST).images[0]
    np.testing.assert_array_equal(drawn[:, :, 3:], clip[:, :, 3:])
    assert (drawn[:, :, :3] != clip[:, :, :3]).mean() > 0.5


def test_a_clip_is_edited(pipe):
    clip = np.concatenate([CLIP, CLIP[:1]])
    whole = pipe(job=Edit(clip, 1.0), **FAST).images
    assert np.abs(whole.astype(int) - pipe(**FAST).images).max() <= 1  # all noise
    half = pipe(job=Edit(clip, 0.5), **FAST).images
    assert half.shape == (1, 4, 8, 8, 1) and (half != whole).any()


def test_the_given_part_has_a_scale_of_its_own(pipe):
    """Catches a scale without effect, and one that acts where nothing is given."""
    one, more = (pipe(job=Animate(CLIP[:1]), **FAST, guidance_image_scale=s).images for s in (1.0, 2.5))
    assert (one != more).any() and (more[0, 0] == CLIP[0]).all()
    plain, same = pipe(**FAST).images, pipe(**FAST, guidance_image_scale=2.5).images
    np.testing.assert_array_equal(plain, same)


@pytest.mark.parametrize(
    "job, words",
    [
        (Animate(CLIP[None]), "given has 3 frames, and job animate begins with one"),
        (Animate(CLIP[None], (0, 1)), "given has 3 frames and given_frames 2"),
        (Animate(CLIP[:1], (4,)), "the clip has 4 frames: give some of 0 to 3"),
        (Animate(), "needs what is given"),
        (Extend(CLIP, (1, 2)), "to extend, give the first frames of a window"),
        (Extend(CLIP, num_frames=3), "num_frames is 3, and the given clip has 3"),
        (Connect(CLIP), "two clips of equal length"),
        (Connect(CLIP[:2], (0, 1)), "to connect, give frames at the begin and at the end"),
        (Loop(CLIP, (0, 1)), "given_frames has no effect on job loop"),
        (Edit(CLIP, 0.5), "given has 3 frames and the network draws 4"),
        (Animate(np.zeros((1, 9, 8, 1), np.uint8)), "9 x 8 and the network draws 8 x 8"),
    ],
)
def test_what_does_not_fit_is_refused(pipe, job, words):
    with pytest.raises(UserError, match=words):
        pipe(job=job, **FAST)


def test_fields_of_a_job_that_is_an_object_are_refused(pipe):
    with pytest.raises(UserError, match="given is a field of a job"):
        pipe(job=Animate(CLIP[:1]), given=CLIP, **FAST)


def test_masks_of_a_codec_that_compresses_time():
    """Catches a latent that is held though one of its frames is to be drawn."""
    given = np.zeros((1, 9, 1, 1, 1), bool)
    given[:, :6] = True
    np.testing.assert_array_equal(latent_frames(given, 3).reshape(-1), [True, True, False])
    drawn = np.repeat(np.repeat(~given, 4, axis=2), 4, axis=3)
    np.testing.assert_array_equal(cells(drawn, (3, 2, 2, 5))[0, :, 0, 0, 0], [False, False, True])


def test_clips_are_read_from_pictures(tmp_path):
    """Catches a file of which only the first frame is read, and frames that a lossless format changes."""
    write_animation(tmp_path / "clip.webp", list(CLIP))
    np.testing.assert_array_equal(read_clips(tmp_path / "clip.webp", (8, 8, 1), False)[0], CLIP)
    np.savez(tmp_path / "clips.npz", arr_0=np.stack([CLIP, CLIP[::-1]]))
    assert read_clips(tmp_path / "clips.npz", (8, 8, 1), False).shape == (2, 3, 8, 8, 1)
    np.save(tmp_path / "images.npy", CLIP)
    assert read_clips(tmp_path / "images.npy", (8, 8, 1), False).shape == (1, 3, 8, 8, 1)
    assert read_clips(tmp_path / "images.npy", (8, 8, 1), False, one_clip=False).shape == (3, 1, 8, 8, 1)


def test_longer_clips_have_the_frequencies_of_training(folder):
    """Catches a network that is changed by the length of what it draws."""
    longer = dit_jax.load(folder, num_frames=6)
    assert longer.image_shape == (6, 8, 8, 1) and longer.run.network.rope_grid == (4, 4, 4)
    assert longer(**FAST).images.shape == (1, 6, 8, 8, 1)
    assert dit_jax.load(folder, num_frames=1)(**FAST).images.shape == (1, 8, 8, 1)  # an image


def test_a_given_file_is_not_overwritten(pipe, tmp_path):
    """Catches a picture of the results that replaces what was given."""
    write_animation(tmp_path / "x.webp", list(CLIP))
    with pytest.raises(UserError, match="would be overwritten"):
        pipe.write(tmp_path / "x.npz", job="extend", given=tmp_path / "x.webp", **FAST)


def test_clips_are_written_as_files_that_play(pipe, tmp_path):
    """Catches frames in another order or at another rate, odd sides that H.264 refuses, and images that are written as clips."""
    samples = pipe(job=Extend(CLIP), **FAST)
    paths = samples.save_clips(tmp_path / "clips.webp")
    played = read_clips(paths[0], (72, 72, 1), False)
    assert played.shape[:2] == (1, 5)
    np.testing.assert_array_equal(played[0, :, 4:68:8, 4:68:8], samples.images[0])
    with Image.open(paths[0]) as picture:
        picture.load()
        assert picture.info["duration"] == 250
    av = pytest.importorskip("av")
    write_clips(tmp_path / "odd.webp", np.repeat(samples.images[..., :7, :], 3, axis=-1), 12.5)
    with av.open(str(tmp_path / "odd.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == 5 and file.streams.video[0].average_rate == 12.5


@pytest.mark.slow
def test_the_verb(folder, tmp_path):
    """Catches flags that do not reach the job, and outputs that are missing."""
    np.save(tmp_path / "clip.npy", CLIP)
    start = ["sample", f"--workdir={folder}", "--prompt=a one", f"--given={tmp_path}/clip.npy", "--num_steps=2"]
    start.append(f"--out={tmp_path}/x.npz")
    extended, looped = run_verbs(
        tmp_path, [[*start, "--job=extend", "--num_frames=7", "--given_frames=2,3"], [*start, "--job=loop", "--given_frames=0"]]
    )
    assert extended[0] == 0, extended[2]
    told = json.loads(extended[1].splitlines()[-1])
    images = np.load(tmp_path / "x.npz")
    assert images["arr_0"].shape == (1, 7, 8, 8, 1) and told["job"]["given_frames"] == [2, 3] and images["fps"] == 4.0
    np.testing.assert_array_equal(images["arr_0"][0, 4:], CLIP)
    assert read_clips(tmp_path / "x.webp", (72, 72, 1), False).shape[1] == 7
    refused(looped, "--given_frames has no effect with --workdir --job=loop")
