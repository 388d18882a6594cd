"""The count of the autoencoder's multiply-adds."""

import jax
import jax.numpy as jnp
import pytest

from dit_jax.codecs.kl_vae import KLVAE, PRESETS
from dit_jax.codecs.macs import gmacs


def test_the_stable_diffusion_codec_costs_what_it_is_known_to_cost():
    """A layer counted twice or at the wrong resolution: 136.4 and 311.1 GMACs at 256 px."""
    assert gmacs(PRESETS["sd"], 256) == pytest.approx((136.4, 311.1), abs=0.05)


@pytest.mark.parametrize(
    "codec",
    [
        PRESETS["sd"],
        PRESETS["f16"],
        KLVAE((64, 96), layers_per_block=3, latent_channels=16, use_quant_conv=False, image_channels=1),
    ],
    ids=["sd", "f16", "other"],
)
def test_the_count_agrees_with_xla(codec):
    """A term missing for other widths, depths or channels. XLA leaves out padding (up to 5 %) and adds norms."""
    params = jax.eval_shape(codec.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((1, 128, 128, codec.image_channels), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, *codec.latent_shape(128)), jnp.float32)
    xla = [
        jax.jit(function).lower(params, x).cost_analysis()["flops"] / 2e9
        for function, x in ((codec.encode, images), (codec.decode, latents))
    ]
    assert gmacs(codec, 128) == pytest.approx(xla, rel=0.05)
    assert gmacs(codec, 128)[0] != pytest.approx(gmacs(codec, 128)[1], rel=0.2)  # the order (encode, decode) is seen


def test_attention_grows_with_the_square_of_the_tokens():
    """The attention products left out, or counted as linear: q k^T and the sum of values are N^2 C each."""
    grown = gmacs(PRESETS["sd"], 2048)[0] - 64 * gmacs(PRESETS["sd"], 256)[0]
    assert grown == pytest.approx(2 * (65536**2 - 64 * 1024**2) * 512 / 1e9, rel=1e-6)
