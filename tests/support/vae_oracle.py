"""Random diffusers autoencoders to compare with, for the tests of the codecs and of interop/vae.py."""

import pytest

from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.codecs.vq_vae import VQVAE

# Keywords of KLVAE. Norm groups of one, two and more channels; a scale and shift that change the result.
TINY = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "norm_groups": 4}
LAYOUTS = {
    "sd": {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2, "norm_groups": 32},
    "no_quant_16": {**TINY, "latent_channels": 16, "use_quant_conv": False, "scale": 1.5305, "shift": 0.0609},
    "grey_f16": {**TINY, "block_out_channels": (8, 8, 12, 16, 16), "image_channels": 1},
}


def diffusers_vae(codec: KLVAE, seed=0):
    """A random `AutoencoderKL` in which every tensor changes the output: norms differ from (1, 0), attention is not uniform."""
    return _randomized(
        "AutoencoderKL",
        codec,
        seed,
        shift_factor=codec.shift or None,
        use_quant_conv=codec.use_quant_conv,
        use_post_quant_conv=codec.use_quant_conv,
    )


def diffusers_vq(codec: VQVAE, seed=0):
    """A random `VQModel`, as `diffusers_vae`; its codebook has the size of the encoder's outputs."""
    model = _randomized("VQModel", codec, seed, num_vq_embeddings=codec.codebook_size)
    model.quantize.embedding.weight.data.normal_()
    return model


def _randomized(kind, codec, seed, **fields):
    """A class of diffusers with random parameters; changes the norms from (1, 0), and sharpens the attention."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    levels = len(codec.block_out_channels)
    model = getattr(diffusers, kind)(
        in_channels=codec.image_channels,
        out_channels=codec.image_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=codec.block_out_channels,
        layers_per_block=codec.layers_per_block,
        latent_channels=codec.latent_channels,
        norm_num_groups=codec.norm_groups,
        scaling_factor=codec.scale,
        **fields,
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif "norm" in name:
                tensor.normal_(0, 0.3)
            elif ".to_q." in name or ".to_k." in name:
                tensor.mul_(3)
    return model


def diffusers_encode(model, images):
    """Raw moments, NHWC, of NHWC images; NumPy in and out."""
    import torch

    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(images).permute(0, 3, 1, 2)).latent_dist
    return posterior.parameters.permute(0, 2, 3, 1).numpy()


def diffusers_decode(model, latents):
    """Images of unscaled NHWC latents; NumPy in and out."""
    import torch

    with torch.no_grad():
        images = model.decode(torch.from_numpy(latents).permute(0, 3, 1, 2)).sample
    return images.permute(0, 2, 3, 1).numpy()


def diffusers_wan(codec: CausalVAE, seed=0):
    """A random `AutoencoderKLWan` in which every tensor changes the output: gammas differ from 1, attention is not uniform."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKLWan(
        base_dim=codec.base,
        z_dim=codec.z,
        dim_mult=list(codec.mult),
        num_res_blocks=codec.blocks,
        temperal_downsample=list(codec.temporal),
        latents_mean=list(codec.shift),
        latents_std=[1 / x for x in codec.scale],
        in_channels=codec.image_channels,
        out_channels=codec.image_channels,
        scale_factor_temporal=codec.time_factor,
        scale_factor_spatial=codec.downsample,
    ).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("gamma"):
                tensor.uniform_(0.5, 1.5)
            elif ".to_qkv.weight" in name:
                tensor.mul_(3)
    return model


def channels_last(x):
    """[B, C, F, H, W] of PyTorch -> NumPy [B, F, H, W, C]."""
    return x.detach().permute(0, 2, 3, 4, 1).numpy()


def channels_first(x):
    """NumPy [B, F, H, W, C] -> [B, C, F, H, W] of PyTorch."""
    import torch

    return torch.from_numpy(x).permute(0, 4, 1, 2, 3)
