"""The npz file of samples: arr_0 uint8 [N, H, W, C], or [N, F, H, W, C] for clips; labels int32 [N]; made_by, a JSON text; fps,
frames per second of clips, if they are known; and of a network with text str [N] captions, and prompts and negative_prompts if
there are some.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from dit_jax.errors import UserError
from dit_jax.sample.clip_files import write_clips
from dit_jax.sample.grid import write_image_grid
from dit_jax.storage.atomic import remove_leftovers, replacing
from dit_jax.storage.bounded import json_object, read_npz
from dit_jax.storage.paths import local_path

READ_BYTES = 2**24
# (section, field, value, fields that are left out of `describe` for this value): as versions without these fields described
# samples, of which a folder may hold some.
UNSAID = (
    ("guidance", "schedule", "constant", ("schedule", "power")),
    ("guidance", "image_scale", 1.0, ("image_scale",)),
    ("process", "convention", "sit", ("convention",)),
    ("process", "sampling_grid", "uniform", ("sampling_grid",)),
)


@dataclass(frozen=True, eq=False)
class Samples:
    """Images that a network drew. NumPy takes them for the array of their images.

    Fields:
        images: uint8 [N, H, W, C], or [N, F, H, W, C] for clips.
        labels: int32 [N]; `num_classes` where the network was given no label, 0 for a network without labels.
        made_by: how they were made, as JSON values: weights, sampler, guidance, seed, versions.
        texts: of a network with text, arrays of the npz: "captions", the texts that the network was given, one for each image;
            "prompts", the texts before they were expanded; "negative_prompts". Those that there are.
    """

    images: np.ndarray
    labels: np.ndarray
    made_by: dict[str, Any]
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.images, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Samples({len(self)} images, {' x '.join(map(str, self.images.shape[1:]))})"

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the npz that `sample` writes for these images, atomically; returns its path.

        Raises:
            UserError: the name does not end in .npz, or the file cannot be written.
        """
        path = local_path(path)
        if path.suffix != ".npz":
            raise UserError(f"{path} must end in .npz; save_grid writes a picture")
        try:
            write_stream(path, self.images.shape, [self.images], self.labels, self.made_by, self.texts)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
        return path

    def save_grid(self, path: str | os.PathLike, columns: int | None = None) -> Path:
        """Writes all images as one picture, row by row; returns its path. The suffix is the format.

        columns: images in a row; None makes the grid about square.

        Raises:
            UserError: the suffix is not that of a picture, or the file cannot be written.
        """
        path = local_path(path)
        try:
            write_image_grid(path, self.images, columns)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        return path

    def save_clips(self, path: str | os.PathLike, columns: int | None = None) -> list[Path]:
        """Writes all clips side by side as x.webp, which plays, and as x.mp4 where PyAV is installed; returns the paths.

        Raises:
            UserError: these are images, the name does not end in .webp, or a file cannot be written.
        """
        path = local_path(path)
        if self.images.ndim != 5:
            raise UserError("these samples are images; save_grid writes a picture of them")
        if path.suffix != ".webp":
            raise UserError(f"{path} must end in .webp")
        try:
            return write_clips(path, self.images, self.made_by.get("fps"), columns)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None

    def save_class_grid(self, path: str | os.PathLike) -> Path:
        """Writes a picture with one row for each class, in the order of `labels`, and its name at the side; returns its path.

        Raises:
            UserError: the classes have different numbers of images; as `save_grid`.
        """
        path = local_path(path)
        names = self.made_by.get("class_names", [])
        try:
            order, columns = class_rows(self.labels)
            rows = [names[label] if label < len(names) else str(label) for label in self.labels[order[::columns]]]
            write_image_grid(path, self.images[order], columns, rows=rows)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another path") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        return path


def class_rows(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """(order of the images by class, in the order in which the classes come, number of images of each class).

    Raises:
        ValueError: the classes have different numbers of images.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(set(counts.tolist())) != 1:
        raise ValueError(
            f"the classes have {min(counts)} to {max(counts)} images each; a picture with a row for each needs as many of each"
        )
    first = {label: int(np.argmax(labels == label)) for label in classes}
    return np.array(sorted(range(len(labels)), key=lambda i: (first[labels[i]], i))), int(counts[0])


def describe(config: Any, weights: str, step: int | None, seed: int, class_names: Sequence[str] = ()) -> dict:
    """The settings of samples, which are stored with them.

    weights: `weights_fingerprint` of the parameters in the dtype of training, which may differ from that of sampling.
    class_names: of the labels 0, 1, ..., if they are known.
    """
    sections = ("sampler", "guidance", "forecast", "model", "process")
    codec = {key: value for key, value in config.codec.items() if key != "path"}
    chosen = {name: config[name].to_dict() for name in sections if name in config}
    for section, name, value, left_out in UNSAID:
        if chosen.get(section, {}).get(name) == value:
            chosen[section] = {key: x for key, x in chosen[section].items() if key not in left_out}
    return {
        "step": step,
        "seed": seed,
        "weights": weights,
        "ema_decay": config.ema_decay,
        "codec": codec,
        **chosen,
        **({"class_names": list(class_names)} if class_names else {}),
    }


def write(path: str | os.PathLike, images: np.ndarray, labels: np.ndarray, made_by: dict) -> None:
    """Writes the npz, atomically, and a grid of the first 100 images next to it."""
    path = Path(path)
    write_stream(path, images.shape, [images], labels, made_by)
    write_image_grid(path.with_suffix(".png"), images[:100], columns=10 if len(images) >= 10 else None)


def write_stream(
    path: str | os.PathLike,
    shape: tuple[int, ...],
    blocks: Iterable[np.ndarray],
    labels: np.ndarray,
    made_by: dict,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Writes the npz, atomically, of any size, from blocks of images in order; the same blocks give the same bytes.

    Args:
        shape: [N, H, W, C], or [N, F, H, W, C], of all blocks together.
        made_by: the settings; "images_sha256", the hash of the bytes of all images, is added.
        texts: as of `Samples`.
    """
    path = Path(path)
    remove_leftovers(path.parent, path.name)
    with replacing(path) as partial:
        _write_archive(partial, shape, blocks, labels, made_by, texts)


def npz_bytes(samples: Samples) -> bytes:
    """The bytes of the file that `Samples.save` writes."""
    buffer = io.BytesIO()
    _write_archive(buffer, samples.images.shape, [samples.images], samples.labels, samples.made_by, samples.texts)
    return buffer.getvalue()


def _write_archive(
    file: str | os.PathLike | IO[bytes],
    shape: tuple[int, ...],
    blocks: Iterable[np.ndarray],
    labels: np.ndarray,
    made_by: dict,
    texts: Mapping[str, Sequence[str]] | None,
) -> None:
    sha256 = hashlib.sha256()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "arr_0") as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
            for block in blocks:
                data = np.ascontiguousarray(block).reshape(-1).data
                sha256.update(data)
                member.write(data)
        text = json.dumps({**made_by, "images_sha256": sha256.hexdigest()})
        more = ((name, np.array(list(each), np.str_)) for name, each in (texts or {}).items())
        rate = [("fps", np.array(made_by["fps"], np.float64))] if len(shape) == 5 and made_by.get("fps") else []
        for name, array in (("labels", np.asarray(labels, np.int32)), ("made_by", np.array(text)), *rate, *more):
            with _member(archive, name) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str):
    """Opens a member of the archive for writing. Its date is fixed, so that equal samples give equal files."""
    return archive.open(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), "w", force_zip64=True)


def made_by_of(path: str | os.PathLike) -> dict | None:
    """The `made_by` entry of an npz; None if it has none or cannot be read."""
    path = local_path(path)
    try:
        return json_object(str(read_npz(path, ["made_by"])["made_by"]), str(path))
    except (OSError, ValueError, KeyError):
        return None


def is_sound(path: str | os.PathLike, made_by: dict) -> bool:
    """Whether an npz of `write_stream` is intact; reads all of it."""
    path = local_path(path)
    sha256 = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for name in {"labels.npy", "made_by.npy", *archive.namelist()} - {"arr_0.npy"}:
                archive.read(name)
            with archive.open("arr_0.npy") as member:
                np.lib.format.read_magic(member)
                np.lib.format.read_array_header_1_0(member)
                while block := member.read(READ_BYTES):
                    sha256.update(block)
    except Exception:
        return False
    return sha256.hexdigest() == made_by.get("images_sha256")


def write_picture(path: Path, picture: np.ndarray) -> Path:
    """Writes uint8 [H, W, 3] as PNG, atomically; returns the path."""
    with replacing(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")
    return path
