"""Two stages: an autoencoder is trained, and diffusion runs in its latents.

Most runs are on one device; `test_training_from_the_cache` has a mesh, tests/parallel and test_many_processes the others.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
import tiny
from PIL import Image
from verbs import run

from dit_jax import build
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.config_file import read
from dit_jax.data.latents import LatentCache
from dit_jax.data.sources import Digits
from dit_jax.data.transforms import ImageTransform
from dit_jax.encode.writer import Job, encode
from dit_jax.errors import UserError
from dit_jax.interop import download, vae
from dit_jax.storage.sealed import sha256_of
from dit_jax.tasks.task import named_key
from dit_jax.training.loop import train
from dit_jax.training.results import check_results

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """The folder of a finished autoencoder run."""
    workdir = tmp_path_factory.mktemp("vae") / "run"
    config = tiny.autoencoder(evaluation__num_images=20, preview__every_steps=4, task__discriminator_weight=0.0)
    check_results(tiny.run_on_one_device(config))
    trained = train(tiny.run_on_one_device(config), workdir)
    result = trained.results.finish(trained.state, trained.constants, workdir)
    assert np.isfinite([result["psnr"], result["ssim"], result["fid"]]).all()
    return workdir


@pytest.fixture(scope="module")
def begun(first_stage, tmp_path_factory):
    """Two of the four steps of a run in the latents of the first stage."""
    workdir = tmp_path_factory.mktemp("second") / "run"
    short = train(tiny.run_on_one_device(tiny.digits_latent(first_stage, num_steps=2)), workdir)
    assert short.run.config.codec.scale == vae.read_codec(vae.find(first_stage)).scale
    return workdir


@pytest.fixture(scope="module")
def cache(first_stage, tmp_path_factory):
    """The digits' latents, mirrored too, in shards of 100."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    path = vae.find(first_stage)
    codec = vae.read_codec(path)
    encode(Job(Digits(), codec, vae.load_diffusers(path, codec), (8, 8), mirror=True, shard_records=128), folder)
    return folder


def test_scale_gives_unit_variance(first_stage):
    """A scale measured on other latents than those that diffusion sees, or its inverse."""
    codec = vae.read_codec(vae.find(first_stage))
    params = vae.load_diffusers(vae.find(first_stage), codec)
    digits = Digits(split="train")  # each reads its file
    images = np.stack([digits[i]["image"] for i in range(1500)]) / 127.5 - 1
    latents = codec.sample_latent(jax.random.key(0), jax.jit(codec.encode)(params, jnp.asarray(images, jnp.float32)))
    assert 0.9 < latents.std() < 1.1


def test_second_stage_needs_its_own_folder_alone(first_stage, begun, tmp_path):
    """A run that cannot be sampled or resumed once the autoencoder's folder has moved."""
    moved = tmp_path / "moved"
    run = train(tiny.run_on_one_device(tiny.digits_latent(moved)), shutil.copytree(begun, tmp_path / "run"))
    whole = train(tiny.run_on_one_device(tiny.digits_latent(first_stage)), tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(run.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_codec_is_refused(first_stage, begun, tmp_path):
    """Going on in the latents of another autoencoder; a pinned hash that is not looked at."""
    shutil.copytree(begun, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "codec")
    other = shutil.copytree(vae.find(first_stage), tmp_path / "other")
    codec = vae.read_codec(other)
    vae.save_diffusers(other, codec, latents.params(codec, 5))
    with pytest.raises(UserError, match=r"codec.sha256: '.*' -> '.*'"):
        train(tiny.run_on_one_device(tiny.digits_latent(other)), tmp_path / "run")
    with pytest.raises(UserError, match=r"codec\.sha256 is 00"):
        train(build.Run(tiny.digits_latent(first_stage, codec__sha256="00")), tmp_path / "new")
    with pytest.raises(UserError, match=r"codec\.path is empty"):
        train(build.Run(tiny.digits_latent("")), tmp_path / "new")
    with pytest.raises(UserError, match="disagrees with the codec"):
        train(build.Run(tiny.digits_latent(first_stage, codec__latent_channels=3)), tmp_path / "new")


def cached(first_stage, cache, **overrides):
    config = tiny.digits_latent(first_stage).copy_and_resolve_references()
    with config.unlocked():
        config.data = {"name": "latents", "path": str(cache), "verify": True}
        config.loader = {"resident": False}
        config.transform.flip = True
        tiny.override(config, overrides)
    return config.lock()


def test_training_from_the_cache(first_stage, cache, tmp_path):
    """Rows gathered from the devices' own copy that are not those of the files, on one device and on eight."""
    runs = [
        train(tiny.run_on_one_device(cached(first_stage, cache)), tmp_path / "0"),
        train(build.Run(cached(first_stage, cache, loader__resident=True, mesh__fsdp=2)), tmp_path / "1"),
    ]
    mesh, one = (jax.device_get(run.state.opt_state) for run in reversed(runs))
    assert tiny.distance(mesh, one, floor=1e-6) < 1e-4
    assert (tmp_path / "1" / "codec" / "config.json").is_file()


def test_images_that_are_not_square(first_stage, tmp_path):
    """Height and width swapped between the crop, the cache, the network, the samples and their score."""
    path, reference = vae.find(first_stage), tmp_path / "digits"
    codec = vae.read_codec(path)
    source, crop = Digits(split="test"), ImageTransform(8, 1, flip=False, size=(8, 12))
    encode(Job(source, codec, vae.load_diffusers(path, codec), (8, 12)), tmp_path / "cache")
    reference.mkdir()
    for k in range(30):
        Image.fromarray(crop(source[k])["image"][..., 0]).save(reference / f"{k:02d}.png")
    evaluation = {"evaluation__num_images": 20, "evaluation__reference": str(reference)}
    run = tiny.run_on_one_device(cached(first_stage, tmp_path / "cache", num_steps=2, transform__size=(8, 12), **evaluation))
    check_results(run)
    trained = train(run, tmp_path / "run")
    result = trained.results.finish(trained.state, trained.constants, tmp_path / "run")
    assert run.latent_shape == (4, 6, 2) and np.isfinite(result["fid"])
    with np.load(result["samples"]) as samples:
        assert samples["arr_0"].shape == (20, 8, 12, 1)
    for size in ((12, 8), None):
        with pytest.raises(UserError, match=r"transform\.size: \[8, 12\] in the cache"):
            train(build.Run(cached(first_stage, tmp_path / "cache", transform__size=size)), tmp_path / "other")


def test_cache_and_online_encoding_see_the_same(first_stage, cache):
    """Latents without posterior noise, with one fixed flip, or scaled twice: mean, deviation, flip rate and noise must agree."""
    run = tiny.run_on_one_device(cached(first_stage, cache)).with_codec_weights()
    task = run.task
    params = vae.load_diffusers(vae.find(first_stage), task.codec)
    loader = run.loader
    digits = Digits()
    online = {"image": np.stack([digits[i]["image"] for i in range(1797)]), "label": np.zeros(1797, np.int32)}
    with loader.batches(0) as batches:
        rows = [next(batches) for _ in range(224)]
    stored = {"moments": np.concatenate([r["moments"] for r in rows]), "label": np.concatenate([r["label"] for r in rows])}
    key = jax.random.key(1)
    flipped = np.random.default_rng(0).random(1797) < 0.5
    online["image"][flipped] = online["image"][flipped, :, ::-1]
    draw = jax.jit(lambda batch, key: task.draw_inputs({"codec": params}, batch, key)["x0"])
    a, b = draw(online, key), draw(stored, key)
    np.testing.assert_allclose(a.mean((0, 1, 2)), b.mean((0, 1, 2)), atol=0.03)
    np.testing.assert_allclose(a.std((0, 1, 2)), b.std((0, 1, 2)), rtol=0.03)
    noise = [np.std(draw(batch, jax.random.key(2)) - x) for batch, x in ((online, a), (stored, b))]
    np.testing.assert_allclose(*noise, rtol=0.03)
    assert noise[0] > 0.01
    views = [loader.rows(step)[0] % 2 for step in range(100)]
    assert abs(np.mean(views) - 0.5) < 0.05
    exact = task.codec.sample_latent(named_key(key, "posterior"), jnp.asarray(stored["moments"]))
    np.testing.assert_allclose(b, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"transform__resolution": 16}, "resolution"),
        ({"codec__sha256": ""}, ""),
        ({"model__num_classes": 7}, "num_classes"),
    ],
)
def test_a_cache_of_something_else_is_refused(first_stage, cache, tmp_path, changes, text):
    """Training on latents that were made at another size, or have other classes, than the config says."""
    if text:
        with pytest.raises(UserError, match=text):
            train(build.Run(cached(first_stage, cache, **changes)), tmp_path / "run")
    else:
        other = shutil.copytree(vae.find(first_stage), tmp_path / "other")
        codec = vae.read_codec(other)
        vae.save_diffusers(other, codec, latents.params(codec, 5))
        with pytest.raises(UserError, match="sha256"):
            train(build.Run(cached(other, cache)), tmp_path / "run")


def test_a_flipped_byte_stops_the_start(first_stage, cache, tmp_path):
    """A damaged shard that is trained on."""
    broken = shutil.copytree(cache, tmp_path / "cache")
    shard = sorted(broken.glob("*.moments.npy"))[1]
    data = bytearray(shard.read_bytes())
    data[-7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=shard.name):
        train(build.Run(cached(first_stage, broken)), tmp_path / "run")


def test_labels_travel(cache):
    """Labels shifted against their latents on the way through the cache."""
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["class_names"] == list("0123456789")
    labels, digits = LatentCache(cache).labels, Digits()
    np.testing.assert_array_equal(labels, [digits[i]["label"] for i in range(1797)])


@pytest.mark.exhaustive
def test_digits_in_latents(tmp_path):
    """Both stages as the README has them, shorter: an autoencoder that blurs, a scale or patch that nothing is learned in."""
    from sklearn.datasets import load_digits
    from sklearn.svm import SVC

    vae_workdir, workdir, steps = tmp_path / "vae", tmp_path / "run", "--config.preview.every_steps=0"
    first, _ = run(
        "main",
        "--config=configs/vae_digits.py",
        f"--workdir={vae_workdir}",
        steps,
        "--config.num_steps=500",
        "--config.optimizer.decay_steps=500",
    )
    assert first["psnr"] > 25 and first["fid"] < 0.5
    second, progress = run(
        "main",
        "--config=configs/digits_latent.py",
        f"--config.codec.path={vae_workdir}",
        f"--workdir={workdir}",
        steps,
        "--config.num_steps=800",
        "--config.optimizer.decay_steps=800",
    )
    assert second["fid"] < 2.0, progress
    shutil.rmtree(vae_workdir)
    guided, _ = run("sample", f"--workdir={workdir}", "--num_samples=500", "--guidance_scale=1.5", f"--out={tmp_path / 'x.npz'}")
    digits = load_digits()
    judge = SVC(gamma=1e-3, C=10).fit(digits.data, digits.target)
    with np.load(guided["out"]) as samples:
        assert (judge.predict(samples["arr_0"].reshape(500, 64) * (16 / 255)) == samples["labels"]).mean() > 0.9


def test_imagenet_config_trains_from_a_cache(tmp_path, monkeypatch):
    """No way from the config of the paper to a latent cache; a default codec that only the config of images looks up."""
    codec = KLVAE((8, 16), layers_per_block=1, norm_groups=4)
    folder = tmp_path / "weights" / "sd-vae-ft-mse"
    vae.save_diffusers(folder, codec, latents.params(codec))
    monkeypatch.setattr(download, "CACHE", tmp_path / "weights")
    published = download.PUBLISHED["sd-vae-ft-mse"]._replace(sha256=sha256_of(folder / vae.WEIGHTS_NAME))
    monkeypatch.setitem(download.PUBLISHED, "sd-vae-ft-mse", published)
    encode(Job(latents.Photographs(bad=()), codec, latents.params(codec), latents.SIZE, mirror=True), tmp_path / "cache")
    fields = [f"data.path={tmp_path / 'cache'}", "transform.resolution=8", "codec.block_out_channels=8,16", "codec.norm_groups=4"]
    fields += ["codec.layers_per_block=1", "model.num_classes=5", "model.depth=1", "model.width=32", "model.heads=4"]
    fields += ["batch_size=16", "num_steps=4", "preview.every_steps=0", "log.every_steps=2", "optimizer.learning_rate=1e-3"]
    config = read("configs/imagenet.py:S/2,256,latents", fields)
    assert read("configs/s2_imagenet256.py", ["data.name=latents", *fields]) == config
    run = tiny.run_on_one_device(config)
    run.check_files(tmp_path / "run", lambda: check_results(run))
    trained = train(run, tmp_path / "run")
    assert int(trained.state.step) == 4 and trained.loss > 0
    assert vae.read_codec(tmp_path / "run" / "codec") == codec
