"""Diffusion in the latents of a vector-quantized autoencoder: plan, cache, training, samples."""

import jax
import latents
import numpy as np
import pytest
import tiny

import dit_jax
from dit_jax import build, recipes
from dit_jax.codecs.vq_vae import VQVAE
from dit_jax.data.latents import LatentCache
from dit_jax.encode.writer import Job, encode
from dit_jax.errors import UserError
from dit_jax.interop import vae
from dit_jax.plan import lowering
from dit_jax.training.loop import train

CODEC = VQVAE((4, 8), layers_per_block=1, norm_groups=2, codebook_size=40)


def config_of(path, cache):
    c = tiny.config(num_steps=2, model__depth=1, model__num_classes=5, mesh__data=1).copy_and_resolve_references().unlock()
    c.codec = {**recipes.section("codec", "vq_vae"), "name": "vq_vae", "path": str(path), "image_channels": 3}
    c.codec.update({"block_out_channels": (4, 8), "layers_per_block": 1, "norm_groups": 2, "codebook_size": 40})
    c.data, c.loader = {**recipes.latents(), "path": str(cache)}, {"resident": False}
    c.transform.update({"channels": 3, "flip": True})
    return c.lock()


@pytest.mark.slow
def test_plan_cache_training_and_samples(tmp_path):
    """A cache or a batch with a posterior's channels; a codebook that is not copied with the run, or not used for samples."""
    params, source = latents.params(CODEC), latents.Photographs(40, ())
    vae.save_diffusers(tmp_path / "vq", CODEC, params)
    manifest, _ = encode(Job(source, CODEC, params, latents.SIZE), tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache")
    stored = cache.gather(np.arange(80)).astype(np.float64)
    assert cache.moments_shape == (4, 4, 3) and manifest["codec"]["name"] == "VQVAE"
    np.testing.assert_allclose(manifest["latents"]["mean"], stored.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(manifest["latents"]["std"], stored.std((0, 1, 2)), rtol=1e-9)

    config = config_of(tmp_path / "vq", tmp_path / "cache")
    run = build.Run(config, devices=jax.devices()[:1])
    lowering.train_step(run)  # what `plan` compiles
    trained = train(run, tmp_path / "run")
    assert int(trained.state.step) == 2 and trained.loss > 0
    assert vae.read_codec(tmp_path / "run" / "codec") == CODEC

    pipe = dit_jax.load(str(tmp_path / "run"))
    drawn = pipe([3], num_steps=2)
    assert np.asarray(drawn.images).shape == (1, 8, 8, 3)
    z = np.random.default_rng(0).normal(size=(1, 4, 4, 3)).astype(np.float32)
    nearest = np.square(z[..., None, :] - params["codebook"]["embedding"]).sum(-1).argmin(-1)
    entries = params["codebook"]["embedding"][nearest]
    task = pipe.run.task
    np.testing.assert_array_equal(*(task.codec.decode(pipe.run.codec_params, x) for x in (z, entries)))

    with config.unlocked():
        config.codec.codebook_size = 41
    with pytest.raises(UserError, match="num_vq_embeddings: 40 in the file, 41 in the codec"):
        train(build.Run(config, devices=jax.devices()[:1]), tmp_path / "other")
