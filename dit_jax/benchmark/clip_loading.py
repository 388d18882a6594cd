"""Measures the speed at which a host's cores decode clips, cut them and crop their frames."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dit_jax.benchmark.images import by_threads
from dit_jax.data.clip_transform import ClipTransform
from dit_jax.data.size import size_json
from dit_jax.data.sources import ClipFolder

SYNTHETIC_CLIPS, SYNTHETIC_FRAMES, SYNTHETIC_SIDE = 8, 32, 128


def write_animations(folder: Path) -> None:
    """Writes lossless animated WebPs of a smooth picture that moves."""
    rng = np.random.default_rng(0)
    for number in range(SYNTHETIC_CLIPS):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture = np.asarray(coarse.resize((SYNTHETIC_SIDE, SYNTHETIC_SIDE), Image.Resampling.BICUBIC))
        first, *others = (Image.fromarray(np.roll(picture, 2 * frame, 1)) for frame in range(SYNTHETIC_FRAMES))
        file = folder / f"{number:03d}.webp"
        first.save(file, save_all=True, append_images=others, duration=40, loop=0, lossless=True)


def run(data: str | None, frames: int, size: tuple[int, int], batch_size: int, seconds: float, threads: list[int]) -> dict:
    """Measures shuffled, mirrored training batches of clips by `data.loader.Loader`, once per number of threads.

    Args:
        data: folder of clips as for `ClipFolder`; None makes SYNTHETIC_CLIPS animated WebPs.
        frames: of a clip in a batch.
    """
    if data is not None:
        return _measured(data, ClipFolder(data), frames, size, batch_size, seconds, threads)
    with tempfile.TemporaryDirectory(prefix="dit_jax_clips_") as folder:
        write_animations(Path(folder))
        made = f"{SYNTHETIC_CLIPS} synthetic WebPs of {SYNTHETIC_FRAMES} frames of {SYNTHETIC_SIDE} x {SYNTHETIC_SIDE}"
        return _measured(made, ClipFolder(folder), frames, size, batch_size, seconds, threads)


def _measured(
    data: str, source: ClipFolder, frames: int, size: tuple[int, int], batch_size: int, seconds: float, threads: list[int]
) -> dict:
    """`images` in the keys counts clips; "frames_per_cpu_second" counts the frames that are kept."""
    transform = ClipTransform(frames, size[0], 3, flip=True, size=size)
    rows = by_threads(source, transform, batch_size, seconds, threads)
    for row in rows:
        row["frames_per_second"] = frames * row["images_per_second"]
        row["frames_per_cpu_second"] = frames * row["images_per_cpu_second"]
    stored = source.sizes()[:64]
    return {
        "data": data,
        "num_clips": len(source),
        "mean_stored": dict(zip(("frames", "height", "width", "fps"), map(float, stored.mean(0)), strict=True)),
        "frames": frames,
        "resolution": size_json(size),
        "batch_size": batch_size,
        **max(rows, key=lambda row: row["images_per_second"]),
        "by_threads": rows,
    }
