"""Reads a latent cache: moments of each image of a data set and of its mirror image (made by `python -m dit_jax.encode`).

N records, V views of each (2 with mirror images), h x w x c latents (f x h x w x c of clips); row V * i + mirror is record i.
"""

import dataclasses
import functools
import json
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_jax.data.latent_files import FILE_FORM, FORMAT, MANIFEST, MANIFEST_FORM, SETTINGS, SUFFIXES, shard_file
from dit_jax.data.open_files import OpenFiles
from dit_jax.data.sources.source import fingerprint
from dit_jax.data.transforms import ImageTransform
from dit_jax.errors import Unavailable, UserError
from dit_jax.storage.bounded import check_form, parsed
from dit_jax.storage.paths import local_path
from dit_jax.storage.sealed import damage, digest, read_sealed

NEAR_BYTES = 1 << 16  # between two rows that are read at once
SHOWN = 10  # number of lines of a list in an error message
# Fields of a codec that do not determine the moments: they act after the posterior, or affect only the precision.
UNSTORED_FIELDS = ("scale", "shift", "dtype", "param_dtype", "chunk_frames")


def codec_fields(codec: Any) -> dict:
    """Class name and sizes of a codec (a dataclass) as JSON; codecs with equal fields and weights give equal moments."""
    fields = {k: v for k, v in dataclasses.asdict(codec).items() if k not in UNSTORED_FIELDS}
    return json.loads(json.dumps({"name": type(codec).__name__, **fields}))


class LatentCache:
    """A read-only data set of moments on disk, neither decoded nor scaled.

    Attributes:
        manifest: all that `manifest.json` says: codec, transform, statistics, bad records, files.
        moments_shape: (h, w, 2c), or (f, h, w, 2c) of clips; mean and raw log-variance on the last axis, or c latents of a codec
            without a posterior; float16.
        views: 2 if the mirror image of every record is there, else 1.
        labels: int32 [N], in [0, num_classes).
        num_classes, class_names, fingerprint: as of a `Source`; the fingerprint changes with any byte of the data.

    Args:
        path: folder that `dit_jax.encode` wrote.
        verify: hash every file and hold it to the manifest: a second or two per GB and core. Without it names, sizes,
            counts, dtypes and shapes are checked.

    Raises:
        UserError: no cache there, or an unfinished one; another format; files missing, damaged or not what the manifest says.
    """

    def __init__(self, path: str | os.PathLike, verify: bool = True):
        if not str(path):
            raise UserError(
                "data.path is empty; give the folder of a latent cache, which python -m dit_jax.encode --data=<images> "
                "--codec=<autoencoder> --resolution=<pixels> --out=<folder> writes (--config.data.path=<folder>)"
            )
        self.path = local_path(path)
        self.manifest = read_manifest(self.path)
        m = self.manifest
        files = [m["settings"], *(file for shard in m["shards"] for file in shard["files"].values())]
        if problems := damage(self.path, files, verify):
            raise UserError(
                f"{self.path} is damaged, {len(problems)} of {len(files)} files: "
                f"{_shortened([*problems.values()])}. Run its encode command again, which encodes damaged "
                "shards again"
            )
        self.moments_shape, self.views = tuple(m["moments"]["shape"]), m["views"]
        self.num_classes, self.class_names = m["num_classes"], tuple(m["class_names"])
        self.fingerprint = digest(m)[:16]
        counts = [shard["count"] for shard in m["shards"]]
        shape = self.moments_shape
        opened = [self._open(k, "moments", np.float16, (self.views * n, *shape)) for k, n in enumerate(counts)]
        self._moments = [array.view(np.ndarray) for array in opened]
        names = [shard["files"]["moments"]["name"] for shard in m["shards"]]
        self._places = [(self.path / name, array.offset) for name, array in zip(names, opened, strict=True)]
        self.labels = np.concatenate([self._open(k, "labels", np.int32, (n,)) for k, n in enumerate(counts)])
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open_files = OpenFiles()
        if len(self.labels) != m["count"]:
            raise UserError(f"{self.path}: the shards contain {len(self.labels)} records, but the manifest says {m['count']}")
        if not 0 <= self.labels.min() <= self.labels.max() < max(self.num_classes, 1):
            raise UserError(
                f"{self.path}: labels run from {self.labels.min()} to {self.labels.max()}, outside the {self.num_classes} classes"
            )

    def _open(self, shard: int, kind: str, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        name = self.manifest["shards"][shard]["files"][kind]["name"]
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError, OverflowError) as error:
            raise UserError(f"{self.path / name} cannot be read ({error}): encode again") from None
        if array.dtype != dtype or array.shape != shape:
            raise UserError(
                f"{self.path / name} is {array.dtype}{list(array.shape)}, but the manifest says {np.dtype(dtype)}{list(shape)}"
            )
        return array

    def __len__(self) -> int:
        return self.manifest["count"]

    @functools.cached_property
    def source_index(self) -> np.ndarray:
        """Number of each record in the data set it was encoded from, int64 [N]."""
        shards = self.manifest["shards"]
        return np.concatenate([self._open(k, "index", np.int64, (shard["count"],)) for k, shard in enumerate(shards)])

    def captions(self, indices: np.ndarray) -> list[str | None]:
        """The caption of each record of `indices` (int [b] in [0, N)); None if it has none."""
        return self._texts(indices, "captions")

    def long_captions(self, indices: np.ndarray) -> list[str | None]:
        """The same of long captions."""
        return self._texts(indices, "long_captions")

    def _texts(self, indices: np.ndarray, kind: str) -> list[str | None]:
        indices = np.asarray(indices)
        self._check_range(indices, len(self), "records")
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return [self._shard_texts(int(k), kind)[i - self._starts[k]] for k, i in zip(shards, indices, strict=True)]

    def with_captions(
        self, indices: np.ndarray, entries: Callable[[Mapping[str, Any], int], Mapping[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """Stacks what `entries` makes of each record and its place in `indices`.

        A record is {"label", "name", and "caption" and "caption_long" if it has them}.
        """
        found, texts = [], zip(self.captions(indices), self.long_captions(indices), strict=True)
        for i, (record, own) in enumerate(zip(indices, texts, strict=True)):
            example: dict[str, Any] = {"label": int(self.labels[record]), "name": f"record {record} of {self.path}"}
            example |= {name: text for name, text in zip(("caption", "caption_long"), own, strict=True) if text is not None}
            found.append(entries(example, i))
        return {name: np.stack([x[name] for x in found]) for name in found[0]}

    @functools.cache  # noqa: B019  (one cache per process, kept as long as the run)
    def _shard_texts(self, shard: int, kind: str) -> list[str | None]:
        facts = self.manifest["shards"][shard]
        if kind not in facts["files"]:
            return [None] * facts["count"]
        file = self.path / facts["files"][kind]["name"]
        captions = parsed(file.read_bytes(), str(file), "encode again")
        if not isinstance(captions, list) or len(captions) != facts["count"]:
            raise UserError(f"{file} does not hold {facts['count']} captions; encode again")
        check_form([caption for caption in captions if caption is not None], [str], str(file), "encode again")
        return captions

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Gathers moments float16 [b, h, w, 2c] of rows V * i + mirror, int [b] in [0, V * N), with as few reads as are worth it.

        Rows are read from disk in ascending order, independent of their order in the batch.

        Raises:
            IndexError: a row is out of range.
            Unavailable: a file is away or cannot be read.
            UserError: a file was truncated.
        """
        rows = np.asarray(rows)
        self._check_range(rows, self.views * len(self), "rows")
        order = np.argsort(rows)
        ascending = rows[order]
        moments = np.empty((len(rows), *self.moments_shape), np.float16)
        starts = self.views * self._starts
        edges = np.searchsorted(ascending, starts)
        for k in np.flatnonzero(np.diff(edges)):
            part = slice(edges[k], edges[k + 1])
            self._read(int(k), ascending[part] - starts[k], moments[part])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return np.take(moments, back, axis=0)

    def _read(self, shard: int, rows: np.ndarray, out: np.ndarray) -> None:
        """Reads ascending rows of a shard into `out`; those that lie close together with one read."""
        row_bytes = out[0].nbytes
        for near in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) * row_bytes > NEAR_BYTES) + 1):
            first, last = int(rows[near[0]]), int(rows[near[-1]])
            block = np.empty((last - first + 1, *self.moments_shape), np.float16) if len(near) > 1 else out[near[0] : near[0] + 1]
            self._read_block(shard, first, block)
            if len(near) > 1:
                np.take(block, rows[near] - first, axis=0, out=out[near[0] : near[-1] + 1], mode="clip")

    def _read_block(self, shard: int, first: int, block: np.ndarray) -> None:
        """Fills `block` with the rows of a shard from `first` on."""
        path, offset = self._places[shard]
        data = memoryview(block.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            count = self._open_files.read_into(path, offset + first * block[0].nbytes, data)
        except OSError as error:
            raise Unavailable(f"{path}: {error.strerror}", isinstance(error, FileNotFoundError)) from error
        if count < block.nbytes:
            row = first + count // block[0].nbytes
            raise UserError(f"{path} ends within row {row}: it was truncated after it was opened; encode again")

    def slice(self, start: int, stop: int) -> np.ndarray:
        """A copy of the moments of rows start..stop-1."""
        starts = self.views * self._starts
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        return np.concatenate([self._moments[k][max(start - starts[k], 0) : stop - starts[k]] for k in range(first, last + 1)])

    def check(self, codec: Any, weights_sha256: str, transform: ImageTransform) -> None:
        """Raises unless encoding with these settings would give this cache.

        The codec's scale and shift are not compared, moments are stored unscaled; nor is its dtype, the precision of the
        same numbers.

        Args:
            codec: its sizes are compared; weights_sha256 (`interop.vae.weights_sha256`) its weights.
            transform: of the images. Its `flip` requests mirror images; a cache with mirror images also serves without.

        Raises:
            UserError: a list of the fields that differ.
        """
        stored = {
            **{f"codec.{k}": v for k, v in self.manifest["codec"].items()},
            **{f"transform.{k}": v for k, v in self.manifest["transform"].items()},
        }
        wanted = {
            **{f"codec.{k}": v for k, v in codec_fields(codec).items()},
            "codec.weights_sha256": weights_sha256,
            **dict.fromkeys(("transform.size", "transform.frames", "transform.fps")),  # which squares and images have not
            **{f"transform.{k}": v for k, v in transform.describe().items()},
        }
        lines = [
            f"{key}: {stored.get(key)!r} in the cache, {value!r} wanted"
            for key, value in wanted.items()
            if stored.get(key) != value
        ]
        if transform.flip and self.views == 1:
            lines.append("transform.flip: the cache has no mirror images (--nomirror), but True is wanted")
        if lines:
            raise UserError(
                f"{self.path} was encoded with other settings; change the config to match, or encode again into another "
                "folder:\n  " + "\n  ".join(lines)
            )

    def _check_range(self, values: np.ndarray, size: int, what: str) -> None:
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise ValueError(f"{what} are {values.dtype}{list(values.shape)}; they must be integers [b]")
        if values.size and not 0 <= values.min() <= values.max() < size:
            raise IndexError(f"{what} run from {values.min()} to {values.max()}, outside [0, {size})")


class LatentCaches:
    """The caches of the buckets of a run, one in the sub-folder of each bucket, such as 17x256x256; see `data.buckets`.

    Attributes:
        caches: for each bucket.
        class_names, num_classes, fingerprint: as of a `Source`.

    Args:
        path: the folder of the sub-folders.
        verify: as of `LatentCache`.
        names: of the sub-folders.

    Raises:
        UserError: as `LatentCache`; the classes of the caches differ.
    """

    def __init__(self, path: str | os.PathLike, verify: bool, names: Sequence[str]):
        if not str(path):
            raise UserError(
                f"data.path is empty; give the folder that holds a latent cache for each bucket, in {', '.join(names)} "
                "(--config.data.path=<folder>)"
            )
        self.path = local_path(path)
        self.caches = tuple(LatentCache(self.path / name, verify) for name in names)
        self.num_classes, self.class_names = self.caches[0].num_classes, self.caches[0].class_names
        for name, cache in zip(names, self.caches, strict=True):
            if (cache.num_classes, cache.class_names) != (self.num_classes, self.class_names):
                raise UserError(
                    f"the caches {names[0]} and {name} of {self.path} have different classes; encode both from one data set"
                )
        self.fingerprint = fingerprint(name="latent_buckets", caches=[cache.fingerprint for cache in self.caches])

    def __len__(self) -> int:
        return sum(map(len, self.caches))


def read_manifest(folder: str | os.PathLike) -> dict:
    """Reads the manifest of a finished cache and checks its consistency.

    Raises:
        UserError: there is no finished cache; the manifest is damaged, has another format, or lists unexpected file names.
    """
    folder = local_path(folder)
    try:
        manifest = read_sealed(folder / MANIFEST, {"format": int})
    except UserError as error:
        raise UserError(f"{error}. Run its encode command again, which writes the manifest again") from None
    except OSError as error:
        if (folder / SETTINGS).exists():
            raise UserError(f"the latent cache {folder} is not finished: run its encode command again to resume it") from None
        raise UserError(
            f"{folder / MANIFEST}: {error.strerror}; {folder} is not a latent cache (make one with python -m dit_jax.encode)"
        ) from None
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder} has cache format {manifest['format']}, but this dit_jax reads {FORMAT}: encode again")
    check_form(manifest, MANIFEST_FORM, str(folder / MANIFEST), "encode again")
    shards, shape = manifest["shards"], manifest["moments"]["shape"]
    numbers = [manifest["count"], manifest["views"], *shape, *(shard["count"] for shard in shards)]
    if not shards or len(shape) not in (3, 4) or min(numbers) < 0 or max(numbers) >= 2**40 or manifest["views"] not in (1, 2):
        raise UserError(f"{folder / MANIFEST} says {reprlib.repr(numbers)}, which is impossible; encode again")
    for k, shard in enumerate(shards):
        for kind, file in shard["files"].items():
            check_form(file, FILE_FORM, str(folder / MANIFEST), "encode again", f"shards[{k}].files.{kind}")
            if kind not in SUFFIXES:
                raise UserError(f"{folder / MANIFEST} lists a file of the unknown kind {kind!r}; encode again")
        for kind, file in shard["files"].items():
            if file["name"] != shard_file(k, len(shards), kind):  # this also prevents reading outside the folder
                raise UserError(
                    f"{folder / MANIFEST} names {file['name']!r} instead of {shard_file(k, len(shards), kind)!r}: "
                    "it was edited; encode again"
                )
    if manifest["settings"]["name"] != SETTINGS:
        raise UserError(f"{folder / MANIFEST} names {manifest['settings']['name']!r} instead of {SETTINGS!r}: encode again")
    return manifest


def _shortened(lines: list[str]) -> str:
    more = len(lines) - SHOWN
    return "; ".join(lines[:SHOWN]) + (f"; and {more} more" if more > 0 else "")
