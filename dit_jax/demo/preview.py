"""Pictures of latents while a sampler runs, with NumPy alone: a callback of the sampler must not call JAX."""

import base64
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from dit_jax.codecs.pixels import Pixels

LARGEST_SIDE = 96  # pixels of a live picture
FITTED = 8  # latents that the linear map is fitted to
BLOBS = 4  # random values along a side of each of them


class Preview:
    """uint8 pictures of latents: the images themselves without an autoencoder, else a linear map of the latents.

    Sampling occupies the device, so a VAE's decoder would wait for its end. A VAE's latents are nearly a small picture: each
    pixel's colour is nearly linear in its channels. The map is the least-squares fit to what the decoder makes of smooth random
    latents, each averaged to their size. The finished images come from the decoder.

    Args:
        latent_shape: (h, w, c).
        decode: `Pipeline.decode`. It is called once, here; it runs on the device.
    """

    def __init__(self, codec: object, latent_shape: tuple[int, ...], decode: Callable[[np.ndarray], np.ndarray]):
        self.is_exact = isinstance(codec, Pixels)
        if isinstance(codec, Pixels):
            channels = latent_shape[-1]
            self.matrix = np.concatenate([np.eye(channels) * codec.std, np.full((1, channels), codec.mean)])
        else:
            latents = smooth_latents(FITTED, latent_shape)
            self.matrix = fit(latents, decode(latents))

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """uint8 [n, h, w, C] of latents f32[n, h, w, c]; what is not finite is black."""
        images = np.asarray(latents, np.float32) @ self.matrix[:-1].astype(np.float32) + self.matrix[-1].astype(np.float32)
        return np.nan_to_num(np.clip(127.5 * images + 128, 0, 255)).astype(np.uint8)  # as pixels.to_uint8


def smooth_latents(count: int, latent_shape: tuple[int, ...]) -> np.ndarray:
    """f32[count, h, w, c] of about unit variance, interpolated between random values on a coarse grid; always the same."""
    height, width, channels = latent_shape
    coarse = np.random.default_rng(0).standard_normal((count, BLOBS, BLOBS, channels))
    for axis, size in ((1, height), (2, width)):
        place = np.linspace(0, BLOBS - 1, size)
        low = np.minimum(place.astype(int), BLOBS - 2)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        coarse = (1 - weight) * np.take(coarse, low, axis) + weight * np.take(coarse, low + 1, axis)
    return (coarse / coarse.std()).astype(np.float32)


def fit(latents: np.ndarray, images: np.ndarray) -> np.ndarray:
    """[c + 1, C]: least squares from latents [n, h, w, c] and 1 to images uint8 [n, H, W, C] in [-1, 1], averaged to h x w."""
    count, height, width, channels = latents.shape
    high, wide = images.shape[1] // height, images.shape[2] // width
    small = images.reshape(count, height, high, width, wide, -1).mean((2, 4)) / 127.5 - 1
    x = np.concatenate([latents.reshape(-1, channels), np.ones((count * height * width, 1))], 1)
    return np.linalg.lstsq(x, small.reshape(len(x), -1), rcond=None)[0]


def png(image: np.ndarray, largest_side: int | None = None) -> bytes:
    """PNG of uint8 [H, W, 1 or 3], scaled down to the largest side; the same image gives the same bytes."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if largest_side is not None:
        picture.thumbnail((largest_side, largest_side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: np.ndarray) -> str:
    """A live picture as it stands in the page."""
    return "data:image/png;base64," + base64.b64encode(png(image, LARGEST_SIDE)).decode()
