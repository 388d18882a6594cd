"""A folder of samples: their settings, and the images in shards, each of which is written atomically.

    manifest.json                    all settings that the images depend on, sealed; written first
    labels.npy                       int32 [N]
    texts.npz                        of a text network: str [N] captions, and others of `Samples.texts`
    shards/00007-of-00782.npy        uint8 [SHARD_IMAGES or the rest, H, W, C], from image 7 * SHARD_IMAGES on;
                                     [..., F, H, W, C] for clips; a clip counts as one image
    shards/00007-of-00782.json       size and SHA-256 of that file, and the digest of the settings, sealed
    samples.png                      a grid of the first 100

File names are computed from shard numbers: nothing that is read from the folder is used as a path.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.encode.cache_folder import differences
from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.runtime.versions import random_settings
from dit_jax.storage.atomic import is_partial, npy, remove_leftovers, write_atomic
from dit_jax.storage.bounded import read_npz
from dit_jax.storage.claim import LOCK, claim
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import digest, read_sealed, sha256_of, write_sealed

FORMAT = 1
SHARD_IMAGES = 64  # a multiple of every default chunk size of the generator
MANIFEST, LABELS, SHARDS, GRID = "manifest.json", "labels.npy", "shards", "samples.png"
TEXTS = "texts.npz"
# Paths and origins of weights, whose hashes are compared instead, and names of labels, which change no image.
NOT_COMPARED = ("origin", "autoguidance", "images_sha256", "class_names")


class Shards:
    """A folder of samples, finished or not.

    Fields:
        settings: what `manifest.json` holds: "format", "num_images", "shape" [H, W, C] or [F, H, W, C], "labels_sha256",
            "made_by" (how the images were made), "random" (options of JAX that the noise depends on; dit_jax 0.1 did not store
            them) and "made_with" (versions and the kind of device, which the last bits depend on).
        labels: int32[N].
        texts: as of `Samples`.
    """

    def __init__(self, path: Path, settings: dict, labels: np.ndarray, texts: Mapping[str, Sequence[str]] | None = None):
        self.path, self.settings, self.labels, self.texts = path, settings, labels, dict(texts or {})
        self.name, self.shape = str(path), tuple(settings["shape"])
        self.total = -(-len(self) // SHARD_IMAGES)

    def __len__(self) -> int:
        return self.settings["num_images"]

    @functools.cached_property
    def digest(self) -> str:
        return digest(self.settings)

    @property
    def made_by(self) -> dict:
        """The `made_by` entry of an npz: how the images were made, and under "drawn" the other settings."""
        return {**self.settings["made_by"], "drawn": {k: v for k, v in self.settings.items() if k != "made_by"}}

    @property
    def identity(self) -> dict:
        """Identifies the images without reading them."""
        return {"samples": self.digest}

    def file(self, shard: int, suffix: str = ".npy") -> Path:
        return self.path / SHARDS / f"{shard:05d}-of-{self.total:05d}{suffix}"

    def count(self, shard: int) -> int:
        """Number of images of a shard."""
        return min(SHARD_IMAGES, len(self) - shard * SHARD_IMAGES)

    def write(self, shard: int, images: np.ndarray) -> None:
        """Writes a shard, and then the file with its size and hash.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        facts = self.file(shard, ".json")
        try:
            facts.unlink(missing_ok=True)  # a damaged shard's facts are wrong while its file is replaced
            written = write_atomic(self.file(shard), npy(np.ascontiguousarray(images)))
            write_sealed(facts, {"settings": self.digest, "bytes": written.size, "sha256": written.sha256})
        except OSError as error:
            raise unwritable(self.file(shard), error) from None

    def problem(self, shard: int) -> str | None:
        """Reads a shard and describes its fault; "" if it is missing, None if it is intact."""
        file, facts = self.file(shard), self.file(shard, ".json")
        try:
            known = read_sealed(facts)
            if known.get("settings") != self.digest:
                return f"{facts} does not belong to the settings in {MANIFEST}"
            if file.stat().st_size != known.get("bytes") or sha256_of(file) != known.get("sha256"):
                return f"{file} has other bytes than when it was written"
        except FileNotFoundError:
            return ""
        except (OSError, UserError) as error:
            return str(error)
        return None

    def missing(self, shards: range) -> list[int]:
        """The missing and the damaged ones of these shards; reports the damaged ones."""
        with ThreadPoolExecutor() as pool:
            problems = list(pool.map(self.problem, shards))
        for problem in filter(None, problems):
            say(f"{problem}: drawing again")
        return [shard for shard, problem in zip(shards, problems, strict=True) if problem is not None]

    def read(self, shard: int) -> np.ndarray:
        """The images of a shard, uint8 [n, H, W, C], checked against its hash.

        Raises:
            UserError: the shard is missing or damaged.
        """
        try:
            known, data = read_sealed(self.file(shard, ".json")), self.file(shard).read_bytes()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; {GO_ON}") from None
        if known.get("settings") != self.digest or hashlib.sha256(data).hexdigest() != known.get("sha256"):
            raise UserError(f"{self.file(shard)} is damaged; {GO_ON}")
        try:
            images = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{self.file(shard)} cannot be read: {error}") from None
        if images.dtype != np.uint8 or images.shape != (self.count(shard), *self.shape):
            raise UserError(f"{self.file(shard)} is {images.dtype} {list(images.shape)}; {GO_ON}")
        return images

    def batches(self, start: int, stop: int, size: int) -> Iterator[np.ndarray]:
        """Images start..stop-1 in order, uint8 [n, H, W, C], n = size except for the last; one shard and one batch in memory."""
        first, kept = start // SHARD_IMAGES, []
        for shard in range(first, -(-stop // SHARD_IMAGES)):
            begin = shard * SHARD_IMAGES
            kept.append(self.read(shard)[max(start - begin, 0) : stop - begin])
            while sum(map(len, kept)) >= size:
                images = np.concatenate(kept)
                yield images[:size]
                kept = [images[size:]]
        if sum(map(len, kept)):
            yield np.concatenate(kept)

    def rows(self, size: int = SHARD_IMAGES) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(index of the first, uint8 images [n, H, W, C], int32 labels [n]) over all images in order."""
        start = 0
        for images in self.batches(0, len(self), size):
            yield start, images, self.labels[start : start + len(images)]
            start += len(images)


GO_ON = "run the dit_jax.sample command that drew these images again, which repairs the folder"


def unwritable(path: Path, error: OSError) -> UserError:
    """The error to raise for a file that could not be written."""
    return UserError(
        f"{path} cannot be written ({error.strerror}); make room and run the same command again, which keeps the finished shards"
    )


def settings_of(
    labels: np.ndarray,
    shape: tuple[int, ...],
    made_by: dict,
    made_with: dict,
    requests: Mapping[str, np.ndarray] | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> dict:
    """The settings of a folder of samples, see `Shards`.

    Args:
        requests: arrays [N, ...]; for entries other than labels the hashes are stored.
        texts: as of `Samples`; the hashes are stored.
    """
    others = {name: x for name, x in sorted((requests or {}).items()) if name != "label"}
    hashes = {name: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest() for name, x in others.items()}
    return {
        "format": FORMAT,
        "num_images": len(labels),
        "shape": list(shape),
        "labels_sha256": hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest(),
        **({"requests_sha256": hashes} if hashes else {}),
        **({"texts_sha256": {name: sha256_of_texts(x) for name, x in sorted(texts.items())}} if texts else {}),
        "made_by": made_by,
        "random": random_settings(),
        "made_with": made_with,
    }


def sha256_of_texts(texts: Sequence[str]) -> str:
    """The hash of texts, in order."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def settings_in(made_by: dict) -> dict | None:
    """The settings in the output of `Shards.made_by`; None if another program wrote it."""
    settings = dict(made_by)
    drawn = settings.pop("drawn", None)
    return {**drawn, "made_by": settings} if isinstance(drawn, dict) else None


def changes(stored: dict, wanted: dict, same_versions: bool = True) -> list[str]:
    """Differences of two settings that can change images, as lines "field: <stored> there, <wanted> now".

    same_versions: also compare "made_with".
    """
    left_out = (*NOT_COMPARED, *["made_with"] * (not same_versions), *["random"] * ("random" not in stored))

    def compared(settings):
        return {key: value for key, value in settings.items() if key not in left_out}

    return differences(*(compared({**each, "made_by": compared(each["made_by"])}) for each in (stored, wanted)))


def read(path: str | os.PathLike) -> Shards:
    """The samples in a folder with all its shards.

    Raises:
        UserError: not a folder of samples; unfinished; the manifest or the labels are damaged.
    """
    path = local_path(path)
    samples = opened(path)
    if samples is None:
        raise UserError(f"{path} has no {MANIFEST}; give a folder of dit_jax.sample")
    missing = [k for k in range(samples.total) if not (samples.file(k).is_file() and samples.file(k, ".json").is_file())]
    if missing:
        raise UserError(f"{path} has {samples.total - len(missing)} of {samples.total} shards; {GO_ON}")
    return samples


def opened(path: str | os.PathLike) -> Shards | None:
    """The samples in a folder, finished or not; None if there is no manifest.

    Raises:
        UserError: the manifest or the labels are damaged or have another format.
    """
    path = local_path(path)
    try:
        settings = read_sealed(path / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if settings.get("format") != FORMAT:
        raise UserError(
            f"{path / MANIFEST} has format {settings.get('format')!r} and this dit_jax reads {FORMAT}; give another folder"
        )
    if not all(isinstance(settings.get(key), dict) for key in ("made_by", "made_with")):
        raise UserError(f"{path / MANIFEST} does not say how its images were made; give another folder")
    shape, count = settings.get("shape"), settings.get("num_images")
    sizes: list[Any] = [count, *shape] if isinstance(shape, list) and len(shape) in (3, 4) else [0]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or math.prod(sizes) >= 2**63:
        raise UserError(f"{path / MANIFEST} says {count!r} images of shape {shape!r}, which is impossible; give another folder")
    try:
        labels = np.load(path / LABELS, mmap_mode="r", allow_pickle=False)  # a header may claim any size
    except (OSError, ValueError, EOFError, OverflowError) as error:
        raise UserError(f"{path / LABELS} cannot be read ({error}); remove {path} and draw again") from None
    same = (
        settings_of(labels.astype(np.int32), tuple(sizes[1:]), {}, {}) if labels.ndim == 1 and labels.dtype.kind in "iu" else {}
    )
    if any(same.get(key) != settings.get(key) for key in ("num_images", "labels_sha256")):
        raise UserError(f"{path / LABELS} does not hold the labels that {MANIFEST} names; remove {path} and draw again")
    return Shards(path, settings, labels.astype(np.int32), _texts(path, settings))


def _texts(path: Path, settings: dict) -> dict[str, tuple[str, ...]]:
    """The texts of a folder, checked against their hashes."""
    hashes = settings.get("texts_sha256", {})
    if not isinstance(hashes, dict):
        raise UserError(f"{path / MANIFEST} has no hashes of its texts; give another folder")
    if not hashes:
        return {}
    try:
        texts = {name: tuple(x.tolist()) for name, x in read_npz(path / TEXTS, list(hashes)).items()}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path / TEXTS} cannot be read ({error}); remove {path} and draw again") from None
    if {name: sha256_of_texts(x) for name, x in texts.items()} != hashes:
        raise UserError(f"{path / TEXTS} does not hold the texts that {MANIFEST} names; remove {path} and draw again")
    return texts


def npz_of_texts(texts: Mapping[str, Sequence[str]]) -> bytes:
    """An npz with a str [N] array for each."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.array(list(x), np.str_) for name, x in texts.items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@contextlib.contextmanager
def claimed(wanted: Shards, replace: bool = False) -> Iterator[None]:
    """Creates the folder of the wanted samples, or continues one, and claims it while the block runs.

    Only the first of several processes calls this; the others wait.

    replace: empties a folder with other samples.

    Raises:
        UserError: the folder holds something else or other samples (with the differences); another command uses it; it cannot
            be written.
    """
    with claim(wanted.path, "drawing samples", "--out"):
        try:
            _prepare(wanted, replace)
        except OSError as error:
            raise unwritable(wanted.path / MANIFEST, error) from None
        yield


def _prepare(wanted: Shards, replace: bool):
    path = wanted.path
    if strange := _strange(path):
        raise UserError(
            f"{path} holds {strange[0]} and is not a folder of dit_jax.sample; give an empty folder, or one that does not exist"
        )
    try:
        existing = opened(path)
    except UserError as error:
        if any((path / SHARDS).glob("*")):
            raise
        say(f"{error}: writing it again")
        existing = None
    if existing is not None:
        finished = all(existing.file(k, ".json").exists() for k in range(existing.total))
        lines = changes(existing.settings, wanted.settings, same_versions=not finished)
        if lines and not replace:
            raise UserError(
                f"{path} holds samples that were drawn with other settings; give another --out, or the old flags. Differences:"
                "\n  " + "\n  ".join(lines)
            )
        if lines:
            say(
                f"{path} holds samples that were drawn with other settings; replacing them. Differences:\n  " + "\n  ".join(lines)
            )
            clear(path)
            existing = None
    remove_leftovers(path)
    remove_leftovers(path / SHARDS)
    if existing is None:  # the manifest first: it shows a later start that the other files are ours
        write_sealed(path / MANIFEST, wanted.settings)
        write_atomic(path / LABELS, npy(wanted.labels))
        if wanted.texts:
            write_atomic(path / TEXTS, npz_of_texts(wanted.texts))
    (path / SHARDS).mkdir(exist_ok=True)


def _strange(path: Path) -> list[str]:
    """Names in a folder that `claimed` and `Shards.write` did not write, also if they were killed; sorted."""
    names = [p.name for p in path.iterdir() if not is_partial(p.name)]
    own = {LOCK, MANIFEST, LABELS, TEXTS, SHARDS, GRID}
    if MANIFEST not in names:  # dit_jax 0.1.0 wrote an empty folder of shards and the labels first
        empty = (path / SHARDS).is_dir() and all(is_partial(p.name) for p in (path / SHARDS).iterdir())
        own = {LOCK, SHARDS, LABELS} if empty else {LOCK}
    return sorted(set(names) - own)


def clear(path: Path) -> None:
    """Removes the files of `claimed` and `Shards.write`, the manifest last, so that a kill leaves a folder of samples."""
    shutil.rmtree(path / SHARDS, ignore_errors=True)
    for name in (LABELS, TEXTS, GRID, MANIFEST):
        (path / name).unlink(missing_ok=True)


def remove_finished(path: Path) -> None:
    """Removes a folder of shards that a command left when it was killed after its npz was complete."""
    with contextlib.suppress(UserError):  # another command is still at work there
        if path.is_dir() and not _strange(path):
            with claim(path, "removing it"):
                remove(path)


def remove(path: Path) -> None:
    """Removes a folder that this process has claimed, after its samples were copied."""
    clear(path)
    remove_leftovers(path)
    (path / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a network file system may keep the open lock for a moment
        path.rmdir()
