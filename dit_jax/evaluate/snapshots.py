"""Snapshots of an unfinished feature extraction, from which it resumes with bitwise equal results.

    <folder>/<key>/0-of-2.npz                  of one process: its sums so far and the SHA-256 of each chunk of images
    <folder>/<key>/0-of-2.features-00003.npz   features of its 4th chunk, if they are wanted

The key is a digest of everything that determines the result. Each file is written atomically and has zip's CRC-32. If one is
damaged, extraction starts again.
"""

import shutil
import time
from pathlib import Path

import jax
import numpy as np

from dit_jax.errors import UserError
from dit_jax.runtime.console import say
from dit_jax.storage.atomic import replacing
from dit_jax.storage.bounded import read_npz
from dit_jax.storage.sealed import digest


class Snapshots:
    """The snapshots of one process in a folder.

    Args:
        key: JSON object of everything that determines the result: images, extractor, wanted outputs, batch size, versions.
        every_seconds: minimum time between snapshots. At most this much work is lost; a short extraction writes no file.
    """

    def __init__(self, folder: Path, key: dict, index: int, total: int, every_seconds: float = 30.0):
        self.folder, self.name, self.every_seconds = folder / digest(key)[:16], f"{index}-of-{total}", every_seconds
        self._last, self._written = time.monotonic(), 0

    def read(self, zeros: dict) -> tuple[dict, list[bytes], list]:
        """Reads (sums, SHA-256 of each finished chunk, its features or None); (zeros, [], []) without a snapshot."""
        path = self.folder / f"{self.name}.npz"
        if not path.exists():
            return zeros, [], []
        leaves, structure = jax.tree.flatten(zeros)
        try:
            file = read_npz(path, [*(f"sum_{i}" for i in range(len(leaves))), "digests", "features"])
            sums = [file[f"sum_{i}"] for i in range(len(leaves))]
            digests = [row.tobytes() for row in file["digests"]]
            keeps = bool(file["features"])
            features = [self._features(k) if keeps else None for k in range(len(digests))]
        except (OSError, ValueError, KeyError) as error:
            say(f"{path} is damaged ({error}); extracting features from the start")
            return zeros, [], []
        self._written = len(digests)
        say(f"resuming after {len(digests)} chunks of images from the snapshot in {self.folder}")
        return jax.tree.unflatten(structure, sums), digests, features

    def _features(self, chunk: int) -> np.ndarray:
        return read_npz(self._features_path(chunk), ["features"])["features"]

    def _features_path(self, chunk: int) -> Path:
        return self.folder / f"{self.name}.features-{chunk:05d}.npz"

    def write(self, sums: dict, digests: list[bytes], features: list) -> None:
        """Writes a snapshot after a chunk, unless the last one is newer than `every_seconds`."""
        if time.monotonic() - self._last < self.every_seconds:
            return
        try:
            self._write(sums, digests, features)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written ({error.strerror}): free some space, or give another --out"
            ) from None
        self._written, self._last = len(digests), time.monotonic()

    def _write(self, sums, digests, features):
        self.folder.mkdir(parents=True, exist_ok=True)
        keeps = features[0] is not None
        if keeps:
            for k in range(self._written, len(features)):
                _write_npz(self._features_path(k), {"features": features[k]})
        arrays = {f"sum_{i}": x for i, x in enumerate(jax.tree.leaves(sums))}
        _write_npz(
            self.folder / f"{self.name}.npz",
            {**arrays, "features": np.array(keeps), "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)},
        )


def remove(folder: Path) -> None:
    """Deletes the folder of a finished extraction, including snapshots of other keys."""
    shutil.rmtree(folder, ignore_errors=True)


def _write_npz(path: Path, arrays: dict[str, np.ndarray]):
    with replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
