"""The KL autoencoder against diffusers, and its sampling, tiling and refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracle import LAYOUTS, TINY, diffusers_decode, diffusers_encode, diffusers_vae

from dit_jax.codecs import kl_vae
from dit_jax.codecs.kl_vae import KLVAE, PRESETS, normalised, spatial_attention, split_moments, tile_axis
from dit_jax.codecs.pixels import Pixels
from dit_jax.errors import UserError
from dit_jax.interop.vae import load_diffusers


def assert_close(ours, reference, tolerance=1e-4):
    """Largest difference relative to the largest value."""
    error = np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max()
    assert ours.shape == reference.shape and error < tolerance, (ours.shape, reference.shape, error)


def loaded(codec, folder):
    """A random diffusers model of the codec's sizes and the same weights in our layout."""
    model = diffusers_vae(codec)
    model.save_pretrained(folder)
    return model, load_diffusers(folder, codec)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A codec of two levels, quick to compile, and parameters in which every tensor matters."""
    codec = KLVAE((8, 16), layers_per_block=1, norm_groups=4)
    return codec, loaded(codec, tmp_path_factory.mktemp("tiny"))[1]


@pytest.mark.parametrize("layout, height, width", [("no_quant_16", 40, 24), ("grey_f16", 32, 48), ("sd", 37, 21)])
def test_moments_and_images_equal_diffusers(layout, height, width, tmp_path):
    """A wrong padding, epsilon, block order, attention scale, transposed kernel, or swapped height and width."""
    codec = KLVAE(**LAYOUTS[layout])
    model, params = loaded(codec, tmp_path)
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (2, height, width, codec.image_channels)).astype(np.float32)
    moments = jax.jit(codec.encode)(params, images)
    assert_close(moments, diffusers_encode(model, images))

    z = rng.normal(size=(*moments.shape[:3], codec.latent_channels)).astype(np.float32)
    decoded = jax.jit(codec.decode)(params, (z - codec.shift) * codec.scale)
    assert_close(decoded, diffusers_decode(model, z))


def test_bfloat16_stays_near_float32(tiny):
    """Statistics or softmax computed in bfloat16, outputs left in it, or convolutions that ignore dtype and run slowly."""
    codec, params = tiny
    low = dataclasses.replace(codec, dtype="bfloat16")
    images = 0.2 * jax.random.uniform(jax.random.key(0), (1, 32, 32, 3)) + 0.8
    latents = jax.random.normal(jax.random.key(1), (1, 4, 4, 4))
    moments, decoded = jax.jit(codec.encode)(params, images), jax.jit(codec.decode)(params, latents)
    low_moments, low_images = jax.jit(low.encode)(params, images), jax.jit(low.decode)(params, latents)
    assert low_moments.dtype == low_images.dtype == jnp.float32
    assert_close(low_moments, np.asarray(moments), 0.05)
    assert_close(low_images, np.asarray(decoded), 0.05)
    program = jax.jit(low.encode).lower(params, images).as_text().splitlines()
    convolutions = [line for line in program if "stablehlo.convolution" in line]
    assert convolutions and not any("xf32>" in line for line in convolutions)


def test_attention_weighs_values_by_softmax():
    """An attention over the batch or the channels, without the 1/sqrt(C), or a softmax in bfloat16."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 6, 8))
    logits = np.einsum("bnc,bmc->bnm", query, key) / math.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert_close(spatial_attention(query, key, value), np.einsum("bnm,bmc->bnc", weights, value), 1e-5)


def test_the_posterior_is_sampled_clipped_shifted_and_scaled():
    """Variance used as deviation, halves swapped, clip missing, or scale applied before shift."""
    codec = KLVAE(**TINY, latent_channels=2, scale=0.5, shift=3.0)
    mean, log_variance = np.array([1.0, -2.0]), np.array([math.log(4.0), -1000.0])
    moments = np.broadcast_to(np.concatenate([mean, log_variance]), (4, 64, 64, 4)).astype(np.float32)
    latents = np.asarray(codec.sample_latent(jax.random.key(0), moments))
    assert latents.shape == (4, 64, 64, 2)
    np.testing.assert_allclose(latents[..., 0].mean(), (1 - 3) * 0.5, atol=0.03)
    np.testing.assert_allclose(latents[..., 0].std(), 2 * 0.5, rtol=0.03)
    np.testing.assert_allclose(latents[..., 1], (-2 - 3) * 0.5, atol=1e-5)
    _, clipped = split_moments(np.array([0, 0, -1000.0, 1000.0], np.float32))
    np.testing.assert_array_equal(clipped, [-30, 20])


@pytest.mark.parametrize("size, tile, overlap", [(9, 4, 1), (10, 4, 3), (7, 4, 0), (4, 4, 2), (3, 8, 2), (40, 16, 6)])
def test_tile_weights_add_up_to_one(size, tile, overlap):
    """A seam, a hole or a doubled strip in tiled decoding, above all where the size is no multiple of the stride."""
    starts, weights = tile_axis(size, tile, overlap, factor=8)
    total = np.zeros(size * 8)
    for start, weight in zip(starts, weights, strict=True):
        assert start + min(tile, size) <= size and weight.min() >= 0
        total[start * 8 : start * 8 + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    if overlap:
        assert np.abs(np.diff(weights)).max() <= 1.5 / (8 * overlap)  # a ramp, not a cut


def test_tiled_decode_is_exact_for_a_pointwise_decoder(tiny, monkeypatch):
    """A tile read or written in the wrong place, rows and columns swapped, scale or shift applied twice.

    What makes tiles differ from the whole is taken out: norms, attention, all but the middle tap of every convolution.
    """
    codec, params = tiny
    codec = dataclasses.replace(codec, scale=0.5, shift=0.25)
    monkeypatch.setattr(kl_vae.Layer, "norm", lambda self, name: lambda x: x)
    monkeypatch.setattr(kl_vae, "spatial_attention", lambda query, key, value: value)
    middle_tap = np.zeros((3, 3, 1, 1), np.float32)
    middle_tap[1, 1] = 1
    params = jax.tree.map(lambda x: x * middle_tap if x.shape[:2] == (3, 3) else x, params)
    latents = jax.random.normal(jax.random.key(0), (2, 13, 7, 4))
    full = np.asarray(jax.jit(codec.decode)(params, latents))
    for tile, overlap in ((5, 2), (8, 3), (16, 3)):
        assert_close(jax.jit(codec.decode_tiled, static_argnums=(2, 3))(params, latents, tile, overlap), full, 1e-5)


def test_tiled_decode_is_close_where_tiles_share_their_statistics(tiny):
    """Seams: hard cuts between tiles, whose borders saw zero padding where their neighbour's latents are."""
    codec, params = tiny
    latents = jnp.tile(0.2 * jax.random.normal(jax.random.key(0), (1, 4, 4, 4)), (1, 14, 8, 1))  # 56 x 32, period 4

    def error(tile, overlap):
        difference = jax.jit(codec.decode_tiled, static_argnums=(2, 3))(params, latents, tile, overlap) - full
        return np.sqrt(np.mean(np.square(difference))) / full.std()

    full = np.asarray(jax.jit(codec.decode)(params, latents))
    blended, cut = error(32, 16), error(32, 0)
    assert blended < 0.06 and blended < 0.5 * cut


@pytest.mark.slow
def test_tiled_decode_needs_the_memory_of_a_tile():
    """Tiles kept alive together, by vmap or unrolling, which defeats their purpose."""
    codec = KLVAE(**TINY)
    params = jax.eval_shape(codec.init, jax.random.key(0))

    def temporary_bytes(decode, side):
        latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
        return jax.jit(decode).lower(params, latents).compile().memory_analysis().temp_size_in_bytes

    output = 4 * 3 * (8 * 48) ** 2
    tiled = temporary_bytes(lambda p, z: codec.decode_tiled(p, z, 16, 4), 48)
    assert tiled < 1.2 * temporary_bytes(codec.decode, 16) + 2 * output
    assert tiled < temporary_bytes(codec.decode, 48) / 3


def test_presets_have_the_published_sizes():
    """A level, block, bias or quant convolution too many: 83,653,863 parameters for SD, as in diffusers."""

    def count(codec):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(codec.init, jax.random.key(0))))

    assert count(PRESETS["sd"]) == 83_653_863
    assert count(PRESETS["sd3"]) == count(PRESETS["flux"]) == 83_819_683
    assert PRESETS["sd"].latent_shape((256, 256, 3)) == (32, 32, 4)
    assert PRESETS["f16"].latent_shape((256, 256, 3)) == (16, 16, 16)


def test_kernels_start_as_in_pytorch():
    """Linen's default scale, or fan_in taken from the wrong axes: the bound is 1 / sqrt(3 * 3 * inputs)."""
    kernel = kl_vae.torch_uniform(jax.random.key(0), (3, 3, 16, 32), jnp.float32)
    bound = 1 / math.sqrt(9 * 16)
    assert 0.99 * bound < jnp.abs(kernel).max() <= bound
    np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.02)


@pytest.mark.slow  # a quarter of a minute: XLA compiles one random generator for each kernel
def test_init_gives_usable_parameters():
    """Dead or exploding initial weights, and encode and decode that do not fit each other."""
    codec = KLVAE((8, 16), layers_per_block=1, norm_groups=4, image_channels=1)
    params = codec.init(jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (1, 16, 24, 1), minval=-1)
    latents = codec.sample_latent(jax.random.key(2), jax.jit(codec.encode)(params, images))
    assert latents.shape == (1, 8, 12, 4)
    decoded = jax.jit(codec.decode)(params, latents)
    assert decoded.shape == images.shape and 1e-3 < jnp.abs(decoded).max() < 10


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda c, p: c.encode(p, jnp.zeros((1, 20, 7, 3))), "at least 8"),
        (lambda c, p: c.encode(p, jnp.zeros((1, 16, 16, 3), jnp.uint8)), "uint8"),
        (lambda c, p: c.encode(p, jnp.zeros((1, 3, 16, 16))), r"\[B, H, W, 3\]"),
        (lambda c, p: c.encode(p, jnp.zeros((16, 16, 3))), r"\(16, 16, 3\)"),
        (lambda c, p: c.decode(p, jnp.zeros((1, 2, 2, 8))), r"\[B, h, w, 4\]"),
        (lambda c, p: c.decode_tiled(p, jnp.zeros((1, 8, 8, 4)), 4, 4), "overlap 4"),
        (lambda c, p: c.decode_tiled(p, jnp.zeros((1, 8, 8, 4)), 4, -1), "overlap -1"),
        (lambda c, p: c.sample_latent(jax.random.key(0), jnp.zeros((1, 2, 2, 4))), "must be 8"),
        (lambda c, p: c.latent_shape((256, 250, 3)), "250 is not a positive multiple of the codec's downsample 8"),
        (lambda c, p: KLVAE(block_out_channels=(48,)), "norm_groups 32"),
        (lambda c, p: KLVAE(scale=0.0), "scale 0.0"),
        (lambda c, p: KLVAE(layers_per_block=0), "layers_per_block 0"),
        (lambda c, p: KLVAE(dtype="int32"), "dtype 'int32' is not"),
        (lambda c, p: KLVAE(param_dtype="bf16"), "param_dtype 'bf16' is not"),
        (lambda c, p: KLVAE(block_out_channels=()), "empty"),
    ],
)
def test_bad_input_is_refused(call, message):
    """A wrong shape, dtype or size that would go through and give wrong numbers."""
    with pytest.raises(ValueError, match=message):
        call(KLVAE(**TINY), {})


def test_a_codec_from_a_config_equals_the_same_codec_in_python():
    """Lists and dtype names from a config that make a codec unhashable, or unequal to itself in a resume check."""
    written = KLVAE(block_out_channels=[32, 64], dtype="bfloat16")
    assert written == KLVAE(block_out_channels=(32, 64), dtype=jnp.bfloat16) and hash(written)


@pytest.mark.slow
def test_the_full_size_autoencoder_equals_diffusers(tmp_path):
    """An error that only shows at 512 channels and 84 M parameters."""
    codec = PRESETS["sd"]
    model, params = loaded(codec, tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    moments = codec.encode(params, images)
    assert_close(moments, diffusers_encode(model, images))
    z = np.array(split_moments(moments)[0])
    assert_close(codec.decode(params, z * codec.scale), diffusers_decode(model, z))


def test_scale_and_shift_per_channel(tiny):
    """A scale applied along the width, before the shift, or on one way only."""
    codec, params = tiny
    numbers = dataclasses.replace(codec, scale=2.0, shift=0.5)
    lists = dataclasses.replace(codec, scale=[2.0] * 4, shift=[0.5] * 4)
    own = dataclasses.replace(codec, scale=(1.0, 2.0, 3.0, 4.0), shift=(0.5, 0.0, 0.0, -1.0))
    moments, key = jax.random.normal(jax.random.key(0), (2, 3, 5, 8)), jax.random.key(1)
    z = numbers.sample_latent(key, moments)
    np.testing.assert_allclose(lists.sample_latent(key, moments), z, rtol=1e-6)
    np.testing.assert_allclose(
        own.sample_latent(key, moments), (z / 2 + 0.5 - jnp.asarray(own.shift)) * jnp.asarray(own.scale), rtol=1e-5, atol=1e-6
    )
    decode = jax.jit(lambda codec, z: codec.decode(params, z), static_argnums=0)
    np.testing.assert_allclose(decode(own, own.sample_latent(key, moments)), decode(numbers, z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"scale": (1.0, 2.0)}, "2 numbers for 4 latent channels"),
        ({"shift": (0.0,) * 5}, "5 numbers for 4 latent channels"),
        ({"scale": (1.0, 0.0, 1.0, 1.0)}, "must be positive"),
        ({"shift": (1.0, math.nan, 1.0, 1.0)}, "must be finite"),
        ({"scale": -1.0}, "must be positive"),
    ],
)
def test_bad_scales(fields, text):
    """A list that broadcasts over the wrong axis, a division by zero when decoding."""
    with pytest.raises(UserError, match=text):
        KLVAE(**fields)


def test_normalised():
    """A variance in place of a deviation, or a shift of the wrong sign."""
    rng = np.random.default_rng(0)
    codec = KLVAE((8, 16), layers_per_block=1, norm_groups=4)
    mean, std = np.array([1.0, -2.0, 0.0, 5.0]), np.array([0.5, 1.0, 2.0, 4.0])
    z = rng.normal(size=(1, 64, 64, 4)) * std + mean
    moments = np.concatenate([z, np.full_like(z, -30.0)], -1).astype(np.float32)
    per_channel = normalised(codec, mean, std).sample_latent(jax.random.key(0), moments)
    np.testing.assert_allclose(per_channel.mean((0, 1, 2)), 0, atol=0.1)
    np.testing.assert_allclose(per_channel.std((0, 1, 2)), 1, atol=0.05)
    whole = normalised(codec, z.mean(), z.std())
    assert isinstance(whole.scale, float)
    np.testing.assert_allclose(whole.sample_latent(jax.random.key(0), moments).std(), 1, atol=0.01)
    with pytest.raises(UserError, match="must be positive"):
        normalised(codec, mean, [1.0, 0.0, 1.0, 1.0])


def test_the_stable_diffusion_codec_costs_what_it_is_known_to_cost():
    """A layer counted twice or at the wrong resolution: 136.4 and 311.1 GMACs at 256 px."""
    assert np.array(PRESETS["sd"].macs((256, 256, 3))) / 1e9 == pytest.approx((136.4, 311.1), abs=0.05)


@pytest.mark.parametrize(
    "codec, shape",
    [
        (PRESETS["sd"], (128, 128, 3)),
        (PRESETS["f16"], (128, 128, 3)),
        (PRESETS["f16"], (64, 160, 3)),
        (KLVAE((64, 96), layers_per_block=3, latent_channels=16, use_quant_conv=False, image_channels=1), (96, 128, 1)),
    ],
    ids=["sd", "f16", "f16_wide", "other"],
)
def test_the_count_agrees_with_xla(codec, shape):
    """A term missing for other widths, depths, channels or sides. XLA leaves out padding (up to 5 %) and adds norms."""
    params = jax.eval_shape(codec.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, *codec.latent_shape(shape)), jnp.float32)
    xla = [
        jax.jit(function).lower(params, x).cost_analysis()["flops"] / 2
        for function, x in ((codec.encode, images), (codec.decode, latents))
    ]
    assert codec.macs(shape) == pytest.approx(xla, rel=0.05)
    assert codec.macs(shape)[0] != pytest.approx(codec.macs(shape)[1], rel=0.2)  # the order (encode, decode) is seen


def test_attention_grows_with_the_square_of_the_tokens():
    """The attention products left out, or counted as linear: q k^T and the sum of values are N^2 C each."""
    grown = PRESETS["sd"].macs((1024, 4096, 3))[0] - 64 * PRESETS["sd"].macs((128, 512, 3))[0]
    assert grown == 2 * (65536**2 - 64 * 1024**2) * 512


def test_shapes_of_latents():
    """Height and width swapped; a codec that takes what it cannot encode, or that refuses what it can."""
    assert PRESETS["sd"].latent_shape((256, 384, 3)) == (32, 48, 4)
    assert Pixels(1).latent_shape((8, 12, 1)) == (8, 12, 1) and Pixels(3).latent_shape((5, 8, 12, 3)) == (5, 8, 12, 3)
    assert Pixels(3).macs((8, 12, 3)) == (0, 0)
    for codec, shape, message in (
        (PRESETS["sd"], (250, 256, 3), "height 250"),
        (PRESETS["sd"], (256, 0, 3), "width 0"),
        (PRESETS["sd"], (256, 256, 1), "must be equal"),
        (PRESETS["sd"], (5, 256, 256, 3), "codec for clips"),
        (Pixels(3), (8, 8, 1), "must be equal"),
    ):
        with pytest.raises(UserError, match=message):
            codec.latent_shape(shape)
