"""LPIPS, the perceptual distance for training autoencoders: compares VGG16 features channel by channel.

Letters: B batch; H, W image; C channels of a stage.
Source: Zhang et al. 2018 (The Unreasonable Effectiveness of Deep Features as a Perceptual Metric), equation 1, version 0.1
of the `lpips` package with net="vgg". Only trained weights are meaningful, so there is no init;
`dit_jax.interop.lpips.load` reads them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # widths of VGG16's convolutions
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)  # one position in the last stage
EPSILON = 1e-10


def shapes() -> dict:
    """The parameters of `lpips` as ShapeDtypeStructs, float32."""
    params: dict[str, Any] = {"scaling": {"shift": (3,), "scale": (3,)}}
    before = 3
    for stage, widths in enumerate(STAGES, 1):
        for layer, width in enumerate(widths, 1):
            params[f"conv{stage}_{layer}"] = {"kernel": (3, 3, before, width), "bias": (width,)}
            before = width
        params[f"lin{stage}"] = (before,)
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), params, is_leaf=lambda x: isinstance(x, tuple))


def lpips(params: Any, images: jax.Array, others: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """The perceptual distance of each pair, float32 [B]; symmetric, and 0 for equal images.

    Args:
        params: of `dit_jax.interop.lpips.load`. Pass them to the jitted function as an argument, not in a closure: 59 MB.
        images, others: [B, H, W, 3] floating in [-1, 1], H and W at least 16; [B, H, W, 1] is grey, the same in R, G and B.
            Both get a gradient; stop it if only one is wanted.
        dtype: of convolutions and activations; norms, differences and means are always float32. jax_default_matmul_precision
            determines the precision of float32 products.
    Raises:
        ValueError: images have another rank, dtype, channel count or size, or different shapes. The range is not checked.
    """
    if images.shape != others.shape:
        raise ValueError(f"images have shape {images.shape} and others {others.shape}: the shapes must be equal")
    distance = jnp.zeros(len(images), jnp.float32)
    pairs = zip(features(params, images, dtype), features(params, others, dtype), strict=True)
    for stage, (x, y) in enumerate(pairs, 1):
        squared = jnp.square(normalize(x) - normalize(y))
        distance += (squared * params[f"lin{stage}"].astype(jnp.float32)).sum(-1).mean((1, 2))
    return distance


def features(params: Any, images: jax.Array, dtype: Any = jnp.float32) -> list[jax.Array]:
    """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG16: [B, H / 2^i, W / 2^i, C] of `dtype`, i = 0 to 4, sizes floored.

    Arguments and errors as for `lpips`.
    """
    _check(images)
    shift, scale = (params["scaling"][name].astype(jnp.float32) for name in ("shift", "scale"))
    x, outputs = ((images.astype(jnp.float32) - shift) / scale).astype(dtype), []
    for stage, widths in enumerate(STAGES, 1):
        if stage > 1:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for layer in range(1, len(widths) + 1):
            x = jax.nn.relu(_convolve(x, params[f"conv{stage}_{layer}"]))
        outputs.append(x)
    return outputs


def _check(images):
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images have dtype {images.dtype}: convert to float32 in [-1, 1], uint8 as x / 127.5 - 1")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(f"images have shape {images.shape}, not [B, H, W, 3] or [B, H, W, 1]")
    if min(images.shape[1:3]) < SMALLEST_SIDE:
        raise ValueError(
            f"images are {images.shape[1]} x {images.shape[2]}, but LPIPS needs at least {SMALLEST_SIDE} x "
            f"{SMALLEST_SIDE}: enlarge them first, or train without a perceptual loss"
        )


def _convolve(x, layer):
    y = lax.conv_general_dilated(x, layer["kernel"].astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + layer["bias"].astype(x.dtype)


def normalize(x: jax.Array) -> jax.Array:
    """x / (|x| + 1e-10) over channels, float32; zero stays zero.

    Deviation: the gradient is finite if all channels are zero or so small that their squares underflow. The square root's slope
    is infinite there. The preceding ReLU hides the resulting NaN in the first case, but not in the second.
    """
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(-1, keepdims=True)
    return x / (jnp.sqrt(jnp.where(squares > 0, squares, 1.0)) + EPSILON)
