"""uint8 images to a network's input size, exactly as the programs did whose numbers are compared.

Letters: N images; H, W image; C channels; S side of the result; K taps.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FIXED_BITS = 22  # of Pillow's coefficients: an int of 32 bits less 8 for the pixel and 2 for overshoot
LARGEST_TAPS = 256


def to_rgb(images):
    """uint8 [N, H, W, 3]; a grey image [N, H, W, 1] is the same in R, G and B.

    Raises:
        ValueError: images of another dtype, rank or channel count, or without pixels.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}: uint8 [N, H, W, 1 or 3] is needed, which "
            "dit_jax.pixels.to_uint8 makes of [-1, 1]"
        )
    return jnp.broadcast_to(images, (*images.shape[:3], 3))


def bilinear_tensorflow(images, size: int):
    """[N, H, W, C] of any dtype -> float32 [N, S, S, C] in the range of the images, not rounded.

    TensorFlow 1's ResizeBilinear with align_corners and half_pixel_centers false: result i lies at i H / S between the floor of
    that and its right neighbour, horizontally first. Shrinking skips pixels: there is no antialiasing.
    Source: resize_bilinear_op.cc of TensorFlow.
    """
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images.astype(jnp.float32)
    low, high, fraction = _neighbours(width, size)
    left, right = (images[:, :, places].astype(jnp.float32) for places in (low, high))
    rows = left + (right - left) * fraction[:, None]  # [N, H, S, C]
    low, high, fraction = _neighbours(height, size)
    return rows[:, low] + (rows[:, high] - rows[:, low]) * fraction[:, None, None]


def _neighbours(length: int, size: int):
    """(low, high, fraction) of each of `size` results among `length` pixels, in float32 as TensorFlow computes them."""
    place = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = place.astype(np.int32)
    return low, np.minimum(low + 1, length - 1), place - low.astype(np.float32)


def bicubic_pillow(images, size: int):
    """uint8 [N, H, W, C] -> uint8 [N, S, S, C]: PIL.Image.resize((S, S), BICUBIC) to the last bit, on device.

    Antialiased when shrinking; rounded to uint8 between the two passes, as Pillow does. The horizontal pass comes first, as in
    Pillow before 13, with which the published numbers were made; Pillow 13 turns the order round for upright images.
    Raises:
        ValueError: an image of a side 64 times S or more.
    Source: Resample.c of Pillow 3.3 to 12.
    """
    x = _pillow_pass("oi,nhic->nhoc", images, images.shape[2], size)
    return _pillow_pass("oi,niwc->nowc", x, images.shape[1], size)


def _pillow_pass(spec: str, x, length: int, size: int):
    if length == size:  # Pillow skips the pass
        return x
    # A coefficient has 24 bits, too many for a float32 product. In three parts of 8 bits the products and their sums (up to
    # 256 of them) are whole numbers below 2^24: exact in float32, in TF32 and in bfloat16 with float32 sums.
    coefficients = _pillow_coefficients(length, size)
    total: jax.Array | int = 1 << (FIXED_BITS - 1)
    for shift, part in ((16, coefficients >> 16), (8, coefficients >> 8 & 255), (0, coefficients & 255)):
        product = jnp.einsum(spec, part.astype(np.float32), x.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        total += product.astype(jnp.int32) << shift
    return jnp.clip(total >> FIXED_BITS, 0, 255).astype(jnp.uint8)


@lru_cache(maxsize=16)
def _pillow_coefficients(length: int, size: int) -> np.ndarray:
    """int32 [size, length]: `cubic_antialiased` times 2^22, rounded half away from zero."""
    if length >= size * LARGEST_TAPS // 4:
        raise ValueError(
            f"images have a side of {length}, too large to be resized to {size} exactly: less than "
            f"{size * LARGEST_TAPS // 4} is needed; shrink them first"
        )
    weights = cubic_antialiased(length, size)
    return np.trunc(weights * (1 << FIXED_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def cubic_antialiased(length: int, size: int) -> np.ndarray:
    """float64 [size, length]: the weight of each pixel in each result; a row sums to 1.

    The kernel with a = -1/2 is stretched when shrinking and cut off at the border: Pillow, and PyTorch with antialias=True.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    found = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        weights = cubic((np.arange(first, last) - centre + 0.5) / stretch, -0.5)
        found[i, first:last] = weights / weights.sum()
    return found


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel, zero beyond 2.  Source: Keys 1981, equation 4 with his a = -1/2 left open."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
