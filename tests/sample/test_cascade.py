"""Super-resolution stages: what they are trained on, and drawing with a cascade."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from runs import load_config, save_run
from verbs import refused, run_verbs

import dit_jax
from dit_jax.build import Run
from dit_jax.diffusion.flow import Flow
from dit_jax.errors import UserError
from dit_jax.models.video_dit import between_frames
from dit_jax.sample import cascade
from dit_jax.sample.jobs import Upsample
from dit_jax.tasks.low_resolution import LowResolution

CONSTANTS = {"codec": {}}
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8),
    "label": np.arange(4, dtype=np.int32),
}


def config(stage, **overrides):
    c = load_config("digits_cascade", f"stage={stage}")
    small = {"channels": 16, "head_width": 16, "norm_groups": 8} if stage == "adm" else {"depth": 1, "width": 16, "heads": 2}
    c.model.update(small)
    c.sampler.num_steps = 3
    return tiny.shorten(c, **overrides)


def test_the_lower_resolution():
    """Catches pixels that are picked in place of their mean, other frames than every second, and noise of another level."""
    clip = np.random.default_rng(1).normal(size=(2, 5, 4, 6, 1))
    low = LowResolution(sides=2, frames=2, most_noise=0.4)
    assert low.shape((5, 4, 6, 1)) == (3, 2, 3, 1) and LowResolution(frames=2).shape((4, 4, 6, 1)) == (2, 4, 6, 1)
    wanted = [[[clip[b, f, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for j in range(3)] for i in range(2)] for b in (0, 1)
              for f in (0, 2, 4)]  # fmt: skip
    made = low.of(jnp.asarray(clip))
    np.testing.assert_allclose(made, np.reshape(wanted, (2, 3, 2, 3, 1)), atol=1e-6)
    drawn = [low.draw(jax.random.key(k), Flow(), jnp.ones((64, 4, 4, 1))) for k in (0, 1)]
    levels = np.concatenate([d["low_res_level"] for d in drawn])
    assert 0 <= levels.min() < 0.02 and 0.38 < levels.max() <= 0.4
    for d in drawn:  # Flow: (1 - t) x + t z
        t = np.asarray(d["low_res_level"])[:, None, None, None]
        z = (np.asarray(d["low_res"]) - (1 - t)) / t
        assert abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.05


def test_frames_between():
    """Catches frames of the lower rate that stand elsewhere than where they were taken from."""
    for frames in (8, 9):  # k and 1 + k times 4
        low = jnp.arange(float(frames))[None, ::4]
        np.testing.assert_allclose(between_frames(low, frames, 4)[0], np.minimum(np.arange(frames), 4 * (low.shape[1] - 1)))
    np.testing.assert_array_equal(between_frames(jnp.ones((1, 1, 2)), 3, 4), jnp.ones((1, 3, 2)))
    with pytest.raises(UserError, match="has 3 frames, and the input of 8 needs 2"):
        between_frames(jnp.zeros((1, 3)), 8, 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", ["second", "adm"])
def test_training(stage):
    """Catches a loss whose network sees the clean lower resolution, another example's, or none where the label is dropped."""
    task = Run(config(stage)).task
    params = tiny.random_params(task.init_params(jax.random.key(0)))
    inputs = task.draw_inputs(CONSTANTS, BATCH, jax.random.key(1))
    inputs["dropped"] = jnp.array([True, False, False, False])
    images = (BATCH["image"] / 127.5 - 1 - task.codec.mean) / task.codec.std
    low = images.reshape(4, 4, 2, 4, 2, 1).mean((2, 4))
    level = inputs["batch"]["low_res_level"]
    assert tiny.distance(inputs["batch"]["low_res"], low) > 0.01
    sigma = task.process.sigma(level)[:, None, None, None]
    left = inputs["batch"]["low_res"] - task.process.perturb(low, 0 * low, level)  # sigma times noise
    assert 0.7 < float(jnp.sqrt(jnp.square(left).sum() / (jnp.square(sigma).sum() * 16))) < 1.3
    x_t = task.process.perturb(inputs["x0"], inputs["noise"], inputs["t"])
    cond = {"label": jnp.array([10, 1, 2, 3]), "low_res": inputs["batch"]["low_res"]}
    cond |= {"low_res_level": level} if stage == "second" else {}
    output = task.apply(params, x_t, task.process.network_time(inputs["t"]), cond)
    wanted = task.process.loss(output, inputs["x0"], inputs["noise"], inputs["t"])[0]
    np.testing.assert_allclose(task.loss(params, CONSTANTS, **inputs)[1]["loss"], wanted, rtol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    for number, stage in enumerate(("first", "second")):
        save_run(folder / stage, config(stage), number)
    return folder


@pytest.mark.slow
def test_stages(runs, tmp_path):
    """Catches a stage that draws from other samples than those before it, an order that is not checked, and stages that are drawn
    again although they are complete."""
    sources = [str(runs / stage) for stage in ("first", "second")]
    options = {"num_samples": None, "seed": 3, "guidance_scale": 1.5}
    done = cascade.write_stages(dit_jax.load, sources, tmp_path / "x.npz", [3, 5], 0.05, **options)
    first, last = (np.load(path)["arr_0"] for path in (done["stages"][0]["out"], done["out"]))
    assert first.shape == (2, 4, 4, 1) and last.shape == (2, 8, 8, 1)
    np.testing.assert_array_equal(first, dit_jax.load(sources[0])([3, 5], seed=3, guidance_scale=1.5).images)
    pipe = dit_jax.load(sources[1])

    def again(level):
        return pipe([3, 5], seed=3, guidance_scale=1.5, job=Upsample(first, level)).images

    np.testing.assert_array_equal(last, again(0.05))
    assert np.abs(last.astype(int) - again(0.3)).max() > 3
    made_by = json.loads(str(np.load(done["out"])["made_by"]))
    assert made_by["job"]["name"] == "upsample" and made_by["job"]["noise_level"] == 0.05
    assert cascade.write_stages(dit_jax.load, sources, tmp_path / "x.npz", [3, 5], 0.05, **options)["seconds"] < done["seconds"]
    for wrong, words in ((sources[::-1], "stage 1, .* is a super-resolution stage"), (sources[:1] * 2, "is no super-resolution")):
        with pytest.raises(UserError, match=words):
            cascade.write_stages(dit_jax.load, wrong, tmp_path / "y.npz", [3, 5], None, **options)
    for job, words in (
        (None, "draws from a lower resolution; give --job=upsample"),
        (Upsample(last), "are 8 x 8 x 1, and the stage draws 8 x 8 x 1 from 4 x 4 x 1"),
        (Upsample(first[:, :, :, 0]), r"uint8 \[N, H, W, C\]"),
    ):
        with pytest.raises(UserError, match=words):
            pipe([3, 5], job=job)


@pytest.mark.slow
def test_flags_reach_the_stages(runs, tmp_path):
    """Catches an option of the verb that draws with one network and is dropped where it draws with several."""
    stages = f"--stages={runs / 'first'},{runs / 'second'}"
    given = {
        "skip_scale=2.0 has no effect without skip_layers": "--skip_scale=2",
        "the network takes no text": "--text_encoders=clip_l=weights",
        "guidance.image_scale": "--guidance_image_scale=-1",
    }
    outcomes = run_verbs(tmp_path, [["sample", stages, flag, "--num_samples=2", "--out=x.npz"] for flag in given.values()])
    for outcome, text in zip(outcomes, given, strict=True):
        refused(outcome, text)


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"task__low_resolution": {"sides": 3}}, "sides is 3, which does not divide 8 x 8"),
        ({"task__low_resolution": {"sides": 1}}, "which is the same resolution"),
        ({"task__low_resolution": {"side": 2}}, "no field side"),
        ({"task__low_resolution": {"frames": 2}}, "the examples are images"),
        ({"task__low_resolution": {"sides": 2, "noise": 0.5}}, "0 <= noise <= most_noise <= 1"),
        ({"task__low_resolution": {}}, r"model.low_res_channels is 1, and .* has 0 channels"),
        ({"model__low_res_channels": 0}, "set --config.model.low_res_channels=1"),
        ({"preview__every_steps": 10}, r"set --config.preview.every_steps=0, and draw with sample --stages"),
    ],
)
def test_refusals(overrides, words):
    """Catches a stage that fails in the middle of its training, or that is trained without its lower resolution."""
    with pytest.raises(UserError, match=words):
        Run(config("second", **overrides)).task


def test_no_latent_cache():
    """Catches a stage that is trained from a cache, which has no lower resolution."""
    with pytest.raises(UserError, match="a cache that has none"):
        Run(config("second")).task.batch_spec("moments")
    with pytest.raises(UserError, match=r"a name that ends in .npz"):
        cascade.paths_of("folder", 2)
