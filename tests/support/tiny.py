"""A model and configs small enough for a test, with non-zero weights."""

import jax
import jax.numpy as jnp

from dit_jax import build, recipes, registry
from dit_jax.models.dit import DiT

# Fields of networks other than DiT, for 8 x 8 digits.
HOURGLASS = {
    "patch_size": 2, "widths": (16, 32), "depths": (1, 1), "num_classes": 10, "attentions": ("neighborhood", "global"),
    "kernel_size": 3, "head_width": 8, "mapping_width": 12, "mapping_depth": 1,
}  # fmt: skip
UNET = {
    "channels": 32, "multipliers": (1, 2), "num_res_blocks": 1, "attention_factors": (2,), "head_width": 32, "num_classes": 10,
}  # fmt: skip


def dit(conditioning="adaln_zero", **fields):
    """A DiT of depth 2 and width 32 for 8 x 8 inputs of any channel count."""
    fields = {"patch_size": 2, "depth": 2, "width": 32, "heads": 4, "num_classes": 10, "out_channels": 2} | fields
    return DiT(conditioning=conditioning, **fields)


def random_params(params, key=7, scale=0.2):
    """Replaces every parameter by normal values: with adaLN-Zero's zeros, tests would compare 0 with 0."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return jax.tree.unflatten(tree, [scale * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)])


def config(**overrides):
    """configs/digits.py with a tiny model and few steps; overrides by dotted path with "__" for the dot."""
    c = recipes.digits()
    c.update({"num_steps": 6, "batch_size": 16})
    c.model.update({"depth": 2, "width": 32, "patch_size": 2})
    c.process.prediction, c.optimizer.learning_rate = "noise", 2e-3
    c.checkpoint.update({"every_steps": 3})
    c.log.every_steps = 2
    c.preview.update({"every_steps": 0})
    c.evaluation.update({"num_images": 0})
    c.sampler.num_steps = 4
    c.mesh.data = -1
    return override(c, overrides).lock()


def diffit(**overrides):
    """`config` with a tiny DiffiT."""
    c = config().copy_and_resolve_references()
    fields = {"depth": 2, "width": 32, "heads": 4, "patch_size": 2, "num_classes": 10, "grid": (4, 4)}
    c.unlock()
    c.model = {**registry.defaults("model", "diffit"), "name": "diffit", **fields}
    return override(c, overrides).lock()


def other(network, **overrides):
    """`digits` with a tiny "unet", "hourglass" (HDiT, with EDM) or "diffit"; overrides as of `config`."""
    if network == "diffit":
        return diffit(**overrides)
    c = recipes.digits("edm" if network == "hourglass" else "gaussian")
    fields = {"unet": UNET, "hourglass": HOURGLASS}[network]
    c.model = {**registry.defaults("model", network), "name": network, **fields}
    return shorten(c, **overrides)


def override(c, overrides):
    for path, value in overrides.items():
        *sections, field = path.split("__")
        section = c
        for name in sections:
            section = section[name]
        section[field] = value
    return c


def run_on_one_device(config):
    """The run of a config on one device, whose programs compile faster than those of a mesh of eight.

    For tests of what is saved, read and recorded. That a mesh changes no number is tested in tests/parallel.
    """
    config = config.copy_and_resolve_references()
    config.mesh.data = 1
    return build.Run(config, devices=jax.devices()[:1])


def distance(a, b, floor=1e-9):
    """Largest |a - b| over largest |b| + floor, over all leaves; below `floor`, values are rounding errors."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
        worst = max(worst, float(jnp.abs(x - y).max() / (jnp.abs(y).max() + floor)))
    return worst


def tiny_codec(c):
    """Shrinks a digits autoencoder, or the config of diffusion in its latents, for a test."""
    c.codec.update({"block_out_channels": (8, 16), "norm_groups": 4})
    return c


def shorten(c, **overrides):
    """Sets few steps and no previews; then applies overrides as `config` does."""
    c.update({"num_steps": 4, "batch_size": 16})
    c.checkpoint.update({"every_steps": 2})
    c.log.every_steps = 2
    c.preview.update({"every_steps": 0})
    c.evaluation.update({"num_images": 0})
    return override(c, overrides).lock()


def autoencoder(**overrides):
    """configs/vae_digits.py, tiny, with a discriminator from the first step on unless overridden."""
    c = tiny_codec(recipes.vae_digits())
    c.task.update({"discriminator_weight": 0.5, "discriminator": {"base_features": 8, "num_layers": 1, "norm_groups": 4}})
    return shorten(c, **overrides)


def digits_latent(codec_path, **overrides):
    """configs/digits_latent.py, tiny, in the latents of `autoencoder`."""
    c = tiny_codec(recipes.digits_latent())
    c.model.update({"depth": 1, "width": 32})
    c.sampler.num_steps = 4
    c.codec.path = str(codec_path)
    return shorten(c, **overrides)
