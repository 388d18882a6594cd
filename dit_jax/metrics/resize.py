"""Resizes uint8 images to a network's input size, bit for bit as the programs behind published numbers did.

Letters: N images; H, W image; C channels; S side of the result; K taps.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FIXED_BITS = 22  # of Pillow's coefficients: an int of 32 bits less 8 for the pixel and 2 for overshoot
LARGEST_TAPS = 256


def to_rgb(images: jax.Array) -> jax.Array:
    """Repeats grey images [N, H, W, 1] to uint8 [N, H, W, 3]; RGB images are returned unchanged.

    Raises:
        ValueError: images have another dtype, rank or channel count, or no pixels.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape[1:]:
        raise ValueError(
            f"images are {images.dtype}{list(images.shape)}, not uint8 [N, H, W, 1 or 3]; convert floats in [-1, 1] with "
            "dit_jax.pixels.to_uint8"
        )
    return jnp.broadcast_to(images, (*images.shape[:3], 3))


def bilinear_tensorflow(images: jax.Array, size: int) -> jax.Array:
    """Bilinear resize of [N, H, W, C] of any dtype to float32 [N, S, S, C], not rounded.

    Matches TensorFlow 1's ResizeBilinear with align_corners and half_pixel_centers false: output i interpolates at position
    i H / S, between its floor and the next pixel, horizontally first. There is no antialiasing: shrinking skips pixels.
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
    """(low, high, fraction) of each of `size` outputs among `length` pixels, in float32 as TensorFlow computes them."""
    place = np.arange(size, dtype=np.float32) * np.float32(length / size)
    low = place.astype(np.int32)
    return low, np.minimum(low + 1, length - 1), place - low.astype(np.float32)


def bilinear_centred(images: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resize of [N, H, W, C] of any dtype to float32 [N, *size, C], not rounded.

    Matches PyTorch's interpolate with align_corners=False: pixels have their centres at (i + 1/2) / H, and what lies beyond the
    outer centres is the outer pixel. There is no antialiasing.
    """
    x = images.astype(jnp.float32)
    for axis, length in ((1, size[0]), (2, size[1])):
        if x.shape[axis] == length:
            continue
        scale = np.float32(x.shape[axis] / length)
        place = np.maximum((np.arange(length, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
        low = np.minimum(place.astype(np.int32), x.shape[axis] - 1)
        fraction = (place - low.astype(np.float32)).reshape(-1, *(1,) * (3 - axis))
        left, right = (jnp.take(x, at, axis=axis) for at in (low, np.minimum(low + 1, x.shape[axis] - 1)))
        x = left * (1 - fraction) + right * fraction
    return x


def area_average(images: jax.Array, size: int) -> jax.Array:
    """Means of [N, H, W, C] of any dtype over a grid of equal cells, float32 [N, S, S, C].

    A pixel on a border counts by its share in each cell.

    Raises:
        ValueError: a side is smaller than S.
    """
    rows, columns = (area_weights(length, size).astype(np.float32) for length in images.shape[1:3])
    spec = "oi,pj,nijc->nopc"
    return jnp.einsum(spec, rows, columns, images.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def area_weights(length: int, size: int) -> np.ndarray:
    """Share of each input pixel in each of `size` equal parts of the side, float64 [size, length]; rows sum to 1.

    Raises:
        ValueError: length is smaller than size.
    """
    if length < size:
        raise ValueError(f"a side of {length} pixels cannot be averaged over {size} parts; it must have at least {size}")
    edges, pixels = np.linspace(0, length, size + 1), np.arange(length)
    inside = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(inside, 0) * (size / length)


def bicubic_pillow(images: jax.Array, size: int | tuple[int, int]) -> jax.Array:
    """Resizes uint8 [N, H, W, C] to uint8 [N, S, S, C] on device, bit for bit as PIL.Image.resize((S, S), BICUBIC).

    A size (height, width) need not be square.

    Shrinking antialiases. Like Pillow, it rounds to uint8 between the two passes. The horizontal pass comes first, as in Pillow
    before 13, which produced the published numbers; Pillow 13 reverses the order for portrait images.
    Raises:
        ValueError: a side is 64 times S or more.
    Source: Resample.c of Pillow 3.3 to 12.
    """
    height, width = (size, size) if isinstance(size, int) else size
    x = _pillow_pass("oi,nhic->nhoc", images, images.shape[2], width)
    return _pillow_pass("oi,niwc->nowc", x, images.shape[1], height)


def _pillow_pass(spec: str, x, length: int, size: int):
    if length == size:  # Pillow skips the pass
        return x
    # A coefficient has 24 bits, too many for a float32 product. Split into three parts of 8 bits, the products and their sums
    # (up to 256 terms) are integers below 2^24: exact in float32, in TF32, and in bfloat16 with float32 accumulation.
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
            f"images have a side of {length}, too large for an exact resize to {size}: it must be below "
            f"{size * LARGEST_TAPS // 4}; shrink the images first"
        )
    weights = cubic_antialiased(length, size)
    return np.trunc(weights * (1 << FIXED_BITS) + np.copysign(0.5, weights)).astype(np.int32)


def cubic_antialiased(length: int, size: int) -> np.ndarray:
    """Weight of each input pixel in each output, float64 [size, length]; rows sum to 1.

    The kernel (a = -1/2) is stretched when shrinking and truncated at the border, as in Pillow and in PyTorch with
    antialias=True.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = 2.0 * stretch
    matrix = np.zeros((size, length))
    for i in range(size):
        centre = (i + 0.5) * scale
        first, last = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), length)
        weights = cubic((np.arange(first, last) - centre + 0.5) / stretch, -0.5)
        matrix[i, first:last] = weights / weights.sum()
    return matrix


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """The cubic convolution kernel, zero beyond 2.  Source: Keys 1981, equation 4, with `a` for his -1/2."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
