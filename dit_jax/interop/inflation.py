"""Makes a causal autoencoder of clips from a trained autoencoder of images, with the same numbers on single frames.

A 3 x 3 kernel becomes the last tap in time of a 3 x 3 x 3 kernel whose other taps are 0, so each frame is computed as an image until
training changes that. The layers that halve or double the frames start as copies: a latent frame is that of its last frame.
Source: Yu et al. 2024 (MAGVIT-v2), section 3.2, initialise from an image tokenizer in this way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_jax.codecs.causal_vae import CausalVAE
from dit_jax.codecs.kl_vae import KLVAE
from dit_jax.errors import UserError


def inflated(codec: KLVAE, params: Mapping[str, Any], temporal: Sequence[bool]) -> tuple[CausalVAE, dict[str, Any]]:
    """(causal codec with norms of each frame, its parameters) of an autoencoder of images.

    Args:
        params: of `codec`, as NumPy arrays.
        temporal: for each level but the last, finest first: whether the frames are halved too.
    Raises:
        UserError: the widths are not multiples of the first one, or `temporal` has another number of entries.
    """
    base = codec.block_out_channels[0]
    if any(width % base for width in codec.block_out_channels):
        raise UserError(
            f"block_out_channels {codec.block_out_channels} are not multiples of the first one, as a causal_vae's are; take an "
            "autoencoder of such widths"
        )
    causal = CausalVAE(
        base=base,
        mult=tuple(width // base for width in codec.block_out_channels),
        blocks=codec.layers_per_block,
        z=codec.latent_channels,
        temporal=tuple(bool(x) for x in temporal),
        norm="frame_group",
        norm_groups=codec.norm_groups,
        scale=codec.scale,
        shift=codec.shift,
        image_channels=codec.image_channels,
        dtype=codec.dtype,
        param_dtype=codec.param_dtype,
    )
    shapes = jax.eval_shape(causal.init, jax.random.key(0))
    return causal, {kind: _layers(shapes[kind], params[kind]) for kind in ("encoder", "decoder")}


def _layers(shapes: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    layers = {}
    dtype = np.asarray(flat["conv_in"]["kernel"]).dtype
    for name, layer in shapes.items():
        if name == "mid_attention":
            parts = [flat[name][part] for part in ("query", "key", "value")]
            qkv = {key: np.concatenate([part[key] for part in parts], axis=-1) for key in ("kernel", "bias")}
            layers[name] = {"norm": flat[name]["norm"], "qkv": qkv, "out": flat[name]["out"]}
        elif name.endswith("_time") or (name.endswith("quant_conv") and name not in flat):
            layers[name] = _copy(layer, dtype)
        elif "kernel" in layer:
            layers[name] = _last_tap(layer, flat[name])
        else:  # a resnet or a norm
            layers[name] = {
                key: _last_tap(part, flat[name][key]) if "conv" in key else flat[name][key] for key, part in layer.items()
            }
    return layers


def _last_tap(layer: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A convolution whose last tap is that of an image; one of four axes, which acts on frames, is kept."""
    kernel = np.asarray(flat["kernel"])
    taps = layer["kernel"].shape[0] if len(layer["kernel"].shape) == 5 else 0
    if taps:
        kernel = np.concatenate([np.zeros((taps - 1, *kernel.shape), kernel.dtype), kernel[None]])
    return {"kernel": kernel, "bias": flat["bias"]}


def _copy(layer: Mapping[str, Any], dtype: Any) -> dict[str, np.ndarray]:
    """A convolution that copies its last frame: once, or, with twice the channels, into two consecutive frames."""
    *_, inputs, outputs = layer["kernel"].shape
    kernel = np.zeros(layer["kernel"].shape, dtype)
    kernel[-1, 0, 0] = np.tile(np.eye(inputs), outputs // inputs)
    return {"kernel": kernel, "bias": np.zeros(outputs, dtype)}
