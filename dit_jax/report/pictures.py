"""Draws what a run's page shows and training has not drawn: how the sampler gets from noise to an image, and real images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.build import Run
from dit_jax.diffusion.process import Denoise, Memory, Prediction
from dit_jax.errors import UserError
from dit_jax.report.collect import DENOISING, REAL
from dit_jax.sample.drawing import GRID_IMAGES
from dit_jax.sample.grid import label_names, sampling_caption, write_image_grid
from dit_jax.sample.labels import spread_requests
from dit_jax.sample.weights import cast_for_inference, whole_network
from dit_jax.tasks.diffusion import CONDITIONER

ROWS, FRAMES = 4, 10  # images, and pictures of each, of the denoising
LOOKED_AT = 1_000  # records of the data set among which the real images are chosen


class Watched:
    """A `Denoise` that reports each prediction: record(t, x0), x0 [B, h, w, c]."""

    def __init__(self, denoise: Denoise, record: Callable[[Any, Any], None]):
        self.denoise, self.record = denoise, record

    def init(self, x: jax.Array) -> Memory:
        return self.denoise.init(x)

    def __call__(self, x_t: jax.Array, t: jax.Array, memory: Memory) -> tuple[Prediction, Memory]:
        prediction, memory = self.denoise(x_t, t, memory)
        jax.debug.callback(self.record, t, prediction.x0)
        return prediction, memory


def denoise(run: Run, ema_params: Any, constants: Any) -> tuple[np.ndarray, list[float]]:
    """(uint8 [ROWS, frames, H, W, C], times) of the run's first samples on one device of this process.

    The frames are the predicted x0 at some of the sampler's times, in order from noise to data; the last is the sample.

    Raises:
        UserError: the parameters are split over several devices.
    """
    ema_params = whole_network(run.task, ema_params, constants)
    constants = {name: tree for name, tree in constants.items() if name in ("codec", CONDITIONER)}
    if not all(x.is_fully_replicated for x in jax.tree.leaves((ema_params, constants))):
        raise UserError("the parameters are split over the devices")
    params, constants = jax.tree.map(lambda x: x.addressable_data(0), (ema_params, constants))
    params = cast_for_inference(run.task, params)
    seen: list[tuple[float, np.ndarray]] = []

    def record(t, x0):
        seen.append((float(np.max(t)), np.asarray(x0)))

    def latents(params, constants, keys, requests):
        def sampler(process, denoise, noise, keys):
            return run.sampler(process, Watched(denoise, record), noise, keys)

        return run.task.draw_latents(params, constants, keys, requests, sampler, run.guidance, None, run.forecast)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(run.config.seed), np.arange(ROWS))
    final = jax.jit(latents)(params, constants, keys, spread_requests(run.conditioner, ROWS, run.prompts))
    jax.effects_barrier()
    seen.sort(key=lambda each: -each[0])  # of several evaluations at one time the order does not matter
    chosen = [seen[i] for i in np.linspace(0, len(seen) - 1, min(FRAMES - 1, len(seen))).round().astype(int)]
    frames = [*(x0 for _, x0 in chosen), np.asarray(final)]
    decode = jax.jit(run.task.decode)
    images = np.stack([np.asarray(decode(constants, frame)) for frame in frames], 1)
    return images, [*(t for t, _ in chosen), 0.0]


def write_denoising(run: Run, ema_params: Any, constants: Any, workdir: Path, step: int) -> Path:
    """Writes the picture of `denoise`: a row per image, a column per time."""
    images, times = denoise(run, ema_params, constants)
    config, path = run.config, workdir / "samples" / f"{step:08d}{DENOISING}"
    names = [f"t = {t:.2g}" for t in times] * len(images)
    caption = sampling_caption(step, run.guidance.scale, config.sampler, config.seed)
    rows = images.reshape(-1, *images.shape[2:])  # a clip keeps its first frame
    write_image_grid(path, rows if rows.ndim == 4 else rows[:, 0], len(times), names=names, caption=caption)
    return path


def real_images(run: Run, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 [N, H, W, C], labels) of images of the training data; image k has label k if enough are found.

    They are chosen among LOOKED_AT records that are spread over the data set.
    """
    source = run.source
    places = list(np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)))
    by_label: dict[int, list[int]] = {}
    for place in places:
        by_label.setdefault(int(source[place]["label"]), []).append(place)
    chosen = [by_label[label].pop(0) for label in map(int, labels) if by_label.get(label)]
    if len(chosen) < min(len(labels), len(places)):  # a rare class, or no labels
        rest = [place for place in places if place not in chosen]
        chosen += [rest[i] for i in np.linspace(0, len(rest) - 1, min(len(rest), len(labels) - len(chosen))).astype(int)]
    examples = []
    for place in chosen:
        try:
            examples.append(run.transform(source[place]))
        except UserError:  # a bad record, which training has reported
            continue
    return np.stack([x["image"] for x in examples]), np.array([x["label"] for x in examples])


def write_real(run: Run, workdir: Path, count: int) -> Path:
    """Writes a picture of at most `count` real images, in the order of the classes of the final samples.

    Raises:
        UserError: the data set is a latent cache, which holds no images.
    """
    if run.entry != "image":
        raise UserError("the data set is a latent cache, which holds no images")
    classes = run.conditioner.num_classes
    wanted = spread_requests(run.conditioner, min(count, GRID_IMAGES), run.prompts).get(
        "label", np.zeros(min(count, GRID_IMAGES), int)
    )
    images, labels = real_images(run, wanted)
    names = label_names(labels, classes, run.source.class_names) if classes else []
    path = workdir / "samples" / REAL
    write_image_grid(path, images, 10 if len(images) >= 10 else None, names=names, caption="images of the data set")
    return path
