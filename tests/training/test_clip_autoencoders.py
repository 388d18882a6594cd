"""A causal autoencoder trained on clips, from the config to the finished codec and its scores."""

import jax
import numpy as np
import pytest
import tiny

from dit_jax import build, recipes, registry, session
from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.evaluate.images import NpzImages
from dit_jax.interop.vae import load_diffusers, read_codec
from dit_jax.parallel.mesh import make_mesh
from dit_jax.pixels import to_float
from dit_jax.training import reconstructions

CODEC = {"base": 4, "mult": (1, 2), "blocks": 1, "z": 2, "temporal": (True,), "image_channels": 1}


class Rolling:
    """20 clips of 4 frames of 8 x 8 noise that rolls to the right."""

    num_classes, class_names = 0, ()

    def __init__(self, split: str = "train"):
        self.split, self.fingerprint = split, f"rolling-{split}"

    def __len__(self):
        return 20

    def __getitem__(self, index):
        image = np.random.default_rng([int(index), len(self.split)]).integers(0, 256, (8, 8, 1), np.uint8)
        return {"video": np.stack([np.roll(image, t, 1) for t in range(4)]), "label": 0, "name": f"clip {index}"}


@pytest.fixture
def config():
    registry.register("data", "rolling_noise", Rolling)
    c = recipes.autoencoder({"name": "causal_vae", **CODEC})
    c.data = {"name": "rolling_noise", "split": "train"}
    c.transform = {"name": "clip", "frames": 3, "resolution": 8, "channels": 1, "flip": False}
    c.task.update({"discriminator_weight": 0.5, "discriminator": {"base_features": 8, "num_layers": 1, "norm_groups": 4}})
    c.loader.num_threads = 2
    fields = {"num_steps": 2, "batch_size": 8, "preview__every_steps": 2, "preview__num_images": 2}
    fields |= {"evaluation__num_images": 8, "evaluation__split": "test", "evaluation__features": "pixels8"}
    yield tiny.shorten(c, **fields)
    del registry._ENTRIES["data"]["rolling_noise"]


def test_the_config_of_clips_is_built(config):
    """A task, a discriminator or a check that takes the frames of a clip for its height."""
    run = build.Run(config)
    reconstructions.Reconstructions.check(run)
    assert isinstance(run.task.codec, CausalVAE) and run.latent_shape == (2, 4, 4, 2)
    assert "encode a clip of 3 frames" in run.task.description()[0]
    assert run.abstract_batch["image"].shape == (8, 3, 8, 8, 1)
    shapes = jax.eval_shape(run.task.init, jax.random.key(0))
    assert shapes.params["discriminator"]["conv_0"]["kernel"].shape == (4, 4, 1, 8)


def test_reconstructions_of_clips_are_judged_frame_by_frame():
    """A picture, a PSNR or a mean that mixes the frames of a clip with its rows."""
    codec = CausalVAE(**CODEC)
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), shapes)
    reconstruct = reconstructions.Reconstructor(codec, make_mesh(1, 1, 1, jax.devices()[:1]), 2)
    clips = rng.integers(0, 256, (3, 3, 8, 8, 1), np.uint8)
    decoded, mean, variance = reconstruct(params, clips)
    assert (decoded.shape, mean.shape, variance.shape) == (clips.shape, (3, 2, 4, 4, 2), (3, 2, 4, 4, 2))
    moments = np.asarray(jax.jit(codec.encode)(params, to_float(clips[:1])))
    np.testing.assert_allclose(mean[:1], moments[..., :2], rtol=1e-4, atol=1e-5)
    pairs = reconstructions.side_by_side(clips, decoded)
    np.testing.assert_array_equal(pairs[3], decoded[1])
    np.testing.assert_array_equal(reconstructions.frames(clips)[4], clips[1, 1])


@pytest.mark.slow
def test_a_run_on_clips(config, tmp_path):
    """A run that refuses clips at its start or, worse, at its end; a codec that does not come back from its folder."""
    result = session.train(config, tmp_path)
    assert 0 < result["psnr"] < 60 and np.isfinite(result["fid"]) and len(np.atleast_1d(result["scale"])) == 1
    codec = read_codec(tmp_path / "codec")
    assert (codec.base, codec.temporal, codec.image_channels) == (4, (True,), 1)
    load_diffusers(tmp_path / "codec", codec)
    assert NpzImages(result["samples"]).shape == (3, 8, 8, 1)
