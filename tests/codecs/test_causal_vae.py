"""The causal autoencoder of clips against diffusers' AutoencoderKLWan, and its two forms, causality, tiling and refusals."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_oracle import channels_first, channels_last, diffusers_vae, diffusers_wan

from dit_jax.codecs.causal_vae import PRESETS, CausalVAE
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.errors import UserError
from dit_jax.interop.inflation import inflated
from dit_jax.interop.vae import load_diffusers, read_codec, save_diffusers
from dit_jax.parallel.mesh import make_mesh, place
from dit_jax.parallel.rules import shardings

SMALL = CausalVAE(base=4, mult=(1, 2, 3), blocks=1, z=2, temporal=(True, True), scale=(0.5, 2.0), shift=(0.1, -0.3))
WAN_LIKE = CausalVAE(base=6, mult=(1, 2, 4, 4), blocks=2, z=3, scale=(0.5, 2.0, 1.5), shift=(0.1, -0.3, 0.0))


def relative(ours, reference):
    """Largest difference relative to the largest value."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return np.abs(np.asarray(ours) - np.asarray(reference)).max() / np.abs(np.asarray(reference)).max()


@pytest.fixture(scope="module")
def params():
    """Weights of SMALL in which every tensor matters."""
    shapes = jax.eval_shape(SMALL.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.normal(size=x.shape) / math.sqrt(max(x.size // x.shape[-1], 4))).astype(np.float32), shapes
    )


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(1).uniform(-1, 1, (2, 9, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def moments(params, clip):
    return np.asarray(jax.jit(SMALL.encode)(params, clip))


@pytest.fixture(scope="module")
def latents():
    return np.random.default_rng(2).normal(size=(2, 3, 2, 3, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def decoded(params, latents):
    return np.asarray(jax.jit(SMALL.decode)(params, latents))


@pytest.mark.parametrize(
    "codec, frames, height, width",
    [
        (dataclasses.replace(SMALL, temporal=(True, False), image_channels=1), 9, 12, 8),
        pytest.param(WAN_LIKE, 9, 16, 24, marks=pytest.mark.slow),
    ],
)
def test_equals_diffusers(codec, frames, height, width, tmp_path):
    """A wrong padding, cache, order of frames or halves, a norm without sqrt(C), a transposed kernel, swapped sides."""
    torch = pytest.importorskip("torch")
    model = diffusers_wan(codec)
    model.save_pretrained(tmp_path)
    found = read_codec(tmp_path)
    assert dataclasses.replace(found, scale=codec.scale, shift=codec.shift) == codec
    np.testing.assert_allclose(found.scale, codec.scale, rtol=1e-6)
    params = load_diffusers(tmp_path, codec)
    rng = np.random.default_rng(3)
    clip = rng.uniform(-1, 1, (1, frames, height, width, codec.image_channels)).astype(np.float32)
    # The encoder's gradient by the clip, for a cotangent that weighs all moments differently.
    given = channels_first(clip).requires_grad_(True)
    theirs = model.encode(given).latent_dist.parameters
    weights = rng.normal(size=channels_last(theirs).shape).astype(np.float32)
    (gradient,) = torch.autograd.grad((theirs * channels_first(weights)).sum(), given)
    moments, back = jax.vjp(jax.jit(codec.encode), params, clip)
    assert relative(moments, channels_last(theirs)) < 1e-5
    params_gradient, ours = back(jnp.asarray(weights))
    assert relative(ours, channels_last(gradient)) < 1e-5
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(params_gradient["encoder"]))
    z = rng.normal(size=(*moments.shape[:-1], codec.z)).astype(np.float32)
    with torch.no_grad():
        images = channels_last(model.decode(channels_first(z)).sample)
    scaled = (z - np.float32(codec.shift)) * np.float32(codec.scale)
    assert relative(np.clip(jax.jit(codec.decode)(params, scaled), -1, 1), images) < 1e-5


def test_published_sizes():
    """Another layout than the published weights have."""
    counts = {}
    for name, codec in PRESETS.items():
        counts[name] = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(codec.init, jax.random.key(0))))
    assert counts == {"wan": 126_892_531, "walt": 170_050_539}
    assert PRESETS["walt"].latent_shape((17, 128, 128, 3)) == (5, 16, 16, 8)


@pytest.mark.parametrize("chunk", [4, pytest.param(8, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.exhaustive)])
def test_chunks_give_the_same_numbers(chunk, params, clip, moments, latents, decoded):
    """A cache that is one frame off, zeros in place of what came before, a lost last chunk."""
    codec = dataclasses.replace(SMALL, chunk_frames=chunk)
    clip = np.concatenate([clip, clip[:, 1:5]], 1)  # 13 frames: chunks of 8 leave 4
    whole = jax.jit(SMALL.encode)(params, clip)
    assert relative(whole[:, :3], moments) < 1e-6
    assert relative(jax.jit(codec.encode)(params, clip), whole) < 1e-6
    longer = np.concatenate([latents, latents[:, 1:2]], 1)
    frames = jax.jit(codec.decode)(params, longer)
    assert relative(frames, jax.jit(SMALL.decode)(params, longer)) < 1e-6
    assert relative(frames[:, :9], decoded) < 1e-6


def test_later_frames_change_nothing(params, clip, moments, latents, decoded):
    """A norm, an attention or a padding that sees later frames: in the parallel form, bit for bit."""
    encode, decode = jax.jit(SMALL.encode), jax.jit(SMALL.decode)
    for frame, known in ((1, 1), (4, 1), (5, 2)):
        changed = clip.copy()
        changed[:, frame:] = -changed[:, frame:]
        found = np.asarray(encode(params, changed))
        np.testing.assert_array_equal(found[:, :known], moments[:, :known])
        assert np.abs(found[:, known] - moments[:, known]).min() > 0
    for frame in (1, 2):
        changed = latents.copy()
        changed[:, frame:] = -changed[:, frame:]
        found = np.asarray(decode(params, changed))
        np.testing.assert_array_equal(found[:, : 4 * frame - 3], decoded[:, : 4 * frame - 3])


@pytest.mark.slow
def test_a_prefix_is_encoded_as_itself(params, clip, latents):
    """In the chunked form the first frames of a clip have the numbers of the clip that ends with them, bit for bit."""
    codec = dataclasses.replace(SMALL, chunk_frames=4)
    encode, decode = jax.jit(codec.encode), jax.jit(codec.decode)
    whole, frames = encode(params, clip), decode(params, latents)
    np.testing.assert_array_equal(encode(params, clip[:, :1]), whole[:, :1])
    np.testing.assert_array_equal(decode(params, latents[:, :1]), frames[:, :1])
    assert relative(encode(params, clip[:, :5]), whole[:, :2]) < 1e-6
    assert relative(decode(params, latents[:, :2]), frames[:, :5]) < 1e-6


def test_an_image_is_a_clip_of_one_frame(params, clip, latents):
    """A rank that is refused or treated in another way, in any of the four methods."""
    image, latent = clip[:, 0], latents[:, 0]
    assert SMALL.latent_shape(image.shape[1:]) == SMALL.latent_shape(clip[:, :1].shape[1:])[1:] == (2, 3, 2)
    assert SMALL.sample_latent(jax.random.key(0), jnp.zeros((2, 2, 3, 4))).shape == latent.shape
    both = jax.jit(lambda p, x: (SMALL.encode(p, x), SMALL.encode(p, x[:, None])[:, 0]))(params, image)
    np.testing.assert_array_equal(*both)
    both = jax.jit(lambda p, z: (SMALL.decode(p, z), SMALL.decode(p, z[:, None])[:, 0]))(params, latent)
    np.testing.assert_array_equal(*both)
    assert SMALL.macs(image.shape[1:]) == SMALL.macs(clip[:, :1].shape[1:])


@pytest.mark.slow
def test_macs_are_the_compilers(params, clip, latents):
    """A layer that is left out of the count, or counted at another number of frames."""
    for method, given, macs in ((SMALL.encode, clip, 0), (SMALL.decode, latents, 1)):
        flops = jax.jit(method).lower(params, given).compile().cost_analysis()["flops"]
        counted = 2 * len(clip) * SMALL.macs(clip.shape[1:])[macs]
        assert 0.8 < flops / counted < 1.1  # the compiler leaves out products with padding


@pytest.mark.slow
def test_bfloat16_stays_near_float32(params, clip, moments):
    """A norm or a softmax in bfloat16, or outputs left in it."""
    low = dataclasses.replace(SMALL, dtype="bfloat16")
    found = jax.jit(low.encode)(params, clip)
    assert found.dtype == jnp.float32 and relative(found, moments) < 0.05


@pytest.mark.slow
def test_tiles_that_hold_everything_change_nothing(params, latents, decoded):
    """A tile in the wrong place, or scale and shift applied twice."""
    assert relative(jax.jit(SMALL.decode_tiled)(params, latents), decoded) < 1e-6


@pytest.mark.slow
def test_tiles_need_the_memory_of_a_tile_and_a_chunk():
    """Tiles or chunks that are kept alive together."""
    codec = CausalVAE(base=8, mult=(1, 2, 2), blocks=1, z=2, temporal=(True, True))
    shapes = jax.eval_shape(codec.init, jax.random.key(0))

    def temporary(side, frames, tile):
        latents = jax.ShapeDtypeStruct((1, frames, side, side, 2), jnp.float32)
        compiled = jax.jit(lambda p, z: codec.decode_tiled(p, z, tile, 4)).lower(shapes, latents).compile()
        output = math.prod((1 + 4 * (frames - 1), 4 * side, 4 * side, 3)) * 4
        return compiled.memory_analysis().temp_size_in_bytes - 3 * output

    small, large = temporary(16, 3, 16), temporary(48, 9, 16)
    stated = 3.5 * codec.time_factor * (codec.downsample * 16) ** 2 * codec.block_out_channels[0] * 4
    assert large < 1.5 * max(small, stated), (small, large, stated)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2, 2), pytest.param((1, 4, 2), marks=pytest.mark.exhaustive)])
def test_one_device_is_every_mesh(shape, params, clip):
    """A split of kernels or frames under which XLA gives other numbers or gradients."""
    batch = np.concatenate([clip[:, :5]] * 4)
    batch += np.arange(8, dtype=np.float32)[:, None, None, None, None] / 8

    def loss(params, x):
        return jnp.square(SMALL.decode(params, SMALL.encode(params, x)[..., :2])).mean()

    wanted = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh(*shape, jax.devices())
    placed = place(params, shardings(params, mesh, SMALL.rules))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, jax.device_put(batch, rows)))
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(wanted[1]))
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "frame_group"])
def test_weights_survive_the_round_trip(norm, tmp_path):
    """A tensor lost or transposed, or a config that is read otherwise."""
    codec = dataclasses.replace(SMALL, norm=norm, norm_groups=4)
    shapes = jax.eval_shape(codec.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), shapes)
    save_diffusers(tmp_path / "vae", codec, params)
    found = read_codec(tmp_path / "vae")
    np.testing.assert_allclose(found.shift, codec.shift)
    again = load_diffusers(tmp_path / "vae", found)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    if norm == "rms":
        diffusers = pytest.importorskip("diffusers")
        model = diffusers.AutoencoderKLWan.from_pretrained(tmp_path / "vae")
        assert model.config.temperal_downsample == [True, True]
        np.testing.assert_array_equal(
            model.encoder.conv_in.weight.detach().numpy().transpose(2, 3, 4, 1, 0), params["encoder"]["conv_in"]["kernel"]
        )


@pytest.mark.slow
@pytest.mark.parametrize("quant", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_an_inflated_autoencoder_gives_the_same_images(quant, tmp_path):
    """A kernel on another tap than the last, a norm over all frames, or upsampling that halves the width."""
    flat = KLVAE((8, 16, 16), layers_per_block=1, norm_groups=4, use_quant_conv=quant, scale=0.5, shift=0.25)
    model = diffusers_vae(flat)
    model.save_pretrained(tmp_path)
    weights = load_diffusers(tmp_path, flat)
    codec, params = inflated(flat, weights, temporal=(False, True))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(codec.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    moments = jax.jit(flat.encode)(weights, images)
    assert relative(jax.jit(codec.encode)(params, images), moments) < 1e-5
    latents = flat.sample_latent(jax.random.key(0), moments)
    np.testing.assert_allclose(codec.sample_latent(jax.random.key(0), moments), latents, rtol=1e-6)
    assert relative(jax.jit(codec.decode)(params, latents), jax.jit(flat.decode)(weights, latents)) < 1e-5
    # A clip that stands still comes back as its first frame, at every frame.
    still = np.repeat(images[:, None], 3, 1)
    frames = np.asarray(jax.jit(lambda p, x: codec.decode(p, codec.scaled(codec.encode(p, x)[..., :4])))(params, still))
    np.testing.assert_allclose(frames, frames[:, :1].repeat(3, 1), atol=1e-4)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"temporal": (True,)}, "temporal"),
        ({"norm": "group"}, "norm 'group'"),
        ({"base": 0}, "base 0"),
        ({"base": 3, "mult": (1, 1, 1)}, "odd width 3"),
        ({"norm": "frame_group", "norm_groups": 3}, "norm_groups 3"),
        ({"chunk_frames": 6}, "multiple of the codec's time factor 4"),
        ({"scale": (1.0,)}, "2 latent channels"),
    ],
)
def test_bad_sizes_are_refused(fields, words):
    """Fields that fail later, in a trace, or not at all."""
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **fields)


@pytest.mark.parametrize(
    "shape, words",
    [((8, 8, 8, 3), "take 5 or 9 frames"), ((9, 8, 10, 3), "width 10"), ((9, 8, 8, 1), "channels"), ((8, 8), "clips")],
)
def test_clips_that_do_not_fit_are_refused(shape, words):
    """A clip that loses its last frames, or an error without a remedy."""
    with pytest.raises(UserError, match=words):
        SMALL.latent_shape(shape)
