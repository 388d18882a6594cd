"""Sampling jobs: edits, inpainting and interpolation, by the pipeline."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import save_run
from verbs import refused, run_verbs

import dit_jax
from dit_jax import recipes
from dit_jax.diffusion.edm import EDM
from dit_jax.diffusion.flow import Flow
from dit_jax.diffusion.gaussian import Gaussian
from dit_jax.diffusion.known import KnownRegion
from dit_jax.diffusion.process import Memoryless, Prediction
from dit_jax.diffusion.samplers import DDIM, Ancestral, DormandPrince, EulerMaruyama, Heun, UniPC
from dit_jax.errors import UserError
from dit_jax.sample.grid import image_grid
from dit_jax.sample.jobs import Edit, Inpaint, Interpolate, Job
from dit_jax.sample.jobs.given import cells, read_images, read_masks

CONFIG = tiny.config(model__depth=1, process=recipes.flow(), sampler=recipes.default_sampler("euler"))
FAST = {"num_steps": 4}
RNG = np.random.default_rng(5)
PHOTO = RNG.integers(0, 256, (8, 8, 1), np.uint8)
MASK = np.zeros((8, 8), np.uint8)
MASK[2:5, 3:8] = 255


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs") / "run"
    save_run(folder, CONFIG, 0)
    return dit_jax.load(folder)


def levels(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


def test_edit_at_strength_1_is_generation(pipe):
    """Catches a start whose noise is not that of the image's key, or that holds some of the given image."""
    assert levels(pipe([3, 5], job=Edit(PHOTO, 1.0), **FAST), pipe([3, 5], **FAST)) == 0


@pytest.mark.slow
def test_edit_against_the_formula(pipe):
    """Catches noise for another time than the sampler starts at, steps that are not the rest of its grid, latents without
    the codec's scale. Recomputed by Euler's method in NumPy over the network itself."""
    drawn = pipe._prepare([3], None, 0, {"num_steps": 10}, in_memory=True)
    network, params = jax.jit(pipe.run.task.apply), pipe._parameters[0]
    noise = drawn.generator.noise(np.zeros(1, np.int32)).astype(np.float64)
    codec = pipe.run.codec
    x0 = ((PHOTO / 127.5 - 1) - codec.mean) / codec.std
    x = 0.5 * x0 + 0.5 * noise  # strength 0.55 on ten even steps is t = 0.5
    for k in range(5):
        t = 0.5 - k / 10
        velocity = network(params, jnp.asarray(x, jnp.float32), jnp.full(1, 1 - t, jnp.float32), {"label": jnp.array([3])})
        x = x + np.asarray(velocity, np.float64)[..., :1] / 10
    expected = np.clip(127.5 * (x * codec.std + codec.mean) + 128, 0, 255).astype(int)
    seen = []
    found = pipe([3], num_steps=10, job=Edit(PHOTO, 0.55), callback=seen.append)
    assert levels(found, expected) <= 1 and len(seen) == 5
    assert found.made_by["job"]["strength"] == 0.55 and len(found.made_by["job"]["given_sha256"]) == 64


@pytest.mark.slow
def test_a_small_strength_keeps_the_image(pipe):
    """Catches an edit that ignores its image, and one image that is taken for all."""
    photos = np.stack([PHOTO, 255 - PHOTO])
    weak = pipe([3, 3], num_steps=50, job=Edit(photos, 0.02)).images.astype(int)
    assert np.abs(weak - photos).mean() < 15 < np.abs(weak - photos[::-1]).mean()


@pytest.mark.parametrize("name", ["euler", *(pytest.param(name, marks=pytest.mark.slow) for name in ("heun", "dopri5", "sde"))])
def test_inpainting_keeps_what_is_black(pipe, name):
    """Catches a mask that is inverted or transposed, known pixels that are redrawn, and a white part that is not."""
    options = {"sampler": name} | ({} if name == "dopri5" else FAST)
    images = pipe([3, 5, 7], job=Inpaint(PHOTO, mask=MASK), **options).images
    black = np.broadcast_to((MASK < 128)[..., None], images.shape)
    assert levels(images[black], np.broadcast_to(PHOTO, images.shape)[black]) == 0
    assert np.abs(images.astype(int) - PHOTO)[~black].mean() > 10
    hidden = pipe([3, 5, 7], job=Inpaint(np.where(MASK[..., None] > 0, 255 - PHOTO, PHOTO), mask=MASK), **options).images
    assert levels(hidden, images) == 0


SHAPE = (3, 4, 4, 1)
DRAWN = jnp.asarray(RNG.random((1, 4, 4, 1)) < 0.5)
KNOWN, NOISE = jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32), jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32)
KEYS = jax.random.split(jax.random.key(0), 3)


def predict(x, t):
    """Some denoiser whose prediction at a place depends on all others."""
    x0 = jnp.tanh(x.mean((1, 2), keepdims=True) + 0.5 * x)
    return Prediction(x0, x - 0.3 * x0, 0.5)


@pytest.mark.parametrize("process", [Flow("gvp"), Gaussian()], ids=["flow", "gaussian"])
def test_known_region_against_replacement(process):
    """Catches noise in the known region that is not that of the start, another order of mask and values, a wrong time. RePaint's
    replacement after each step of DDIM, in NumPy float64."""
    times = process.grid(9)
    alpha, sigma = process.alpha_sigma(times)
    known, noise, drawn = np.asarray(KNOWN, np.float64), np.asarray(NOISE, np.float64), np.asarray(DRAWN)
    x = np.where(drawn, noise, alpha[0] * known + sigma[0] * noise)
    for i in range(9):
        prediction = predict(jnp.asarray(x, jnp.float32), times[i])
        free = alpha[i + 1] * np.asarray(prediction.x0) + sigma[i + 1] * np.asarray(prediction.noise)
        x = np.where(drawn, free, alpha[i + 1] * known + sigma[i + 1] * noise)
    start = jnp.where(DRAWN, NOISE, process.perturb(KNOWN, NOISE, jnp.float32(times[0])))
    found = DDIM(9)(process, KnownRegion(Memoryless(predict), process, KNOWN, NOISE, DRAWN), start, KEYS)
    np.testing.assert_allclose(found, x, rtol=2e-4, atol=2e-4)


def test_starts_of_the_edm_process():
    """Catches a start from unit noise where the process starts from noise of sigma_max, data that is scaled, and a late start
    with the noise of another time."""
    process, sampler, given = EDM(), Heun(10), {"x0": KNOWN, "drawn": DRAWN, "noise": 2 * NOISE}
    times = process.grid(10)
    sigma = 80 * times[times <= 0.6][0] ** 7  # the first time of the grid that is at most the strength
    starts = {
        Job(): 80 * NOISE,
        Interpolate(): 160 * NOISE,
        Edit(PHOTO, 1.0): KNOWN + 80 * NOISE,
        Edit(PHOTO, 0.6): KNOWN + sigma * NOISE,
        Inpaint(PHOTO, mask=MASK): jnp.where(DRAWN, 80 * NOISE, KNOWN + 80 * NOISE),
        Inpaint(PHOTO, 0.6, mask=MASK): KNOWN + sigma * NOISE,
    }
    for job, wanted in starts.items():
        found = job.begin(job.sampler(sampler, process), process, NOISE, given)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5, err_msg=job.name)
    np.testing.assert_allclose(Job().begin(DormandPrince(), process, NOISE, given), 80 * NOISE, rtol=1e-6)
    around = KnownRegion(Memoryless(lambda x, t: Prediction(0 * x, x, 0.0)), process, KNOWN, NOISE, DRAWN)
    exact = Heun(5)(process, around, KNOWN + 80 * NOISE, KEYS)
    kept = ~np.broadcast_to(DRAWN, SHAPE)
    np.testing.assert_allclose(np.asarray(exact)[kept], np.asarray(KNOWN)[kept], atol=2e-4)


@pytest.mark.slow
def test_jobs_of_a_network_with_the_edm_process(tmp_path):
    """Catches a job, a guidance, a forecast or a preview of steps that does not know that x_t has the scale of sigma: the first
    predicted image would have it too."""
    save_run(tmp_path / "run", tiny.config(process=recipes.edm(), sampler=recipes.default_sampler("heun")), 0)
    pipe = dit_jax.load(tmp_path / "run")
    for fields in (
        {"job": Edit(PHOTO, 0.5)},
        {"job": Inpaint(PHOTO, mask=MASK)},
        {"guidance_scale": 2.0, "guidance_interval": (0.3, 1.0), "sampler": "heun_sde"},
        {"forecast_interval": 2, "forecast_order": 1, "sampler": "dpmpp_3m_sde"},
    ):
        seen = []
        images = pipe([3, 5], num_steps=4, callback=seen.append, **fields)
        assert images.images.std() > 0 and np.isfinite(np.concatenate([np.ravel(step.x0) for step in seen])).all()
        first = seen[0]
        assert np.abs(first.x0).max() < 20, fields  # c_skip x_t is 0.003 of the noise; without a scale it would be some 80
    assert pipe.interpolate((2, 4), 3, label=(3, 5), num_steps=4).images.std() > 0


@pytest.mark.parametrize("sampler", [Heun(5), UniPC(5), DormandPrince(), Ancestral(20), EulerMaruyama(20, last_step="tweedie")])
def test_known_region_of_every_kind_of_sampler(sampler):
    """Catches 0 / 0 at t = 0, where a flow has no noise, and samplers whose known region drifts."""
    start = jnp.where(DRAWN, NOISE, Flow().perturb(KNOWN, NOISE, 1.0))
    found = sampler(Flow(), KnownRegion(Memoryless(predict), Flow(), KNOWN, NOISE, DRAWN), start, KEYS)
    kept = ~np.broadcast_to(DRAWN, SHAPE)
    np.testing.assert_allclose(np.asarray(found)[kept], np.asarray(KNOWN)[kept], rtol=1e-5, atol=1e-4)
    assert np.isfinite(found).all()


def test_known_region_of_an_ancestral_sampler_has_the_right_variance():
    """Catches a learned variance in place of the posterior's where x0 is known: x_t must be alpha x0 + sigma noise in law."""
    process, seen = Gaussian(), []
    x0, noise = jnp.full((64, 8, 8, 1), 0.7), jax.random.normal(jax.random.key(3), (64, 8, 8, 1))

    def recording(x, t):
        jax.debug.callback(lambda t, x: seen.append((float(t), np.asarray(x))), t, x, ordered=True)
        return Prediction(x, x, 1.0)

    known = KnownRegion(Memoryless(recording), process, x0, noise, jnp.zeros((1, 8, 8, 1), bool))
    Ancestral(20)(process, known, process.perturb(x0, noise, 1.0), jax.random.split(jax.random.key(4), 64))
    jax.effects_barrier()
    for t, x in seen[5:]:
        alpha, sigma = process.alpha_sigma(np.array([t]))
        assert x.std() == pytest.approx(float(sigma[0]), rel=0.08) and x.mean() == pytest.approx(0.7 * float(alpha[0]), abs=0.06)


def test_cells_are_conservative():
    """Catches a latent that is kept although a pixel of it is to be drawn, and rows taken for columns."""
    mask = np.zeros((2, 8, 12, 1), bool)
    mask[0, 3, 4] = mask[1, 7, 11] = True
    found = cells(mask, (2, 3, 4))[..., 0]
    assert found[0].tolist() == [[False, True, False], [False] * 3] and found[1].tolist() == [[False] * 3, [False, False, True]]


def test_files(tmp_path):
    """Catches colours that are lost or swapped, a mask whose grey is taken for white, and an array in another order."""
    Image.fromarray(np.broadcast_to(PHOTO, (8, 8, 3)).copy()).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", PHOTO[None])
    np.savez(tmp_path / "x.npz", arr_0=np.stack([PHOTO, PHOTO]))
    for name, count in (("x.png", 1), ("x.npy", 1), ("x.npz", 2)):
        found = read_images(tmp_path / name, (8, 8, 1), False)
        assert found.shape == (count, 8, 8, 1) and levels(found[-1], PHOTO) == 0
    assert read_images(tmp_path / "x.png", (8, 8, 3), False).shape == (1, 8, 8, 3)
    assert read_images(tmp_path / "x.png", (4, 6, 3), True).shape == (1, 4, 6, 3)
    grey = np.where(MASK > 0, 200, 100).astype(np.uint8)
    np.testing.assert_array_equal(read_masks(grey, (8, 8, 3), False)[0, ..., 0], MASK > 0)
    np.testing.assert_array_equal(read_masks(MASK > 0, (8, 8, 3), False)[0, ..., 0], MASK > 0)


@pytest.mark.slow
def test_interpolation_between_labels(pipe):
    """Catches the mean of outputs in place of that of embeddings, ends that are not the two classes, shares the wrong way."""
    images = pipe.interpolate((2, 2), 5, label=(3, 5), **FAST).images
    for label, image in ((3, images[0]), (5, images[-1])):
        assert levels(pipe([label], seed=2, **FAST).images[0], image) <= 1
    assert levels(images[1], images[0]) > 0 and levels(images[2], images[0]) > 0
    network, params = jax.jit(pipe.run.task.apply), dict(pipe._parameters[0])
    x, t = jnp.asarray(RNG.standard_normal((1, 8, 8, 1)), jnp.float32), jnp.full(1, 0.4)
    mixed = {"label": jnp.array([3]), "second_label": jnp.array([5]), "second_share": jnp.array([0.25])}
    table = params["label_embedding"]["embedding"]
    params_of_mean = params | {"label_embedding": {"embedding": table.at[3].set(0.75 * table[3] + 0.25 * table[5])}}
    expected = network(params_of_mean, x, t, {"label": jnp.array([3])})
    np.testing.assert_allclose(network(params, x, t, mixed), expected, rtol=1e-4, atol=1e-5)
    guided = pipe.interpolate((2, 4), 3, label=(3, 5), guidance_scale=2.0, **FAST)
    assert levels(pipe([5], seed=4, guidance_scale=2.0, **FAST).images[0], guided.images[-1]) <= 1
    assert guided.made_by["job"] == {"name": "interpolate", "seeds": [2, 4]}


def test_the_verb_path_draws_the_same_and_refuses_another_image(pipe, tmp_path):
    """Catches rows of given images that go to other images in shards, and a folder that mixes edits of two photographs."""
    photos = np.stack([PHOTO, 255 - PHOTO, PHOTO.swapaxes(0, 1)])
    job = Inpaint(photos, mask=MASK, strength=0.8)
    written = pipe.write(tmp_path / "x.npz", [3, 4, 5], job=job, **FAST)
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], pipe([3, 4, 5], job=job, **FAST).images)
        assert json.loads(str(file["made_by"]))["job"] == written["job"]
        black = np.broadcast_to((MASK < 128)[..., None], photos.shape)
        assert levels(file["arr_0"][black], photos[black]) == 0
    assert written["evaluations"] == 3
    for other in (
        Inpaint(photos[::-1], mask=MASK, strength=0.8),
        Inpaint(photos, mask=MASK.T, strength=0.8),
        Edit(photos, 0.8),
        None,
    ):
        with pytest.raises(UserError, match=r"other settings(.|\n)*made_by.job"):
            pipe.write(tmp_path / "x.npz", [3, 4, 5], job=other, **FAST)


WRONG = {
    "no image": (Edit(), "give the image to start from"),
    "another size": (Edit(PHOTO[:4]), r"is 4 x 8 and the network draws 8 x 8; give --resize .*--resolution=4x8"),
    "no mask": (Inpaint(PHOTO), "give what is to be drawn"),
    "black mask": (Inpaint(PHOTO, mask=np.zeros((8, 8), np.uint8)), "nothing of it is white"),
    "too many": (Edit(np.stack([PHOTO] * 4)), "4 given images and 1 images"),
    "floats": (Edit(PHOTO / 255), "float64"),
    "no file": (Edit("nowhere.png"), "cannot be read"),
    "below the grid": (Edit(PHOTO, 0.1), "below the last noisy time"),
    "not a job": (3, "give a name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(pipe, name):
    """Catches images of something else than was asked for."""
    job, text = WRONG[name]
    with pytest.raises(UserError, match=text):
        pipe([3], job=job, **FAST)


def test_more_mistakes(pipe):
    """Catches a class that is guessed, a sampler without a start that starts at noise, and numbers out of range."""
    with pytest.raises(UserError, match="needs the class"):
        pipe(job=Edit(PHOTO), **FAST)
    with pytest.raises(UserError, match="choose one of ab, ddim"):
        pipe([3], sampler="dopri5", job=Edit(PHOTO))
    for strength in (0, 1.1, True):
        with pytest.raises(UserError, match=r"must lie in \(0, 1\]"):
            Edit(PHOTO, strength)
    with pytest.raises(UserError, match="of one class or between two"):
        pipe([3, 4, 5], job=Interpolate(), **FAST)
    with pytest.raises(UserError, match="two whole numbers"):
        Interpolate((1,))


@pytest.mark.slow
def test_a_job_from_outside(pipe):
    """Catches a job that needs more than its own methods, a compiled program that serves another number, and samples that do
    not say which job drew them."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Scaled(Job):
        factor: float = 1.0
        name = "scaled"

        def begin(self, sampler, process, noise, given):
            return self.factor * noise

    plain, one, half = pipe([3], **FAST), pipe([3], job=Scaled(), **FAST), pipe([3], job=Scaled(0.5), **FAST)
    assert levels(one, plain) == 0 and levels(half, plain) > 5
    assert half.made_by["job"] == {"name": "scaled", "factor": 0.5} and "job" not in plain.made_by


@pytest.mark.slow
def test_verb(pipe, tmp_path):
    """Catches a verb with other defaults than the library's, a flag that does not reach its job, or that another job ignores."""
    (tmp_path / "run").symlink_to(pipe.path)
    np.save(tmp_path / "photo.npy", PHOTO)
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    (tmp_path / "mine.py").write_text(
        "import dataclasses, dit_jax\nfrom dit_jax.sample.jobs import Job\n"
        "@dataclasses.dataclass(frozen=True, eq=False)\nclass Mine(Job):\n    strength: float = 1.0\n    name = 'mine'\n"
        "    def begin(self, sampler, process, noise, given):\n        return self.strength * noise\n"
        "dit_jax.register('job', 'mine', Mine)\n"
    )
    common = ["--workdir=run", "--num_steps=4", "--labels=3,5"]
    inpaint = ["--job=inpaint", "--given=photo.npy", "--mask=mask.png"]
    calls = {
        "edit": ["--job=edit", "--given=photo.npy", "--strength=0.5"],
        "inpaint": inpaint,
        "interpolate": ["--job=interpolate", "--seeds=1,2", "--num_samples=4"],
        "mine": ["--import=mine.py", "--job=mine", "--strength=0", "--labels=3", "--num_samples=2"],
        "--mask has no effect": ["--job=edit", "--given=photo.npy", "--mask=mask.png"],
        "--seed has no effect": ["--job=interpolate", "--seeds=1,2", "--seed=3"],
        "--given has no effect": ["--given=photo.npy"],
        "choose one of animate, connect, edit, extend, generate, inpaint": ["--job=paint"],
        "--seeds=a: give two": ["--job=interpolate", "--seeds=a"],
        "give what is to be drawn": inpaint[:2],
    }
    found = dict(
        zip(
            calls,
            run_verbs(tmp_path, [["sample", *common, *more, f"--out={i}.npz"] for i, more in enumerate(calls.values())]),
            strict=True,
        )
    )
    for text, outcome in list(found.items())[4:]:
        refused(outcome, text)
    drawn = [np.load(tmp_path / f"{i}.npz")["arr_0"] for i in range(4)]
    assert levels(drawn[0], pipe([3, 5], job=Edit(PHOTO, 0.5), **FAST)) <= 1
    assert levels(drawn[1], pipe([3, 5], job=Inpaint(PHOTO, mask=MASK), **FAST)) <= 1
    assert levels(drawn[2], pipe.interpolate((1, 2), 4, label=(3, 5), **FAST)) <= 1
    assert len(drawn[3]) == 2 and levels(drawn[3][0], drawn[3][1]) == 0  # no noise
    assert json.loads(found["edit"][1].splitlines()[-1])["evaluations"] == 2


def test_other_sizes(pipe, capsys):
    """Catches a size that is ignored, exchanged sides, positions of the trained size, and a warning that is not given."""
    wide = dit_jax.load(pipe.path, resolution="8x12")
    assert "trained at 8 and draws 8x12" in capsys.readouterr().err
    assert wide.image_shape == (8, 12, 1) and wide.run.network.position_grid == (4, 4)
    found = wide([3], **FAST)
    assert found.images.shape == (1, 8, 12, 1) and found.made_by["drawn"]["shape"] == [8, 12, 1]
    assert found.made_by["model"]["position_grid"] == [4, 4]
    same = dit_jax.load(pipe.path, resolution=8)
    assert "trained at" not in capsys.readouterr().err
    assert same._prepare([3], None, 0, FAST).made_by() == pipe._prepare([3], None, 0, FAST).made_by()
    for wrong, text in (("9x8", "multiples of 2 .* as in 10x8"), ("big", "write one side"), ((8, 8.0), "whole number")):
        with pytest.raises(UserError, match=text):
            dit_jax.load(pipe.path, resolution=wrong)


def test_class_grid(pipe, tmp_path):
    """Catches rows that mix classes, names beside other rows than their own, and a picture of the first 100 only."""
    written = pipe.write(tmp_path / "x.npz", [5, 3], class_grid=4, **FAST)
    with np.load(tmp_path / "x.npz") as file:
        assert file["labels"].tolist() == [5] * 4 + [3] * 4
        images, picture = file["arr_0"], np.asarray(Image.open(written["grid"]))
    expected = image_grid(images, 4, rows=["5", "3"], caption="step 1, guidance 1, euler with 4 steps, seed 0")
    np.testing.assert_array_equal(picture, expected[..., 0])
    samples = pipe([5, 3, 5, 3], **FAST)
    samples.save_class_grid(tmp_path / "y.png")
    rows = samples.images[[0, 2, 1, 3]]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "y.png")), image_grid(rows, 2, rows=["5", "3"])[..., 0])
    with pytest.raises(UserError, match="needs as many of each"):
        pipe([5, 3, 5], **FAST).save_class_grid(tmp_path / "z.png")
    for more, text in (
        ({"num_samples": 3, "class_grid": 2}, "has no effect with class_grid"),
        ({"class_grid": 0}, "a picture has 1 to"),
        ({"class_grid": 200}, "10 classes with 200 images each"),
    ):
        with pytest.raises(UserError, match=text):
            pipe.write(tmp_path / "w.npz", **more)


@pytest.mark.parametrize(
    "suffix", ["webp", pytest.param("gif", marks=pytest.mark.slow), pytest.param("png", marks=pytest.mark.slow)]
)
def test_animation(pipe, tmp_path, suffix):
    """Catches frames in another order or of other images, a last frame that is not the result, and a file that does not move."""
    path, job = tmp_path / f"x.{suffix}", Inpaint(np.stack([PHOTO, 255 - PHOTO]), mask=MASK)
    pipe.write(tmp_path / "x.npz", [3, 5], job=job, animation=path, **FAST)
    seen = []
    pipe([3, 5], job=job, callback=lambda e: seen.append(pipe.decode(e.x0)), **FAST)
    expected = [
        *seen[:-1],
        np.load(tmp_path / "x.npz")["arr_0"],
    ]  # Euler's last prediction is the image: Pillow joins equal frames
    with Image.open(path) as animation:
        assert animation.n_frames == len(expected) == 4 and animation.info["loop"] == 0
        for number, images in enumerate(expected):
            animation.seek(number)
            assert levels(np.asarray(animation.convert("L")), image_grid(images)[..., 0]) <= 1
    with pytest.raises(UserError, match=r"must end in one of \.webp, \.gif, \.png"):
        pipe.write_animation(tmp_path / "x.mp4", [3])
