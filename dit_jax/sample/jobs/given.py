"""Reads the images, clips and masks that a job is given.

M images or clips, F frames, H x W x C.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.data.size import size_text
from dit_jax.errors import UserError
from dit_jax.storage.bounded import array_header, read_npz
from dit_jax.storage.paths import local_path

Given = str | os.PathLike | np.ndarray | None
WHITE = 128  # the least level of a mask that is drawn
MAX_FILE_BYTES = 2**30


def read_images(given: Given, shape: tuple[int, ...], resize: bool, name: str = "given") -> np.ndarray:
    """uint8 [M, H, W, C] of an image file (PNG, JPEG, WebP, ...), an .npy, an .npz (`arr_0`, as `sample` writes it) or an array.

    Args:
        given: an array is uint8 [H, W, C], [M, H, W, C], or without C.
        shape: (H, W, C) that the network draws.
        resize: scales and crops the centre, as training does; False refuses images of another size.
        name: of the flag, for messages.

    Raises:
        UserError: nothing is given, it cannot be read, or it has another size and `resize` is False.
    """
    from dit_jax.data.transforms import center_crop, decode  # needs grain, which the benchmark of a bare machine lacks

    if given is None:
        raise UserError(f"give the image to start from: --{name}=<PNG, JPEG, .npy or .npz>")
    *size, channels = shape
    images, what = _arrays(given, name, channels) if isinstance(given, np.ndarray) else _read(local_path(given), name, channels)
    made = []
    for image in images:
        picture = decode(image, channels, what, upright=True)
        if (picture.height, picture.width) != tuple(size):
            if not resize:
                raise UserError(
                    f"{what} is {picture.height} x {picture.width} and the network draws {size[0]} x {size[1]}; give "
                    f"--resize to scale it and crop its centre, or draw that size with --resolution="
                    f"{size_text((picture.height, picture.width))}"
                )
            picture = center_crop(picture, (size[0], size[1]))
        made.append(np.asarray(picture).reshape(shape))
    return np.stack(made)


def read_samples(given: Given, shape: tuple[int, ...], resize: bool, name: str = "given") -> np.ndarray:
    """uint8 [M, H, W, C] of images, or [M, F, H, W, C] of clips, for the shape (F, H, W, C) that the network draws.

    Raises:
        UserError: as `read_images` and `read_clips`; a clip has another number of frames.
    """
    if len(shape) == 3:
        return read_images(given, shape, resize, name)
    clips = read_clips(given, shape[1:], resize, name)
    if clips.shape[1] != shape[0]:
        raise UserError(
            f"{name} has {clips.shape[1]} frames and the network draws {shape[0]}; give --num_frames={clips.shape[1]}"
        )
    return clips


def read_clips(given: Given, shape: tuple[int, ...], resize: bool, name: str = "given", one_clip: bool = True) -> np.ndarray:
    """uint8 [M, F, H, W, C] of clips: an animated WebP or GIF, a film (with PyAV), an .npy or .npz, an array.

    An image is a clip of one frame.

    Args:
        given: arrays are uint8 [M, F, H, W, C] or [F, H, W, C].
        shape: (H, W, C) of a frame.
        one_clip: whether an array of rank 4 is one clip; else it is M images.

    Raises:
        UserError: as `read_images`; clips of different lengths.
    """
    from dit_jax.data.stored_clips import FILMS, StoredClip, is_animation

    if given is None:
        raise UserError(f"give the image or clip to start from: --{name}=<PNG, WebP, GIF, .npy or .npz>")
    if isinstance(given, np.ndarray):
        array = given
    else:
        path = local_path(given)
        content, what = _content(path, name)
        if isinstance(content, np.ndarray):
            array = content
        elif path.suffix.lower() in FILMS or is_animation(content):
            array = np.stack(list(StoredClip(content, what)[:]))
        else:
            return read_images(path, shape, resize, name)[None]
    if array.dtype == bool and shape[-1] == 1:
        array = array.astype(np.uint8) * 255
    if array.ndim == 5 and len(array) and array.shape[1]:
        flat = read_images(array.reshape(-1, *array.shape[2:]), shape, resize, name)
        return flat.reshape(*array.shape[:2], *shape)
    images = read_images(array, shape, resize, name)
    return images[None] if one_clip else images[:, None]


def read_masks(given: Given, shape: tuple[int, ...], resize: bool) -> np.ndarray:
    """bool [M, H, W, 1] or [M, F, H, W, 1], True where is to be drawn: where the mask is white (a level of at least WHITE).

    The mask of a clip is a clip, or an image, which is that of all frames.

    Raises:
        UserError: as `read_samples`; nothing of the mask is white.
    """
    if len(shape) == 4:
        levels = read_clips(given, (*shape[1:3], 1), resize, "mask")
        if levels.shape[1] not in (1, shape[0]):
            raise UserError(
                f"mask has {levels.shape[1]} frames and the network draws {shape[0]}; give one image, or as many frames"
            )
        levels = np.broadcast_to(levels, (len(levels), *shape[:3], 1))
    else:
        levels = read_images(given, (*shape[:2], 1), resize, "mask")
    masks = np.stack([image >= WHITE for image in levels])
    if not masks.reshape(len(masks), -1).any(axis=1).all():
        raise UserError("mask: nothing of it is white, and white is what is drawn; give another mask, or invert it")
    return masks


def cells(masks: np.ndarray, latent_shape: tuple[int, ...]) -> np.ndarray:
    """bool [M, h, w, 1] or [M, f, h, w, 1]: the latents that have a pixel of the mask [M, H, W, 1] or [M, F, H, W, 1].

    A codec that compresses time makes its first latent of the first frame, and each other one of (F - 1) / (f - 1) frames.
    """
    (*_, height, width, _), (*_, h, w, _) = masks.shape, latent_shape
    lead = masks.shape[:-3]
    inside = np.asarray(masks.reshape(*lead, h, height // h, w, width // w, 1).any(axis=(-4, -2)))
    if len(latent_shape) == 3 or lead[1] == latent_shape[0]:
        return inside
    rate = (lead[1] - 1) // (latent_shape[0] - 1)
    rest = inside[:, 1:].reshape(lead[0], latent_shape[0] - 1, rate, h, w, 1).any(2)
    return np.concatenate([inside[:, :1], rest], axis=1)


def for_each(arrays: np.ndarray, num_images: int, what: str) -> np.ndarray:
    """The arrays [M, ...] for N images: M is 1 or N.

    Raises:
        UserError: another M.
    """
    if len(arrays) not in (1, num_images):
        raise UserError(
            f"there are {len(arrays)} {what} and {num_images} images to draw; give one, or one for each "
            f"(--num_samples={len(arrays)})"
        )
    return arrays


def _read(path: Path, name: str, channels: int) -> tuple[list[Any], str]:
    content, what = _content(path, name)
    return ([content], what) if isinstance(content, bytes) else _arrays(content, what, channels)


def _content(path: Path, name: str) -> tuple[bytes | np.ndarray, str]:
    """(the bytes of a picture, or an array; what it is called in messages)."""
    what = f"--{name}={path}"
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{what} is larger than {MAX_FILE_BYTES / 2**30:.0f} GiB; give fewer images")
        if path.suffix == ".npz":
            arrays = read_npz(path, ["arr_0"])
            if "arr_0" not in arrays:
                raise UserError(f"{what} has no array arr_0, uint8 [M, H, W, C], as dit_jax.sample writes it")
            return arrays["arr_0"], what
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                array_header(file)
            return np.load(path, allow_pickle=False), what
        return path.read_bytes(), what
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror}); give another file") from None
    except ValueError as error:
        raise UserError(f"{what} is not a readable array ({error}); save it with numpy.save") from None


def _arrays(array: np.ndarray, what: str, channels: int) -> tuple[list[Any], str]:
    """One uint8 [H, W, C] for each image."""
    if array.dtype == bool and channels == 1:
        array = array.astype(np.uint8) * 255
    if array.ndim == 2 or (array.ndim == 3 and array.shape[-1] not in (1, 3)):
        array = array[..., None]  # [H, W] or [M, H, W] of one channel
    if array.ndim == 3:
        array = array[None]
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise UserError(
            f"{what} is {array.dtype}{list(array.shape)}; uint8 [H, W, C] or [M, H, W, C] with 1 or 3 channels is needed"
        )
    return list(array), what
