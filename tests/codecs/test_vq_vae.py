"""The vector-quantized autoencoder: its search, against diffusers, on a mesh, and where it is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from vae_oracle import diffusers_vq

from dit_jax import build
from dit_jax.codecs.vq_vae import VQVAE, nearest
from dit_jax.errors import UserError
from dit_jax.interop.vae import load_diffusers
from dit_jax.parallel.mesh import make_mesh, place
from dit_jax.parallel.rules import shardings

TINY = {"block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_groups": 4, "codebook_size": 150}


def close(ours, theirs, tolerance=1e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert ours.shape == theirs.shape and error < tolerance, (ours.shape, theirs.shape, error)


@pytest.fixture(scope="module")
def params():
    """Of VQVAE(**TINY), in which every tensor matters."""
    drawn = latents.params(VQVAE(**TINY))
    return jax.tree.map(lambda x: x + np.random.default_rng(x.size).normal(0, 0.1, x.shape).astype(x.dtype), drawn)


def test_vq_f4_has_the_published_size():
    """A level, block, bias or 1x1 convolution too many or too few: 55,322,782 parameters, as of diffusers' VQModel."""
    codec = VQVAE()
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 55_322_782
    assert codec.latent_shape((256, 384, 3)) == (64, 96, 3) and codec.moment_channels == 3 and codec.downsample == 4


def test_the_count_agrees_with_xla():
    """Twice the encoder's output channels, a level counted at the wrong resolution, or a search that is not counted."""
    codec, shape = VQVAE((32, 64, 96), layers_per_block=1, codebook_size=1), (128, 64, 3)
    params = jax.eval_shape(codec.init, jax.random.key(0))
    inputs = (codec.encode, shape), (codec.decode, codec.latent_shape(shape))
    xla = [jax.jit(f).lower(params, jax.ShapeDtypeStruct((1, *x), jnp.float32)).cost_analysis()["flops"] / 2 for f, x in inputs]
    assert codec.macs(shape) == pytest.approx(xla, rel=0.05)
    searched = dataclasses.replace(codec, codebook_size=8192)
    assert searched.macs(shape)[1] - codec.macs(shape)[1] == 32 * 16 * 8191 * 3


@pytest.mark.parametrize("entries", [1, 5, 128, 300])
def test_the_nearest_entry_is_exact_and_the_first_of_equals(entries):
    """A search that rounds, that takes the last of equal entries, or that leaves out the end of a codebook of no whole chunks.

    Small integers: every distance is exact in float32, and many are equal.
    """
    rng = np.random.default_rng(entries)
    codebook, z = rng.integers(-4, 5, (entries, 3)), rng.integers(-4, 5, (2, 5, 7, 3))
    expected = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
    found = jax.jit(nearest)(codebook.astype(np.float32), z.astype(np.float32))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_the_search_does_not_cancel():
    """|z|^2 - 2 z e + |e|^2 in float32, or products in bfloat16, far from the origin: entries 1e-3 apart at 100."""
    rng = np.random.default_rng(0)
    codebook = (100 + 1e-3 * rng.permutation(500)[:, None] * np.ones(3)).astype(np.float32)
    chosen = rng.integers(0, 500, 64)
    z = codebook[chosen] + np.float32(2e-4)
    np.testing.assert_array_equal(jax.jit(nearest)(codebook, z), chosen)


def test_the_search_needs_little_memory():
    """All [h, w, K] distances, 128 MiB per image of 64 x 64 latents, or [h, w, K, 3] differences, 384 MiB."""
    codebook, z = jax.ShapeDtypeStruct((8192, 3), jnp.float32), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    assert jax.jit(nearest).lower(codebook, z).compile().memory_analysis().temp_size_in_bytes < 16 * 2**20


def test_a_mesh_gives_the_same_and_exchanges_no_rows():
    """A search that gathers the batch of all devices, or that depends on the mesh."""
    rng = np.random.default_rng(0)
    codebook, z = rng.normal(size=(150, 3)).astype(np.float32), rng.normal(size=(8, 5, 3, 3)).astype(np.float32)
    mesh = make_mesh(2, 2, 2)
    split = jax.device_put(z, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    whole = jax.device_put(codebook, NamedSharding(mesh, PartitionSpec()))
    program = jax.jit(nearest).lower(whole, split).compile()
    assert not any(word in program.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert program(whole, split).sharding.spec == PartitionSpec(("data", "fsdp"))
    np.testing.assert_array_equal(program(whole, split), jax.jit(nearest)(codebook, z))


@pytest.mark.slow
def test_one_device_equals_a_mesh(params):
    """A convolution, an attention or the codebook split so that the gradients change: with one image per device, they did."""
    codec, mesh = VQVAE(**TINY), make_mesh(2, 2, 2)
    images = np.random.default_rng(0).uniform(-1, 1, (4, 16, 8, 3)).astype(np.float32)

    def both(params, images):
        def loss(params):
            z = codec.encode(params, images)
            decoded = codec.decode(params, codec.sample_latent(jax.random.key(0), z))
            return jnp.square(decoded).mean(), (z, decoded)

        return jax.grad(loss, has_aux=True)(params)

    one = jax.jit(both)(params, images)
    split = place(params, shardings(params, mesh, codec.rules))
    rows = jax.device_put(images, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    with jax.set_mesh(mesh):
        many = jax.device_get(jax.jit(both)(split, rows))
    assert tiny.distance(many, one, floor=1e-4) < 2e-4


@pytest.mark.parametrize("size", [(20, 12), (13, 27)])
def test_vq_equals_diffusers(size, tmp_path):
    """A posterior's channels, a 1x1 convolution in the wrong place, another padding, a gradient that the search blocks."""
    torch = pytest.importorskip("torch")

    codec = VQVAE(**TINY, scale=0.5)
    model = diffusers_vq(codec)
    model.save_pretrained(tmp_path)
    params = load_diffusers(tmp_path, codec)
    images = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)

    theirs_in = torch.from_numpy(images).permute(0, 3, 1, 2)
    z = model.encode(theirs_in).latents
    quantized, _, (_, _, indices) = model.quantize(z)
    decoded = model.decode(z).sample
    weights = np.random.default_rng(2).normal(size=decoded.permute(0, 2, 3, 1).shape).astype(np.float32)
    (decoded.permute(0, 2, 3, 1) * torch.from_numpy(weights)).sum().backward()

    def loss(params):
        latents = codec.sample_latent(jax.random.key(0), codec.encode(params, images))
        decoded = codec.decode(params, latents)
        return (decoded * weights).sum(), (latents, decoded)

    gradients, (ours, images_out) = jax.jit(jax.grad(loss, has_aux=True))(params)
    to_ours = lambda x: x.detach().permute(0, 2, 3, 1).numpy()  # noqa: E731
    close(ours / 0.5, to_ours(z))
    np.testing.assert_array_equal(nearest(params["codebook"]["embedding"], to_ours(z)).reshape(-1), indices)
    assert len(np.unique(indices)) > 3
    close(codec.quantize(params, to_ours(z)), to_ours(quantized))
    close(images_out, to_ours(decoded), 2e-5)
    conv = model.encoder.conv_in.weight.grad.permute(2, 3, 1, 0).numpy()
    close(gradients["encoder"]["conv_in"]["kernel"], conv, 1e-4)
    close(gradients["decoder"]["post_quant_conv"]["kernel"][0, 0], model.post_quant_conv.weight.grad[:, :, 0, 0].T.numpy(), 1e-4)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(params):
    """A search in bfloat16, which takes other entries; outputs left in bfloat16."""
    codec = VQVAE(**TINY)
    low = dataclasses.replace(codec, dtype="bfloat16")
    z = jax.random.normal(jax.random.key(1), (1, 4, 6, 3))
    images = jax.jit(low.decode)(params, z)
    assert images.dtype == jnp.float32
    close(images, jax.jit(codec.decode)(params, z), 0.05)
    np.testing.assert_array_equal(low.quantize(params, z), codec.quantize(params, z))


def test_latents_are_a_function_of_the_image():
    """Noise of a posterior that this autoencoder does not have; a scale or shift on one way only."""
    codec = VQVAE(**TINY, scale=(0.5, 2.0, 1.0), shift=0.25)
    z = np.random.default_rng(0).normal(size=(2, 3, 5, 3)).astype(np.float16)
    first, second = (codec.sample_latent(jax.random.key(k), z) for k in (0, 1))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, (z.astype(np.float32) - 0.25) * np.float32([0.5, 2, 1]), rtol=1e-6)
    np.testing.assert_allclose(codec.unscaled(first), z, rtol=1e-5, atol=1e-6)


def test_nan_is_not_hidden_by_the_codebook(params):
    """A diverged network whose latents decode to a clean image of entry 0."""
    z = jnp.zeros((1, 2, 2, 3)).at[0, 1, 0, 2].set(jnp.nan)
    quantized = VQVAE(**TINY).quantize(params, z)
    assert jnp.isnan(quantized[0, 1, 0, 2]) and jnp.isfinite(quantized[0, 0]).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c: VQVAE(codebook_size=0), "codebook_size 0 must be at least 1"),
        (lambda c: VQVAE(scale=(1.0, 2.0)), "2 numbers for 3 latent channels"),
        (lambda c: c.sample_latent(jax.random.key(0), jnp.zeros((1, 2, 2, 6))), "the last axis must be 3"),
        (lambda c: c.decode({}, jnp.zeros((1, 2, 2, 6))), r"\[B, h, w, 3\]"),
        (lambda c: c.latent_shape((18, 16, 3)), "18 is not a positive multiple of the codec's downsample 4"),
        (lambda c: c.latent_shape((2, 16, 16, 3)), "VQVAE encodes images"),
    ],
)
def test_bad_input_is_refused(call, message):
    """A posterior's moments split by halves as if they were latents; sizes that fail later."""
    with pytest.raises(ValueError, match=message):
        call(VQVAE(**TINY))


def test_it_is_not_trained():
    """An autoencoder's run that trains it as a KL autoencoder, or that says it has no parameters."""
    config = tiny.autoencoder().copy_and_resolve_references()
    config.codec = {"name": "vq_vae", "image_channels": 1, "block_out_channels": (8, 16), "norm_groups": 4}
    with pytest.raises(UserError, match=r"codec\.name is 'vq_vae', which is used with trained weights and not trained"):
        build.Run(config.lock()).task
