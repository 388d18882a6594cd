"""Reference statistics: moments of features, optionally the features themselves, and how both were made.

The file is an npz with mu float64 [F] and sigma [F, F], the names that ADM's evaluator and pytorch-fid read; mu_s and sigma_s of
the spatial features if the extractor has them; features float32 [M, F] if they are kept; `recipe`, a JSON string; and `seal`,
the SHA-256 of all of these.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_jax.errors import UserError
from dit_jax.evaluate.extractors import Loaded
from dit_jax.evaluate.images import ARRAY, Images, NpzImages
from dit_jax.evaluate.statistics import Extracted
from dit_jax.metrics.frechet import Moments
from dit_jax.runtime.versions import device_kind, versions
from dit_jax.storage.atomic import remove_leftovers, replacing
from dit_jax.storage.bounded import json_object, read_npz
from dit_jax.storage.paths import local_path

FORMAT = 1
RECIPE_FORM = {"source": str, "count": int, "image_shape": [int], "images_sha256": str, "extractor": {"name": str}}
KEYS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
TENSORFLOW_WIDTHS = {"features": 2_048, "spatial": 2_023}  # of the graph behind published statistics


class Reference(NamedTuple):
    """Moments by output, features float32 [M, F] or None, and the recipe.

    `images` are those in the file, from which features can be computed: ADM's files have 10,000 in addition to the moments.
    """

    moments: dict[str, Moments]
    features: np.ndarray | None
    recipe: dict
    images: Images | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the images (see `Extracted`), or of the moments if the images are not known."""
        return self.recipe.get("images_sha256") or _sha256(_arrays(self.moments, None), "")

    @property
    def published(self) -> bool:
        """Whether the statistics have no recipe of dit_jax."""
        return bool(self.recipe["extractor"].get("published"))


def recipe_of(images: Images, extracted: Extracted, loaded: Loaded) -> dict:
    """Everything that determines reference statistics."""
    return {
        "source": images.name,
        "count": extracted.count,
        "image_shape": list(images.shape),
        "transform": getattr(images, "transform", None),
        "images_sha256": extracted.sha256,
        "made_by": images.made_by,
        "extractor": loaded.describe(),
        "versions": versions("jax", "numpy"),
        "device": device_kind(),
    }


def of_images(images: Images, extracted: Extracted, loaded: Loaded) -> Reference:
    """Makes a reference from the extracted features of images."""
    return Reference(extracted.moments, extracted.features, json.loads(json.dumps(recipe_of(images, extracted, loaded))))


def write(path: str | os.PathLike, reference: Reference) -> None:
    """Writes the reference's file atomically.

    Raises:
        UserError: it cannot be written.
    """
    path = local_path(path)
    arrays = _arrays(reference.moments, reference.features)
    recipe = json.dumps(reference.recipe)
    seal = _sha256(arrays, recipe)
    try:
        remove_leftovers(path.parent, path.name)
        with replacing(path) as partial, open(partial, "wb") as file:
            facts = {"recipe": np.array(recipe), "seal": np.array(seal), "format": np.array(FORMAT)}
            np.savez(file, allow_pickle=False, **arrays, **facts)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another file") from None


def _arrays(moments: dict[str, Moments], features: np.ndarray | None) -> dict[str, np.ndarray]:
    arrays = {}
    for output, (mean, covariance) in KEYS.items():
        if output in moments:
            arrays |= {mean: moments[output].mean, covariance: moments[output].covariance}
    return arrays | ({} if features is None else {"features": features})


def _sha256(arrays: dict[str, np.ndarray], recipe: str) -> str:
    digest = hashlib.sha256(recipe.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def holds_statistics(path: str | os.PathLike) -> bool:
    """Whether an npz contains moments; otherwise it contains images.

    Raises:
        UserError: the file is not an npz.
    """
    path = local_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz: {error}") from None


def read(path: str | os.PathLike) -> Reference:
    """Reads statistics from a file of dit_jax, ADM or pytorch-fid, without opening pickles.

    Of the latter two only the numbers are known: their recipe says "published", and their count is None.

    Raises:
        UserError: the file is not readable, has an unsuitable dtype or shape or a non-finite value, does not match its seal, or
            has an unknown format.
    """
    path = local_path(path)
    arrays = read_npz(path, (*sum(KEYS.values(), ()), "features", "recipe", "seal", "format"))
    recipe, seal, version = (str(arrays.pop(name)) if name in arrays else None for name in ("recipe", "seal", "format"))
    if recipe is None:
        return _published(path, arrays)
    if version != str(FORMAT):
        raise UserError(
            f"{path} has format {version!s:.20}, but this dit_jax reads {FORMAT}: make it again with --make_reference"
        )
    if _sha256(arrays, recipe) != seal:
        raise UserError(f"{path} is damaged: its content does not match its seal. Make it again with --make_reference")
    facts = json_object(recipe, f"the recipe in {path}", "make it again with --make_reference", RECIPE_FORM)
    moments, features = _moments(path, arrays, facts["count"]), arrays.get("features")
    width = len(moments["features"].mean)
    if features is not None and (features.dtype != np.float32 or features.ndim != 2 or features.shape[1] != width):
        raise UserError(
            f"{path}: features is {features.dtype} {list(features.shape)}, not float32 [M, {width}]. Make it again with "
            "--make_reference"
        )
    return Reference(moments, features, facts)


def _published(path: Path, arrays: dict[str, np.ndarray]) -> Reference:
    moments = _moments(path, arrays, None)
    for output, statistics in moments.items():
        if len(statistics.mean) != TENSORFLOW_WIDTHS[output]:
            raise UserError(
                f"{path} has statistics of {len(statistics.mean)} {output} and no recipe; published statistics (of Inception) "
                f"have {TENSORFLOW_WIDTHS[output]}. Make your own with --make_reference"
            )
    images = None
    with zipfile.ZipFile(path) as archive:
        if ARRAY in archive.namelist():
            images = NpzImages(path)
    recipe = {
        "source": str(path),
        "count": None,
        "image_shape": list(images.shape) if images else None,
        "extractor": {"name": "inception", "published": True},
    }
    return Reference(moments, None, recipe, images)


def _moments(path: Path, arrays: dict[str, np.ndarray], count: int | None) -> dict[str, Moments]:
    moments = {}
    for output, names in KEYS.items():
        if not all(name in arrays for name in names):
            continue
        mean, covariance = (arrays[name] for name in names)
        if mean.dtype.kind != "f" or covariance.dtype.kind != "f" or mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
            raise UserError(
                f"{path}: {names[0]} is {mean.dtype} {list(mean.shape)} and {names[1]} is {covariance.dtype} "
                f"{list(covariance.shape)}; they must be floats [F] and [F, F]"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UserError(f"{path}: {names[0]} or {names[1]} contains NaN or infinity")
        moments[output] = Moments(count, mean.astype(np.float64), covariance.astype(np.float64))
    if "features" not in moments:
        raise UserError(f"{path} has no mu and sigma (it has {', '.join(arrays) or 'no known arrays'})")
    return moments
